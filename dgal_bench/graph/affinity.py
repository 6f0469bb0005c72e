"""From neighbours to the affinity W: kernels, their local scales, and symmetrisation."""

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from dgal_bench.core.errors import choose
from dgal_bench.graph.knn import Neighbors

# The neighbour whose distance is a point's local scale (Zelnik-Manor and Perona, 2004).
_SCALE_NEIGHBOR = 7
# Below exp(-80) float32 would round weights to 0, and a row could lose all of them.
_MAX_EXPONENT = 80.0
# Edges of a block of rows: about 100 MB in memory.
BLOCK = 2_000_000


def typical_scale(distances_NK: Tensor) -> float:
    """The median local scale, from ascending distances to neighbours; 1 where all points are duplicates."""
    raw = _raw_scales(distances_NK)
    finite = raw[torch.isfinite(raw)]
    return float(finite.median()) if len(finite) else 1.0


def local_scales(distances_nK: Tensor, typical: float) -> Tensor:
    """(n,) distances to the 7th neighbour (or the last), never below 1e-3 of the ``typical`` scale.

    Where duplicates make that distance 0, the next positive one is used, or the typical scale where there is none: with
    the floor alone, the edges of a pile of duplicates to the rest would weigh exp(-1000), and it would be an island.
    """
    raw = _raw_scales(distances_nK)
    return torch.where(torch.isfinite(raw), raw, torch.full_like(raw, typical)).clamp(min=1e-3 * typical)


def _raw_scales(distances_nK: Tensor) -> Tensor:
    """Infinite where all neighbours are duplicates."""
    return torch.cat([_raw_scales_of(block) for block in distances_nK.split(_rows(distances_nK.shape[1]))])


def _raw_scales_of(distances_nK: Tensor) -> Tensor:
    seventh = distances_nK[:, min(_SCALE_NEIGHBOR, distances_nK.shape[1]) - 1]
    beyond = distances_nK.masked_fill(distances_nK <= 0, torch.inf).amin(dim=1)
    return torch.where(seventh > 0, seventh, beyond)


def local_scaling(distances_nK: Tensor, scales_nK: Tensor) -> Tensor:
    """exp(-d_ij^2 / (s_i s_j)), s the local scales."""
    return _exp_minus(distances_nK.square() / scales_nK)


def gaussian_k(distances_nK: Tensor, scales_nK: Tensor) -> Tensor:
    """exp(-4 d_ij^2 / d_K(i)^2), d_K the distance to the last neighbour."""
    last = distances_nK[:, -1:]
    return _exp_minus(4 * (distances_nK / torch.where(last > 0, last, torch.ones_like(last))).square())


def uniform(distances_nK: Tensor, scales_nK: Tensor) -> Tensor:
    """1 for every edge."""
    return torch.ones_like(distances_nK)


def _exp_minus(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=_MAX_EXPONENT).neg().exp()


Kernel = Callable[[Tensor, Tensor], Tensor]
"""(ascending distances (n, K), products s_i s_j of the local scales at both ends (n, K)) -> weights (n, K)."""

KERNELS: dict[str, Kernel] = {"local_scaling": local_scaling, "gaussian_k": gaussian_k, "uniform": uniform}

Combine = Callable[[sparse.csr_array, sparse.csr_array], sparse.csr_array]
"""(rows of W, the same rows of its transpose) -> rows of a symmetric matrix."""

SYMMETRIZERS: dict[str, Combine | None] = {
    "mean": lambda w, transposed: (w + transposed) / 2,
    "max": lambda w, transposed: w.maximum(transposed),
    "none": None,
}
"""None: W stays as it is, and is symmetric only by chance."""


def affinity(neighbors: Neighbors, kernel: str = "local_scaling", symmetrize: str = "mean") -> sparse.csr_array:
    """The weights W: (N, N) float64 CSR, zero diagonal, columns ascending in each row.

    At most 29 bytes an edge are in memory beside the neighbours: the directed weights once each way in float32, which
    holds them exactly, and the result.
    """
    directed = _directed_weights(neighbors, choose(KERNELS, kernel, "graph.kernel"))
    combine = choose(SYMMETRIZERS, symmetrize, "graph.symmetrize")
    if combine is None:
        directed.sort_indices()
        return directed.astype(np.float64)
    return _combine(directed, combine)


def is_symmetric(weights: sparse.csr_array) -> bool:
    """Whether W of ascending columns, without stored zeros, is its own transpose, to the bit."""
    transposed = weights.tocsc()
    parts = ("indptr", "indices", "data")
    return all(np.array_equal(getattr(weights, part), getattr(transposed, part)) for part in parts)


def _directed_weights(neighbors: Neighbors, weigh: Kernel) -> sparse.csr_array:
    """The kernel's weights: (N, N) float32 CSR, columns by distance."""
    size, k = neighbors.ids.shape
    # a sum with the transpose has up to twice the entries, and scipy needs one type for indices and pointers
    dtype = np.int32 if 2 * size * k < 2**31 else np.int64
    scales = local_scales(neighbors.distances, typical_scale(neighbors.distances))
    weights, ids = np.empty((size, k), dtype=np.float32), np.empty((size, k), dtype=dtype)
    for rows in torch.arange(size).split(_rows(k)):
        block = slice(int(rows[0]), int(rows[-1]) + 1)
        products = scales[block, None] * scales[neighbors.ids[block]]
        weights[block] = weigh(neighbors.distances[block], products).numpy()
        ids[block] = neighbors.ids[block].numpy()
    pointers = np.arange(0, size * k + 1, k, dtype=dtype)
    return sparse.csr_array((weights.ravel(), ids.ravel(), pointers), shape=(size, size))


def _combine(directed: sparse.csr_array, combine: Combine) -> sparse.csr_array:
    """``combine(directed, directed.T)`` in float64, in blocks of rows, into arrays of the largest possible size."""
    size, backward = len(directed.indptr) - 1, directed.tocsc()
    # pages that are never written take no memory
    data, columns = np.empty(2 * directed.nnz), np.empty(2 * directed.nnz, dtype=directed.indices.dtype)
    pointers = np.zeros(size + 1, dtype=directed.indices.dtype)
    for first in range(0, size, step := _rows(directed.nnz // size)):
        last = min(first + step, size)
        block = combine(_rows_of(directed, first, last), _rows_of(backward, first, last))
        at = pointers[first]
        data[at : at + block.nnz], columns[at : at + block.nnz] = block.data, block.indices
        pointers[first + 1 : last + 1] = at + block.indptr[1:]
    return sparse.csr_array((data[: pointers[-1]], columns[: pointers[-1]], pointers), shape=(size, size))


def _rows_of(matrix: sparse.csr_array | sparse.csc_array, first: int, last: int) -> sparse.csr_array:
    """Rows of a CSR matrix, columns of a CSC one as rows, in float64 and in ascending order: a copy."""
    begin, end = matrix.indptr[first], matrix.indptr[last]
    block = sparse.csr_array(
        (
            matrix.data[begin:end].astype(np.float64),
            matrix.indices[begin:end].copy(),
            matrix.indptr[first : last + 1] - begin,
        ),
        shape=(last - first, matrix.shape[0]),
    )
    block.sort_indices()
    return block


def _rows(k: int) -> int:
    """Rows of a block with k entries each."""
    return max(1, BLOCK // k)
