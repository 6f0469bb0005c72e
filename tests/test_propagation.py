"""Propagated labels against dense solves and counts by loops: the limit, what no label reaches, and what is counted."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from dgal_bench.graph.diffusion import diffuse
from dgal_bench.graph.graph import Attachment
from dgal_bench.graph.knn import knn
from dgal_bench.graph.propagation import class_scores, harmonic, propagation_accuracy, residual
from dgal_bench.graph.transition import attach, from_affinity, transition

C = 4


def cloud(n, seed=0, d=3):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def matrix(graph):
    """M between positions, float64 and dense."""
    parts = (graph.weights.double().numpy(), graph.indices.numpy(), graph.indptr.numpy())
    return sparse.csr_array(parts, shape=(graph.size, graph.size)).toarray()[graph.nodes][:, graph.nodes]


def in_reach(graph, labeled):
    """(N,) which points are in a component that holds a label."""
    # Signs: scipy drops dense weights under 1e-8.
    parts = connected_components(matrix(graph) > 0, directed=False)[1]
    return np.isin(parts, parts[np.asarray(labeled)])


def solved(graph, labeled, labels):
    """(I - M_uu) u = M_ul y by elimination on the unlabeled points of components that hold a label; 0 on the others."""
    m, labeled = matrix(graph), np.asarray(labeled)
    free = np.setdiff1d(np.flatnonzero(in_reach(graph, labeled)), labeled)
    solution = np.zeros((graph.size, C))
    solution[labeled, labels] = 1
    rest = np.eye(len(free)) - m[np.ix_(free, free)]
    solution[free] = np.linalg.solve(rest, m[np.ix_(free, labeled)] @ solution[labeled])
    return solution


def random_problem(seed, orders=1):
    """A random graph, perhaps in several parts, its weights over some orders of magnitude; 1 to 6 labels."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 61))
    weights = np.triu(rng.random((n, n)) < rng.uniform(1, 6) / n, k=1) * 10 ** rng.uniform(-orders, 0, (n, n))
    if rng.random() < 0.5:
        weights[np.arange(n - 1), np.arange(1, n)] += rng.uniform(0.01, 1, n - 1)  # a path: connected
    labeled = rng.permutation(n)[: rng.integers(1, 7)]
    graph = from_affinity(sparse.csr_array(weights + weights.T), graph_k=5)
    return graph, torch.from_numpy(labeled), torch.from_numpy(rng.integers(0, C, len(labeled)))


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=60)
@given(seeds)
def test_harmonic_is_the_dense_solution(seed):
    graph, labeled, labels = random_problem(seed)
    heat, iterations = harmonic(graph, labeled, labels, C)
    assert np.allclose(heat, solved(graph, labeled, labels), atol=2e-4)
    assert iterations <= graph.size + 10  # exact arithmetic needs at most one a point


@settings(max_examples=60)
@given(seeds)
def test_reached_rows_sum_to_one_the_others_to_exactly_zero_and_nothing_leaves_0_to_1(seed):
    graph, labeled, labels = random_problem(seed)
    heat, _ = harmonic(graph, labeled, labels, C)
    reached = torch.from_numpy(in_reach(graph, labeled))
    assert torch.allclose(heat[reached].sum(1), torch.ones(int(reached.sum())), atol=2e-4)
    assert (heat[~reached] == 0).all()
    assert heat.min() >= 0
    assert heat.max() <= 1
    assert torch.equal(heat[labeled], torch.nn.functional.one_hot(labels, C).float())
    # The maximum principle: a class that no label has is nowhere, and a single one is everywhere that can be reached.
    absent = [c for c in range(C) if c not in labels.tolist()]
    assert (heat[:, absent] == 0).all()
    if len(labels.unique()) == 1:
        assert (heat[reached].argmax(1) == labels[0]).all()


@settings(max_examples=60)
@given(seeds)
@example(69).via("NaN without a check of the curvature's sign")
@example(670).via("NaN with that check alone")
@example(4892).via("NaN with that check alone")
def test_whatever_the_weights_no_nan_nothing_outside_0_to_1_and_no_label_in_a_component_without_one(seed):
    """Over thirty orders of magnitude the tolerance is met far from the limit, or never: bounded all the same."""
    graph, labeled, labels = random_problem(seed, orders=30)
    heat, iterations = harmonic(graph, labeled, labels, C, max_iterations=200)
    assert ((heat >= 0) & (heat <= 1)).all()
    assert (heat[torch.from_numpy(~in_reach(graph, labeled))] == 0).all()
    assert torch.equal(heat[labeled], torch.nn.functional.one_hot(labels, C).float())
    assert iterations <= 200


@pytest.mark.parametrize("kernel", ["local_scaling", "uniform"])
@pytest.mark.parametrize(
    "features", [cloud(100), torch.cat([cloud(40)[:3].repeat(30, 1), cloud(60)])], ids=["cloud", "piles"]
)
def test_harmonic_is_the_limit_of_the_clamped_iteration(features, kernel):
    graph = transition(knn(features, 8), kernel)
    labeled, labels = torch.tensor([3, 50, 77, 95]), torch.tensor([0, 1, 2, 2])
    heat, iterations = harmonic(graph, labeled, labels, C)
    errors = [float((diffuse(graph, labeled, labels, C, steps) - heat).abs().max()) for steps in (1, 100, 10_000)]
    assert errors[0] > 0.1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert 5 < iterations < 100


def test_the_tolerance_bounds_the_residual_and_the_cap_holds():
    graph = transition(knn(cloud(800), 8))
    labeled, labels = torch.arange(10), torch.arange(10) % C
    m, truth = torch.from_numpy(matrix(graph)), torch.from_numpy(solved(graph, labeled, labels))
    degrees = graph.degrees[graph.nodes, None]

    def dense_residual(heat):
        """Largest share that is left of a class's first residual, in the norm of the degrees."""
        left, first = (m @ u - u for u in (heat.double(), torch.eye(800, dtype=torch.float64)[:10].T @ truth[:10]))
        left[labeled] = first[labeled] = 0
        return float(((degrees * left**2).sum(0) / (degrees * first**2).sum(0)).sqrt().max())

    counts = []
    for tolerance in (1e-1, 1e-3, 1e-5):
        heat, iterations = harmonic(graph, labeled, labels, C, tolerance)
        assert residual(graph, labeled, heat) == pytest.approx(dense_residual(heat), rel=0.2)
        assert dense_residual(heat) < 1.5 * tolerance
        counts.append(iterations)
    assert counts == sorted(set(counts))
    capped, iterations = harmonic(graph, labeled, labels, C, max_iterations=7)
    assert iterations == 7 < counts[-1]
    assert residual(graph, labeled, capped) > 1e-3
    assert harmonic(graph, labeled, labels, C, max_iterations=0)[1] == 0


def test_everything_labeled_or_labels_without_an_edge_need_no_iteration():
    graph = transition(knn(cloud(30), 5))
    labels = torch.arange(30) % C
    heat, iterations = harmonic(graph, torch.arange(30), labels, C)
    assert iterations == 0
    assert torch.equal(heat, torch.nn.functional.one_hot(labels, C).float())
    lonely = from_affinity(sparse.csr_array(np.array([[0, 1.0, 0], [1.0, 0, 0], [0, 0, 0]])), graph_k=1)
    heat, iterations = harmonic(lonely, torch.tensor([2]), torch.tensor([1]), C)
    assert iterations == 0
    assert heat.tolist() == [[0] * C, [0] * C, [0, 1, 0, 0]]


def test_a_label_behind_an_edge_whose_weight_squares_to_0_in_float32_is_not_lost():
    """A clique between two labels, one of them tied to it by e^-70."""
    weights = np.zeros((12, 12))
    weights[:10, :10] = 1 - np.eye(10)
    weights[1, 10] = weights[10, 1] = 1.0
    weights[0, 11] = weights[11, 0] = np.exp(-70)
    graph, labeled, labels = from_affinity(sparse.csr_array(weights), graph_k=9), torch.tensor([10, 11]), [2, 1]
    heat, iterations = harmonic(graph, labeled, torch.tensor(labels), C)
    truth = solved(graph, labeled, labels)
    assert 0 < truth[0, 1] < 1e-29
    assert np.allclose(heat[:10, 1] / truth[:10, 1], 1, rtol=1e-3)
    assert 0 < iterations < 20


def test_where_rounding_would_decide_a_class_stops_and_its_residual_says_so():
    """A clique whose only label is tied to it by e^-80: at the limit 1 everywhere, which float32 cannot know."""
    weights = np.zeros((11, 11))
    weights[:10, :10] = 1 - np.eye(10)
    weights[0, 10] = weights[10, 0] = np.exp(-80)
    graph, labeled = from_affinity(sparse.csr_array(weights), graph_k=9), torch.tensor([10])
    heat, iterations = harmonic(graph, labeled, torch.tensor([2]), C)
    assert iterations < 20
    assert ((heat >= 0) & (heat <= 1)).all()
    assert residual(graph, labeled, heat) > 0.01


def test_a_graph_that_is_not_symmetric_has_no_converged_figures():
    pool, images = cloud(80), cloud(20, seed=1)
    neighbors = knn(pool, 6)
    directed, labeled, labels = transition(neighbors, symmetrize="none"), torch.arange(8), torch.arange(8) % C
    with pytest.raises(ValueError, match=r"graph\.symmetrize=mean or max"):
        harmonic(directed, labeled, labels, C)
    arguments = (attach(neighbors, pool, images), labeled, labels, C, torch.zeros(20, dtype=torch.int64))
    plain = {"accuracy", "unreached"}
    assert propagation_accuracy(directed, *arguments).keys() == plain
    for symmetrize in ("mean", "max"):
        facts = propagation_accuracy(transition(neighbors, symmetrize=symmetrize), *arguments)
        assert facts.keys() == plain | {"converged_accuracy", "converged_unreached", "iterations", "residual"}
        assert facts["residual"] < 2e-5
        assert isinstance(facts["iterations"], int)
        assert facts["iterations"] > 0


def counted(attachment, heat, test_labels):
    """Accuracy and the share of unreached images, by loops in float64."""
    right = unreached = 0
    for ids, weights, label in zip(attachment.ids, attachment.weights, test_labels, strict=True):
        scores = [
            sum(float(w) * float(heat[i, c]) for i, w in zip(ids, weights, strict=True)) for c in range(heat.shape[1])
        ]
        unreached += max(scores) == 0
        right += max(scores) > 0 and scores.index(max(scores)) == int(label)
    return right / len(test_labels), unreached / len(test_labels)


def islands(seed=0):
    """Four clusters on a line, 40 points each, too far apart for an edge; images of all of them. K = 8 gives T = 3."""
    classes = torch.arange(C).repeat_interleave(40)
    pool = cloud(160, seed) + 100.0 * classes[:, None]
    test_labels = torch.arange(C).repeat_interleave(15)
    return pool, classes, cloud(60, seed + 100) + 100.0 * test_labels[:, None], test_labels


@pytest.mark.parametrize("seed", range(3))
def test_propagated_accuracy_is_the_count_by_loops(seed):
    """Two labels in three islands, none in the first, whose images a plain argmax would give to class 0: rightly so."""
    pool, classes, images, test_labels = islands(seed)
    neighbors = knn(pool, 8)
    graph, attachment = transition(neighbors), attach(neighbors, pool, images)
    labeled = torch.tensor([50, 51, 90, 91, 130, 131])
    labels = classes[labeled].clone()
    labels[[1, 3]] = torch.tensor([2, 0])  # of other classes, so that the answer is not always the island's
    facts = propagation_accuracy(graph, attachment, labeled, labels, C, test_labels)
    truths = [diffuse(graph, labeled, labels, C, 3), torch.from_numpy(solved(graph, labeled, labels))]
    for name, heat in zip(("", "converged_"), truths, strict=True):
        accuracy, unreached = counted(attachment, heat, test_labels)
        assert facts[f"{name}accuracy"] == pytest.approx(accuracy)
        assert facts[f"{name}unreached"] == pytest.approx(unreached)
    assert facts["converged_unreached"] == 0.25  # the images of the first island, whatever their class
    assert facts["unreached"] >= 0.25
    assert 0.25 < facts["converged_accuracy"] <= 0.75


def test_a_label_in_every_island_gives_every_image_its_class():
    pool, classes, images, test_labels = islands()
    neighbors = knn(pool, 8)
    labeled = torch.tensor([5, 45, 85, 125])
    arguments = (transition(neighbors), attach(neighbors, pool, images), labeled, classes[labeled], C)
    facts = propagation_accuracy(*arguments, test_labels)
    assert (facts["converged_accuracy"], facts["converged_unreached"]) == (1, 0)
    assert facts["accuracy"] == 1 - facts["unreached"]
    # The true classes decide the count and nothing else.
    assert propagation_accuracy(*arguments, (test_labels + 1) % C) == {**facts, "accuracy": 0, "converged_accuracy": 0}


def test_scores_are_the_weighted_mean_over_the_points_that_an_image_hangs_on():
    heat = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0], [0.25, 0.5, 0.25]])
    attachment = Attachment(
        torch.tensor([[0, 1], [3, 2], [2, 2]]), torch.tensor([[0.75, 0.25], [0.4, 0.6], [0.5, 0.5]])
    )
    expected = torch.tensor([[0.75, 0.25, 0], [0.1, 0.2, 0.1], [0, 0, 0]])
    assert torch.allclose(class_scores(attachment, heat), expected)


def test_propagation_does_not_depend_on_the_order_of_points():
    pool, classes, images, test_labels = islands()
    order = torch.randperm(160, generator=torch.Generator().manual_seed(2))
    labeled = torch.tensor([5, 6, 50, 90, 130])
    facts = []
    for features, places in ((pool, labeled), (pool[order], order.argsort()[labeled])):
        neighbors = knn(features, 8)
        parts = (transition(neighbors), attach(neighbors, features, images))
        facts.append(propagation_accuracy(*parts, places, classes[labeled], C, test_labels))
    assert facts[0] == pytest.approx(facts[1], abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_propagation_on_the_gpu_is_the_cpus():
    pool, images = cloud(4000), cloud(300, seed=1)
    neighbors = knn(pool, 10)
    graph, attachment = transition(neighbors), attach(neighbors, pool, images)
    labeled, labels, test_labels = torch.arange(12), torch.arange(12) % C, torch.arange(300) % C
    on_gpu = graph.to(torch.device("cuda"))
    heat, iterations = harmonic(graph, labeled, labels, C)
    again, count = harmonic(on_gpu, labeled, labels, C)
    assert torch.allclose(again.cpu(), heat, atol=1e-4)
    assert abs(count - iterations) <= 2
    facts = [propagation_accuracy(g, attachment, labeled, labels, C, test_labels) for g in (graph, on_gpu)]
    assert facts[0]["accuracy"] == pytest.approx(facts[1]["accuracy"], abs=0.01)
    assert facts[0]["converged_accuracy"] == pytest.approx(facts[1]["converged_accuracy"], abs=0.01)
