"""Neighbours against brute force up to ties; the transition matrix's laws; a really disconnected graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components

from dgal_bench.core.errors import ConfigError
from dgal_bench.graph import knn as backends_module
from dgal_bench.graph.affinity import KERNELS, SYMMETRIZERS, affinity
from dgal_bench.graph.diffusion import diffuse
from dgal_bench.graph.knn import Neighbors, knn
from dgal_bench.graph.transition import attach, diagnostics, transition
from tests.loading import load

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
    nearest = truth.topk(k, largest=False).values
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


def test_above_the_exact_limit_lists_are_searched_and_its_recall_measured():
    features = cloud(3000, 8)
    exact, approximate = knn(features, 10), knn(features, 10, exact_limit=1000, recall_target=0.9)
    assert (exact.method, exact.recall) == ("tiles", 1.0)
    assert approximate.method.startswith("lists ")
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
    monkeypatch.setattr(backends_module.importlib.util, "find_spec", lambda name: None)
    backends_module.warn_faiss_missing.cache_clear()
    assert backends_module.pick_backend("auto") == "torch"
    assert backends_module.pick_backend("auto") == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "faiss is not installed: the torch backend builds the graph (as fast on a CPU; SEALS is slower); "
        "pip install faiss-cpu, or set "
        "graph.backend=torch"
    ]
    with pytest.raises(ConfigError, match="faiss is not installed"):
        knn(cloud(50), 5, "faiss")


def test_two_packages_that_own_faiss_are_refused_and_torch_still_works(monkeypatch):
    """pip says nothing when the second is installed; the last one wins, and removing either breaks the other."""
    monkeypatch.setattr(backends_module, "faiss_packages", lambda: ("faiss-cpu", "faiss-gpu"))
    for backend in ("auto", "faiss"):
        with pytest.raises(ConfigError, match="faiss-cpu and faiss-gpu are both installed") as caught:
            knn(cloud(50), 5, backend)
        assert "pip uninstall -y faiss-cpu faiss-gpu, then install one of them" in str(caught.value)
    assert knn(cloud(50), 5, "torch").method == "tiles"


def dense(graph):
    matrix = torch.zeros(graph.size, graph.size)
    for i, node in enumerate(graph.nodes):
        matrix[i, graph.neighbors(i)] = graph.weights[graph.indptr[node] : graph.indptr[node + 1]]
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


@pytest.mark.parametrize("symmetrize", SYMMETRIZERS)
def test_degrees_are_the_row_sums_that_make_the_affinity_of_the_transition(symmetrize):
    neighbors = knn(cloud(150), 8)
    graph, weights = transition(neighbors, symmetrize=symmetrize), affinity(neighbors, symmetrize=symmetrize).toarray()
    assert graph.degrees.dtype == torch.float64
    assert np.allclose(graph.degrees[graph.nodes], weights.sum(1))
    assert np.allclose(graph.degrees[graph.nodes, None] * dense(graph), weights, atol=1e-6)
    assert graph.symmetric == (symmetrize != "none") == (weights == weights.T).all()


@pytest.mark.parametrize("symmetrize", SYMMETRIZERS)
def test_the_neighbours_that_a_graph_is_made_of_stay_as_they_are(symmetrize):
    neighbors = knn(cloud(150), 8)
    ids, distances = neighbors.ids.clone(), neighbors.distances.clone()
    transition(neighbors, symmetrize=symmetrize)
    assert torch.equal(neighbors.ids, ids)
    assert torch.equal(neighbors.distances, distances)


def by_formula(kernel, distances, pool_distances, ids):
    """Weights of one image from its ascending distances to the points ``ids``, by loops (App. B)."""

    def raw(d):
        return d[6] if d[6] > 0 else min((x for x in d if x > 0), default=np.inf)

    scales = [raw(d) for d in pool_distances]
    median = sorted(s for s in scales if np.isfinite(s))[(sum(np.isfinite(scales)) - 1) // 2]

    def guarded(s):
        return max(s if np.isfinite(s) else median, 1e-3 * median)

    own, last = guarded(raw(distances)), distances[-1] if distances[-1] > 0 else 1.0
    weights = {
        "local_scaling": [
            np.exp(-min(80, d**2 / (own * guarded(scales[i])))) for d, i in zip(distances, ids, strict=True)
        ],
        "gaussian_k": [np.exp(-4 * d**2 / last**2) for d in distances],
        "uniform": [1.0 for _ in distances],
    }[kernel]
    return np.array(weights) / sum(weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pool", [cloud(150), with_duplicates(), cloud(60) + 1000], ids=["cloud", "duplicates", "far"])
def test_an_image_hangs_on_its_nearest_points_by_the_kernels_formula(pool, kernel, backend):
    """Images anywhere, on top of a point of the pool or of a pile of duplicates, and far from everything."""
    k = 9
    images = torch.cat([pool.mean(0) + cloud(30, seed=5), pool[:5], pool.mean(0) + torch.full((1, 5), 500.0)])
    attachment = attach(knn(pool, k), pool, images, kernel, backend)
    pool64 = pool.double().numpy()
    truth = np.sqrt(((images.double().numpy()[:, None] - pool64) ** 2).sum(-1))
    within = np.sqrt(((pool64[:, None] - pool64) ** 2).sum(-1))
    np.fill_diagonal(within, np.inf)
    for i, ids in enumerate(attachment.ids.tolist()):
        assert len(set(ids)) == k
        nearest = np.sort(truth[i])[:k]
        assert np.allclose(truth[i, ids], nearest, atol=2e-4)
        expected = by_formula(kernel, nearest, np.sort(within, axis=1)[:, :k], ids)
        assert np.allclose(attachment.weights[i], expected, rtol=5e-3, atol=1e-5)
    assert torch.allclose(attachment.weights.sum(1), torch.ones(len(images)))
    assert (attachment.ids.dtype, attachment.weights.dtype) == (torch.int64, torch.float32)


def test_an_image_that_is_a_point_of_the_pool_hangs_on_it_first():
    pool = cloud(200)
    attachment = attach(knn(pool, 8), pool, pool[:50])
    assert torch.equal(attachment.ids[:, 0], torch.arange(50))
    assert torch.equal(attachment.weights.argmax(1), torch.zeros(50, dtype=torch.int64))


def test_what_an_image_hangs_on_depends_on_no_other_image():
    pool, images = cloud(300), cloud(40, seed=1)
    together, alone = (attach(knn(pool, 8), pool, some) for some in (torch.cat([images * 100, images]), images))
    assert torch.equal(together.ids[40:], alone.ids)
    assert torch.equal(together.weights[40:], alone.weights)
    nothing = attach(knn(pool, 8), pool, images[:0])
    assert nothing.ids.shape == nothing.weights.shape == (0, 8)


def test_an_image_without_finite_features_is_refused():
    pool, images = cloud(100), cloud(10)
    images[[2, 7], 0] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(ConfigError, match="2 of 10 feature rows of the test images hold NaN or infinity"):
        attach(knn(pool, 5), pool, images)


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
    from dgal_bench.graph.graph import Graph

    for size, steps in {1437: 3, 48_000: 4, 60_000: 4, 124_800: 4, 1_000_000: 5, 10_000_000: 6, 400: 2, 401: 3}.items():
        pointer = torch.zeros(1, dtype=torch.int32).expand(size + 1)
        graph = Graph(pointer, *[torch.zeros(0)] * 4, graph_k=20, symmetric=True)
        assert graph.default_steps == steps


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
