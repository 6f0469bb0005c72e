"""The affinity of a graph in blocks of rows: the plain sparse expression, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from dgal_bench.graph import affinity as module
from dgal_bench.graph.affinity import KERNELS, SYMMETRIZERS, affinity, is_symmetric, local_scales, typical_scale
from dgal_bench.graph.knn import Neighbors, knn

PLAIN = {"mean": lambda w: (w + w.T) / 2, "max": lambda w: w.maximum(w.T), "none": lambda w: w}


def plain(neighbors: Neighbors, kernel: str, symmetrize: str) -> sparse.csr_array:
    """All at once, in float64."""
    size, k = neighbors.ids.shape
    scales = local_scales(neighbors.distances, typical_scale(neighbors.distances))
    weights = KERNELS[kernel](neighbors.distances, scales[:, None] * scales[neighbors.ids]).double().flatten().numpy()
    directed = sparse.csr_array(
        (weights, neighbors.ids.flatten().numpy().copy(), np.arange(0, size * k + 1, k)), shape=(size, size)
    )
    combined = sparse.csr_array(PLAIN[symmetrize](directed))
    combined.sort_indices()
    return combined


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("symmetrize", SYMMETRIZERS)
@settings(max_examples=15, deadline=None)
@given(st.integers(3, 60), st.integers(1, 12), st.integers(1, 400), st.integers(0, 9))
def test_blocks_of_rows_are_the_plain_expression(kernel, symmetrize, size, k, block, seed):
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.normal(size=(size, 3)).round(1)).float()  # some are duplicates
    neighbors = knn(points, min(k, size - 1), "torch")
    before = neighbors.ids.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = affinity(neighbors, kernel, symmetrize)
    truth = plain(neighbors, kernel, symmetrize)
    assert found.data.dtype == np.float64
    assert found.indices.dtype == np.int32
    assert np.array_equal(found.indptr, truth.indptr)
    assert np.array_equal(found.indices, truth.indices)
    assert np.array_equal(found.data, truth.data)
    assert torch.equal(neighbors.ids, before)  # the caller's are not sorted


@pytest.mark.parametrize("symmetrize", SYMMETRIZERS)
def test_only_an_affinity_that_is_left_as_it_is_can_lack_symmetry(symmetrize):
    neighbors = knn(torch.from_numpy(np.random.default_rng(0).normal(size=(40, 2))), 3, "torch")
    weights = affinity(neighbors, "local_scaling", symmetrize)
    assert is_symmetric(weights) == ((weights != weights.T).nnz == 0) == (SYMMETRIZERS[symmetrize] is not None)
