"""Neighbours against brute force up to ties; the transition matrix's laws; a really disconnected graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components

from dgal_bench.data.datasets import load
from dgal_bench.errors import ConfigError
from dgal_bench.graph import knn as knn_module
from dgal_bench.graph.diffusion import diffuse
from dgal_bench.graph.knn import Neighbors, knn
from dgal_bench.graph.transition import KERNELS, SYMMETRIZERS, affinity, diagnostics, transition

BACKENDS = ["faiss", "torch"]


def cloud(n, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def with_duplicates():
    """Ten points, each there 20 times, and 100 single ones."""
    return torch.cat([cloud(10, seed=1).repeat(20, 1), cloud(100, seed=2)])


def on_a_grid():
    """Many exactly equal distances between different points."""
    return torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [cloud(300), with_duplicates(), on_a_grid(), cloud(50) + 1000], ids=str)
def test_knn_is_brute_force_up_to_ties(backend, features):
    k = 7
    neighbors = knn(features, k, backend)
    truth = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    truth.fill_diagonal_(torch.inf)
    nearest = truth.sort(dim=1).values[:, :k]
    # The same distances in the same order: which of several equally near points is taken is free.
    assert torch.allclose(neighbors.distances.double(), nearest, atol=2e-4)
    assert torch.allclose(truth.gather(1, neighbors.ids), nearest, atol=2e-4)
    assert all(len(set(row)) == k for row in neighbors.ids.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_point_is_never_its_own_neighbour_among_duplicates(backend):
    features = with_duplicates()
    neighbors = knn(features, 10, backend)
    assert not (neighbors.ids == torch.arange(len(features))[:, None]).any()
    assert (neighbors.distances[:200] == 0).all()  # 19 copies each: all ten neighbours are duplicates


def test_backends_agree():
    features = cloud(400, 16)
    assert torch.equal(knn(features, 10, "faiss").ids, knn(features, 10, "torch").ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_torch_backend_finds_on_the_gpu_what_it_finds_on_the_cpu():
    features = torch.cat([cloud(3000, 16), with_duplicates()[:, :1].expand(-1, 16)])
    on_gpu = knn(features, 10, "torch", device=torch.device("cuda"))
    assert torch.equal(on_gpu.ids, knn(features, 10, "torch").ids)


def test_knn_does_not_depend_on_the_order_of_points():
    features = cloud(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    plain, shuffled = knn(features, 6), knn(features[order], 6)
    assert torch.equal(order[shuffled.ids], plain.ids[order])


def test_above_the_exact_limit_an_inverted_file_is_searched_and_its_recall_measured():
    features = cloud(3000, 8)
    exact, approximate = knn(features, 10), knn(features, 10, "faiss", exact_limit=1000)
    assert (exact.method, exact.recall) == ("faiss", 1.0)
    assert approximate.method == "faiss-ivf"
    hits = [len(set(a) & set(b)) for a, b in zip(exact.ids.tolist(), approximate.ids.tolist(), strict=True)]
    found = sum(hits) / (3000 * 10)
    assert found > 0.8
    assert approximate.recall == pytest.approx(found, abs=0.03)  # on every third point


def test_bad_input_is_refused_before_faiss_loses_it_silently():
    with pytest.raises(ConfigError, match=r"graph.graph_k=50, but 50 points have 1 to 49"):
        knn(cloud(50), 50)
    with pytest.raises(ConfigError, match="graph_k=0"):
        knn(cloud(50), 0)
    broken = cloud(50)
    broken[3, 1], broken[9, 0] = torch.nan, torch.inf
    with pytest.raises(ConfigError, match="2 of 50 feature rows hold NaN"):
        knn(broken, 5)
    with pytest.raises(ConfigError, match="did you mean 'faiss'"):
        knn(cloud(50), 5, "fais")


def test_without_faiss_auto_is_torch_said_once_and_asking_for_it_is_an_error(monkeypatch, caplog):
    monkeypatch.setattr(knn_module.importlib.util, "find_spec", lambda name: None)
    knn_module._say_that_faiss_is_missing.cache_clear()
    assert knn(cloud(50), 5).method == "torch"
    assert knn(cloud(50), 5).method == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "faiss is not installed: the torch backend builds the graph (exact, slower); pip install faiss-cpu, or set "
        "graph.backend=torch"
    ]
    with pytest.raises(ConfigError, match="faiss is not installed"):
        knn(cloud(50), 5, "faiss")


def test_two_packages_that_own_faiss_are_refused_and_torch_still_works(monkeypatch):
    """pip says nothing when the second is installed; the last one wins, and removing either breaks the other."""
    monkeypatch.setattr(knn_module, "faiss_packages", lambda: ("faiss-cpu", "faiss-gpu"))
    for backend in ("auto", "faiss"):
        with pytest.raises(ConfigError, match="faiss-cpu and faiss-gpu are both installed") as caught:
            knn(cloud(50), 5, backend)
        assert "pip uninstall -y faiss-cpu faiss-gpu, then install one of them" in str(caught.value)
    assert knn(cloud(50), 5, "torch").method == "torch"


def dense(graph):
    matrix = torch.zeros(graph.size, graph.size)
    for i in range(graph.size):
        matrix[i, graph.neighbors(i)] = graph.weights[graph.indptr[i] : graph.indptr[i + 1]]
    return matrix


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("symmetrize", SYMMETRIZERS)
@pytest.mark.parametrize("features", [cloud(150), with_duplicates()], ids=["cloud", "duplicates"])
def test_transition_is_stochastic_without_loops(features, kernel, symmetrize):
    graph = transition(knn(features, 8), kernel, symmetrize)
    matrix = dense(graph)
    assert torch.isfinite(graph.weights).all()
    assert (graph.weights > 0).all()
    assert torch.allclose(matrix.sum(1), torch.ones(graph.size), atol=1e-5)
    assert (matrix.diagonal() == 0).all()
    assert graph.indices.dtype == torch.int32


@pytest.mark.parametrize("kernel", KERNELS)
def test_affinity_is_the_formula(kernel):
    """Every weight recomputed by loops from the formulas (App. B)."""
    neighbors = knn(cloud(60), 9)
    d, ids = neighbors.distances.double().numpy(), neighbors.ids.numpy()
    sigma = d[:, 6]
    formulas = {
        "local_scaling": lambda i, k: np.exp(-(d[i, k] ** 2) / (sigma[i] * sigma[ids[i, k]])),
        "gaussian_k": lambda i, k: np.exp(-4 * d[i, k] ** 2 / d[i, -1] ** 2),
        "uniform": lambda i, k: 1.0,
    }
    directed = np.zeros((60, 60))
    for i in range(60):
        for k in range(9):
            directed[i, ids[i, k]] = formulas[kernel](i, k)
    combined = {"mean": (directed + directed.T) / 2, "max": np.maximum(directed, directed.T), "none": directed}
    for symmetrize, truth in combined.items():
        assert np.allclose(affinity(neighbors, kernel, symmetrize).toarray(), truth, atol=1e-6)


def test_a_pile_of_duplicates_is_no_island():
    """30 copies of one point amid a cloud: labels must cross into the pile and out of it."""
    features = torch.cat([torch.zeros(30, 3), cloud(170, 3)])
    graph = transition(knn(features, 40))
    outside, inside = torch.tensor([50]), torch.tensor([3])
    label = torch.tensor([0])
    into = diffuse(graph, outside, label, 2, steps=20)[:30, 0]
    out_of = diffuse(graph, inside, label, 2, steps=20)[30:, 0]
    assert into.min() > 1e-3
    assert out_of.max() > 1e-3


def test_a_far_outlier_keeps_its_row():
    """Its weights underflow in float32; the row must not vanish."""
    features = torch.cat([cloud(100, 3) * 1e-4, torch.full((1, 3), 1e6)])
    graph = transition(knn(features, 5))
    assert torch.allclose(dense(graph).sum(1), torch.ones(101), atol=1e-5)


def test_a_row_without_weight_stays_zero():
    """Only ``none`` can leave one: a hand-made neighbourhood that all points away from row 0 ... and 0 has weight."""
    from scipy import sparse

    from dgal_bench.graph.transition import from_affinity

    graph = from_affinity(sparse.csr_array(np.array([[0, 1.0, 0], [2.0, 0, 2.0], [0, 0, 0]])), graph_k=1)
    assert torch.allclose(dense(graph), torch.tensor([[0, 1.0, 0], [0.5, 0, 0.5], [0, 0, 0]]))


def test_default_steps_are_the_papers():
    """T = ceil(log_K N): 3 for digits, 4 for the sets of Table 1, 5 at a million, 6 at ten million."""
    from dgal_bench.graph.transition import Graph

    for size, steps in {1437: 3, 48_000: 4, 60_000: 4, 124_800: 4, 1_000_000: 5, 10_000_000: 6, 400: 2, 401: 3}.items():
        pointer = torch.zeros(1, dtype=torch.int32).expand(size + 1)
        assert Graph(pointer, torch.zeros(0), torch.zeros(0), graph_k=20).default_steps == steps


def test_the_digits_graph_at_5_has_two_components():
    """Two components at K = 3 and 5 on the pixels of all 1,797, one at 10."""
    data = load("digits", Path("unused"))
    pixels = torch.cat([data.images, data.test_images]).flatten(1).float()
    for k, components in {3: 2, 5: 2, 10: 1}.items():
        neighbors = knn(pixels, k)
        graph = transition(neighbors)
        facts = diagnostics(neighbors, graph)
        assert facts["components"] == components
        assert (facts["outside_largest"] > 0) == (components > 1)
        # A label in the largest component never reaches the other one, however long it walks.
        parts = connected_components(affinity(neighbors), directed=False)[1]
        start = torch.tensor([int(np.flatnonzero(parts == np.bincount(parts).argmax())[0])])
        heat = diffuse(graph, start, torch.tensor([0]), 10, steps=60)
        assert ((heat[:, 0] > 0).numpy() == (parts == parts[start[0]])).all()


def test_diagnostics_count_hubs():
    """In-degrees 9, 1, 0 x 8 of a star: skewed; a ring has none."""
    star = Neighbors(torch.tensor([[1], *[[0]] * 9]), torch.ones(10, 1), "faiss", 1.0)
    ring = Neighbors(torch.tensor([[(i + 1) % 10] for i in range(10)]), torch.ones(10, 1), "faiss", 1.0)
    assert diagnostics(star, transition(star))["in_degree_skew"] > 2
    assert diagnostics(ring, transition(ring))["in_degree_skew"] == 0
