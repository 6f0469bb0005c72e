"""What the graph knows by itself: labels propagated over the pool, read off by images that hang on it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dgal_bench.core.types import Index, Labels
from dgal_bench.graph.diffusion import diffuse, one_hot, step
from dgal_bench.graph.graph import Attachment, Graph

# The curvature below which the rounding of float32 weights decides a step, and may send it to infinity.
_RESOLUTION = 1e-7


def propagation_accuracy(
    graph: Graph, attachment: Attachment, labeled: Index, labels: Labels, n_classes: int, test_labels: Labels
) -> dict[str, float]:
    """How well labels propagated over the graph alone classify the images that hang on it.

    Args:
        graph: of the pool, with N points.
        attachment: of n test images to that graph.
        labeled: (m,) positions in the pool.
        labels: (m,) their classes.
        n_classes: C, seen or not.
        test_labels: (n,) the true classes; only the final count looks at them.

    Returns:
        ``accuracy`` after the graph's default number of steps, and ``unreached``, the share of test images on whose
        points no label has left any mass: they count as wrong. ``converged_accuracy``, ``converged_unreached``,
        ``iterations`` (an int) and ``residual`` for the limit of ever more steps; absent where the affinity is not
        symmetric, since ``harmonic`` has no answer there.
    """
    heat_NC = diffuse(graph, labeled, labels, n_classes, graph.default_steps)
    accuracy, unreached = _accuracies(class_scores(attachment, heat_NC), test_labels)
    facts: dict[str, float] = {"accuracy": accuracy, "unreached": unreached}
    if graph.symmetric:
        heat_NC, iterations = harmonic(graph, labeled, labels, n_classes)
        accuracy, unreached = _accuracies(class_scores(attachment, heat_NC), test_labels)
        facts |= {"converged_accuracy": accuracy, "converged_unreached": unreached, "iterations": iterations}
        facts["residual"] = residual(graph, labeled, heat_NC)
    return facts


def class_scores(attachment: Attachment, heat_NC: Tensor) -> Tensor:
    """(n, C) on the CPU: the weighted mean of the propagated labels of the points that each image hangs on."""
    return F.embedding_bag(attachment.ids, heat_NC.cpu(), per_sample_weights=attachment.weights, mode="sum")


def _accuracies(scores_nC: Tensor, test_labels: Labels) -> tuple[float, float]:
    """Accuracy, the unreached counted as wrong, and their share."""
    reached = (scores_nC > 0).any(dim=1)
    right = (scores_nC.argmax(dim=1) == test_labels) & reached
    return float(right.double().mean()), float((~reached).double().mean())


def harmonic(
    graph: Graph, labeled: Index, labels: Labels, n_classes: int, tolerance: float = 1e-5, max_iterations: int = 1000
) -> tuple[Tensor, int]:
    """The limit of ``diffuse`` for ever more steps: (I - M_uu) u = M_ul y on the points that a label can reach.

    A component without a label stays 0, exactly. Points that hang on the rest by edges of weights near the tolerance
    may stay short of their limit, and a class stops where rounding would decide its next step: see ``residual``.

    Args:
        graph: with a symmetric affinity.
        labeled, labels, n_classes: as for ``diffuse``.
        tolerance: each class stops when its residual is at most this share of its first one.
        max_iterations: all classes stop here; the answer is then unfinished.

    Returns:
        U (N, C) float32 on the graph's device, in [0, 1], and the iterations that it took.

    Raises:
        ValueError: the affinity is not symmetric.
    """
    if not graph.symmetric:
        raise ValueError("conjugate gradients need a symmetric affinity: graph.symmetrize=mean or max")
    labeled = graph.nodes[labeled]
    heat_NC = one_hot(graph, labeled, labels, n_classes)
    rest_NC = _off(labeled, step(graph, heat_NC))
    direction_NC = rest_NC.clone()
    left_C = _inner(graph, rest_NC, rest_NC)
    goal_C = tolerance**2 * left_C
    iterations = 0
    while iterations < max_iterations and bool((left_C > goal_C).any()):
        change_NC = direction_NC - _off(labeled, step(graph, direction_NC))
        curvature_C = _inner(graph, direction_NC, change_NC)
        goal_C = torch.where(curvature_C > _RESOLUTION * left_C, goal_C, torch.inf)
        open_C = left_C > goal_C
        size_C = _ratio(left_C, curvature_C, open_C)
        heat_NC += size_C * direction_NC
        rest_NC -= size_C * change_NC
        before_C, left_C = left_C, torch.where(open_C, _inner(graph, rest_NC, rest_NC), left_C)
        direction_NC = rest_NC + _ratio(left_C, before_C, open_C) * direction_NC
        iterations += 1
    return heat_NC.clamp_(0, 1)[graph.nodes], iterations


def residual(graph: Graph, labeled: Index, heat_NC: Tensor) -> float:
    """How far U (N, C) is from the limit: the largest share, over classes, that is left of the residual of the seeds.

    In the norm of the degrees. Rounding alone leaves some 1e-5: 4e-5 on MNIST with ten labels.
    """
    labeled, heat_NC = graph.nodes[labeled], heat_NC[graph.points]
    seeds_NC = torch.zeros_like(heat_NC)
    seeds_NC[labeled] = heat_NC[labeled]
    first_NC, rest_NC = _off(labeled, step(graph, seeds_NC)), _off(labeled, step(graph, heat_NC) - heat_NC)
    first_C = _inner(graph, first_NC, first_NC)
    return float((_inner(graph, rest_NC, rest_NC) / torch.where(first_C > 0, first_C, 1.0)).sqrt().max())


def _off(labeled: Tensor, values_NC: Tensor) -> Tensor:
    """The same tensor with its labeled rows at 0."""
    values_NC[labeled] = 0
    return values_NC


def _inner(graph: Graph, left_NC: Tensor, right_NC: Tensor) -> Tensor:
    """(C,) inner products weighted by the degrees, in which I - M_uu is its own adjoint.

    Plain conjugate gradients in it are those on D - W_uu with D as preconditioner. float64, since a label that hangs
    on weak edges squares to 0 in float32.
    """
    # All else is float32. On MNIST's 60,000 points (K = 20, ten classes, VAE or PCA, 10 or 110 labels, one thread) that
    # is 86 to 115 iterations and 0.7 to 1 s, at most 4e-6 from a float64 solution to 1e-12 and with its winning class
    # at every point. float64 throughout takes as many iterations and 2.2 to 2.9 s.
    return (graph.degrees[:, None] * left_NC * right_NC).sum(dim=0)


def _ratio(above_C: Tensor, below_C: Tensor, open_C: Tensor) -> Tensor:
    """above / below as float32 where the column is still open, else 0."""
    return torch.where(open_C, above_C / torch.where(open_C, below_C, 1.0), 0.0).float()
