"""The algebra of eqs. 7-9 and App. C, and three limits: Lemma 4.1 holds for neither iteration as written."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.linalg import cg

from dgal_bench.core.errors import ConfigError
from dgal_bench.graph import diffusion
from dgal_bench.graph.affinity import affinity
from dgal_bench.graph.diffusion import diffuse, mass, multivariate, one_vs_all, reach_share, score, step
from dgal_bench.graph.knn import knn
from dgal_bench.graph.transition import from_affinity, transition


def problem(seed=0, n=120, n_classes=4, n_labeled=6, k=8):
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 3, generator=rng)
    labeled = torch.randperm(n, generator=rng)[:n_labeled]
    labels = torch.randint(0, n_classes, (n_labeled,), generator=rng)
    return features, labeled, labels, n_classes, knn(features, k)


def dense(graph):
    """M between positions."""
    matrix = sparse.csr_array((graph.weights.numpy(), graph.indices.numpy(), graph.indptr.numpy()))
    return torch.from_numpy(matrix.toarray())[graph.nodes][:, graph.nodes]


problems = st.tuples(st.integers(0, 10_000), st.integers(0, 6))


@settings(max_examples=25)
@given(problems)
def test_a_step_is_the_matrix_product(drawn):
    _, _, _, _, neighbors = problem(drawn[0])
    graph = transition(neighbors)
    values = torch.randn(graph.size, 3)
    assert torch.allclose(step(graph, values[graph.points])[graph.nodes], dense(graph) @ values, atol=1e-5)


@settings(max_examples=25)
@given(problems)
def test_one_propagation_gives_equation_8_and_appendix_c(drawn):
    seed, steps = drawn
    _, labeled, labels, n_classes, neighbors = problem(seed)
    graph = transition(neighbors)
    matrix, one_hot = dense(graph), torch.nn.functional.one_hot(labels, n_classes).float()
    chi, p = torch.zeros(graph.size, n_classes), torch.full((graph.size, n_classes), 1 / n_classes)
    chi[labeled], p[labeled] = 2 * one_hot - 1, one_hot
    for _ in range(steps):  # eqs. 7 and 8, and App. C, as written
        chi, p = matrix @ chi, matrix @ p
        chi[labeled], p[labeled] = 2 * one_hot - 1, one_hot
    heat = diffuse(graph, labeled, labels, n_classes, steps)
    assert torch.allclose(one_vs_all(heat), chi, atol=1e-5)
    assert torch.allclose(multivariate(heat), p, atol=1e-5)
    assert heat.min() >= 0
    assert mass(heat).max() <= 1 + 1e-5
    assert torch.allclose(multivariate(heat).sum(1), torch.ones(graph.size), atol=1e-5)
    assert torch.equal(heat[labeled], one_hot)


def test_one_step_touches_only_neighbours_of_labels():
    _, labeled, labels, n_classes, neighbors = problem()
    graph = transition(neighbors)
    touched = mass(diffuse(graph, labeled, labels, n_classes, 1))[:, 0] > 0
    expected = (dense(graph)[:, labeled] > 0).any(dim=1)
    expected[labeled] = True
    assert torch.equal(touched, expected)
    assert reach_share(graph, labeled, 1) == pytest.approx(float(expected.float().mean()))


def test_a_row_without_weight_is_unreached_and_keeps_the_uniform_distribution():
    graph = from_affinity(sparse.csr_array(np.array([[0, 1.0, 0], [1.0, 0, 0], [0, 0, 0]])), graph_k=1)
    heat = diffuse(graph, torch.tensor([0]), torch.tensor([1]), 4, 5)
    assert heat[2].tolist() == [0, 0, 0, 0]
    assert multivariate(heat)[2].tolist() == [0.25] * 4


def test_invariant_under_relabelling_of_nodes():
    features, labeled, labels, n_classes, neighbors = problem(n=300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))  # new position -> old position
    place = order.argsort()
    heat = diffuse(transition(neighbors), labeled, labels, n_classes, 4)
    again = diffuse(transition(knn(features[order], 8)), place[labeled], labels, n_classes, 4)
    assert torch.allclose(again, heat[order], atol=1e-6)


def test_the_same_bits_on_one_and_two_threads():
    _, labeled, labels, n_classes, neighbors = problem(n=4000)
    graph = transition(neighbors)
    torch.set_num_threads(1)
    one = diffuse(graph, labeled, labels, n_classes, 5)
    torch.set_num_threads(2)
    assert torch.equal(diffuse(graph, labeled, labels, n_classes, 5), one)


def harmonic(weights, labeled, one_hot):
    """L_uu u = W_ul y on the points that a label can reach, by conjugate gradients; 0 elsewhere (eq. 5)."""
    n = weights.shape[0]
    laplacian = sparse.csr_array(sparse.diags_array(np.asarray(weights.sum(axis=1)).ravel()) - weights)
    parts = sparse.csgraph.connected_components(weights, directed=False)[1]
    free = np.setdiff1d(np.flatnonzero(np.isin(parts, parts[labeled])), labeled)
    solution = np.zeros((n, one_hot.shape[1]))
    solution[labeled] = one_hot
    for c in range(one_hot.shape[1]):
        right = weights[free][:, labeled] @ one_hot[:, c]
        solution[free, c], failed = cg(laplacian[free][:, free], right, rtol=1e-10, maxiter=5000)
        assert failed == 0
    return solution


@pytest.mark.parametrize("apart", [False, True], ids=["connected", "two islands, one without a label"])
def test_limit_1_the_clamped_iteration_goes_to_the_harmonic_extension(apart):
    features, labeled, labels, n_classes, _ = problem(n=100)
    if apart:
        features = torch.cat([features, features + 1000])
    neighbors = knn(features, 8)
    one_hot = torch.nn.functional.one_hot(labels, n_classes).numpy().astype(float)
    truth = harmonic(affinity(neighbors), labeled.numpy(), one_hot)
    errors = [
        np.abs(diffuse(transition(neighbors), labeled, labels, n_classes, steps).numpy() - truth).max()
        for steps in (1, 10, 100, 1000, 10_000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-4
    if apart:
        assert (truth[100:] == 0).all()


def walk(steps, centre):
    """The unclamped walk M^t chi from one label of each sign, its D-weighted mean taken out after every step or not."""
    _, labeled, _, _, neighbors = problem(n=100)
    weights = affinity(neighbors)
    degree = np.asarray(weights.sum(axis=1)).ravel()
    m = sparse.csr_array(sparse.diags_array(1 / degree) @ weights)
    chi = np.zeros(100)
    chi[labeled[:2]] = 1, -1
    for _ in range(steps):
        chi = m @ chi
        if centre:
            chi -= degree @ chi / degree.sum()
            chi /= np.sqrt(degree @ chi**2)
    return chi, degree, m


def test_limit_2_the_unclamped_walk_goes_to_a_constant():
    """Lemma 4.1 as written says phi_2: it is the D-weighted mean of the start that is left."""
    start, degree, _ = walk(0, centre=False)
    end, _, _ = walk(5000, centre=False)
    assert np.ptp(end) < 1e-9
    assert end[0] == pytest.approx(degree @ start / degree.sum(), abs=1e-9)


def test_limit_3_its_centred_and_renormalised_part_goes_to_the_second_eigenvector():
    chi, degree, m = walk(5000, centre=True)
    symmetric = sparse.diags_array(degree**0.5) @ m @ sparse.diags_array(degree**-0.5)
    values, vectors = np.linalg.eigh((symmetric + symmetric.T).toarray() / 2)
    assert values[-1] == pytest.approx(1)
    assert values[-2] > abs(values[0])  # lambda_2 > |lambda_n|: without it the walk would go to phi_n
    phi_2 = degree**-0.5 * vectors[:, -2]
    assert abs(np.sqrt(degree) * chi @ vectors[:, -2]) == pytest.approx(1, abs=1e-6)
    assert np.allclose(chi, phi_2 * np.sign(chi @ phi_2) / np.sqrt(degree @ phi_2**2), atol=1e-5)


def rows():
    """Unreached, certain, torn between two, torn between four, and something else; C = 4."""
    return torch.tensor(
        [[0, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.0, 0.3]],
        dtype=torch.float32,
    )


def by_loops(name, u):
    h = sum(u)
    p = [value + (1 - h) / 4 for value in u]
    ranked = sorted(p, reverse=True)
    chi = [2 * value - h for value in u]
    return {
        "ova_min": min(abs(value) for value in chi),
        "ova_norm": sum(abs(value) ** 3 for value in chi) ** (1 / 3),
        "confidence": ranked[0],
        "margin": ranked[0] - ranked[1],
        "negentropy": sum(value * np.log(value) for value in p if value > 0),
        "normalised": min(abs(2 * value / h - 1) for value in u) if h > 0 else -1,
    }[name]


NAMES = ["ova_min", "ova_norm", "confidence", "margin", "negentropy", "normalised"]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_their_formulas(name):
    truth = [by_loops(name, u) for u in rows().tolist()]
    assert score(name, 3.0)(rows()).tolist() == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_score_finds_a_certain_point_more_worth_asking_than_a_torn_one(name):
    unreached, certain, torn_in_two, *_ = score(name)(rows()).tolist()
    assert torn_in_two < certain or name == "ova_norm"
    assert unreached < certain


def test_ova_min_sees_two_class_boundaries_only():
    """A point torn evenly between C classes scores 1 - 2/C, one torn between two scores 0."""
    _, _, torn_in_two, torn_in_four, _ = score("ova_min")(rows()).tolist()
    assert torn_in_two == 0
    assert torn_in_four == pytest.approx(1 - 2 / 4)


def test_an_unknown_score_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'margin'"):
        score("margn")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_diffusion_on_the_gpu_is_the_cpus():
    _, labeled, labels, n_classes, neighbors = problem(n=4000)
    graph = transition(neighbors)
    on_gpu = diffusion.diffuse(graph.to(torch.device("cuda")), labeled, labels, n_classes, 5).cpu()
    assert torch.allclose(on_gpu, diffuse(graph, labeled, labels, n_classes, 5), atol=1e-6)
