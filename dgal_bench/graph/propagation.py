"""Accuracy of the graph alone: labels propagated over the pool classify the images attached to it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dgal_bench.core.types import Index, Labels
from dgal_bench.graph.diffusion import diffuse, one_hot, step
from dgal_bench.graph.graph import Attachment, Graph

# Below this curvature the rounding of float32 weights decides a step, which may be infinite.
_RESOLUTION = 1e-7


def propagation_accuracy(
    graph: Graph, attachment: Attachment, labeled: Index, labels: Labels, n_classes: int, test_labels: Labels
) -> dict[str, float]:
    """How well labels propagated over the graph alone classify the images attached to it.

    Args:
        graph: of the pool, with N points.
        attachment: of n test images to that graph.
        labeled: (m,) positions in the pool.
        labels: (m,) their classes.
        n_classes: C, seen or not.
        test_labels: (n,) the true classes, for the final count only.

    Returns:
        ``accuracy`` after the graph's default number of steps, and ``unreached``, the share of test images on whose
        points no label has left any mass: they count as wrong. ``converged_accuracy``, ``converged_unreached``,
        ``iterations`` (an int) and ``residual`` in the limit of infinitely many steps; absent where the affinity is
        asymmetric, since ``harmonic`` is then undefined.
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
    """(n, C) on the CPU: the weighted mean of the propagated labels of the points that each image is attached to."""
    return F.embedding_bag(attachment.ids, heat_NC.cpu(), per_sample_weights=attachment.weights, mode="sum")


def _accuracies(scores_nC: Tensor, test_labels: Labels) -> tuple[float, float]:
    """Accuracy, the unreached counted as wrong, and their share."""
    reached = (scores_nC > 0).any(dim=1)
    right = (scores_nC.argmax(dim=1) == test_labels) & reached
    return float(right.double().mean()), float((~reached).double().mean())


def harmonic(
    graph: Graph, labeled: Index, labels: Labels, n_classes: int, tolerance: float = 1e-5, max_iterations: int = 1000
) -> tuple[Tensor, int]:
    """The limit of ``diffuse`` for infinitely many steps: (I - M_uu) u = M_ul y on the points that a label can reach.

    A component without a label stays exactly 0. Points connected to the rest only by weights near the tolerance may not
    reach their limit, and a class stops where rounding would decide its next step: see ``residual``.

    Args:
        graph: with a symmetric affinity.
        labeled, labels, n_classes: as for ``diffuse``.
        tolerance: each class stops when its residual is at most this share of its first one.
        max_iterations: all classes stop here; the answer has then not converged.

    Returns:
        U (N, C) float32 on the graph's device, in [0, 1], and the number of iterations.

    Raises:
        ValueError: the affinity is not symmetric.
    """
    if not graph.symmetric:
        raise ValueError("conjugate gradients need a symmetric affinity: graph.symmetrize=mean or max")
    labeled = graph.nodes[labeled]
    heat_NC = one_hot(graph, labeled, labels, n_classes)
    residual_NC = _zero_labeled(labeled, step(graph, heat_NC))
    direction_NC = residual_NC.clone()
    squared_C = _inner(graph, residual_NC, residual_NC)
    goal_C = tolerance**2 * squared_C
    iterations = 0
    while iterations < max_iterations and bool((squared_C > goal_C).any()):
        change_NC = direction_NC - _zero_labeled(labeled, step(graph, direction_NC))
        curvature_C = _inner(graph, direction_NC, change_NC)
        goal_C = torch.where(curvature_C > _RESOLUTION * squared_C, goal_C, torch.inf)
        open_C = squared_C > goal_C
        size_C = _ratio(squared_C, curvature_C, open_C)
        heat_NC += size_C * direction_NC
        residual_NC -= size_C * change_NC
        before_C, squared_C = squared_C, torch.where(open_C, _inner(graph, residual_NC, residual_NC), squared_C)
        direction_NC = residual_NC + _ratio(squared_C, before_C, open_C) * direction_NC
        iterations += 1
    return heat_NC.clamp_(0, 1)[graph.nodes], iterations


def residual(graph: Graph, labeled: Index, heat_NC: Tensor) -> float:
    """How far U (N, C) is from the limit: its residual as a share of that of the seeds, the largest over classes.

    In the norm of the degrees. Rounding alone leaves about 1e-5: 4e-5 on MNIST with ten labels.
    """
    labeled, heat_NC = graph.nodes[labeled], heat_NC[graph.points]
    seeds_NC = torch.zeros_like(heat_NC)
    seeds_NC[labeled] = heat_NC[labeled]
    first_NC = _zero_labeled(labeled, step(graph, seeds_NC))
    residual_NC = _zero_labeled(labeled, step(graph, heat_NC) - heat_NC)
    first_C = _inner(graph, first_NC, first_NC)
    return float((_inner(graph, residual_NC, residual_NC) / torch.where(first_C > 0, first_C, 1.0)).sqrt().max())


def _zero_labeled(labeled: Tensor, values_NC: Tensor) -> Tensor:
    """Set the labeled rows to 0, in place; returns the tensor."""
    values_NC[labeled] = 0
    return values_NC


def _inner(graph: Graph, x_NC: Tensor, y_NC: Tensor) -> Tensor:
    """(C,) inner products weighted by the degrees, in which I - M_uu is its own adjoint.

    Plain conjugate gradients in it are those on D - W_uu with D as preconditioner. float64, because the square of a
    label on weak edges is 0 in float32.
    """
    # All else is float32. On MNIST's 60,000 points (K = 20, ten classes, VAE or PCA, 10 or 110 labels, one thread) that
    # is 86 to 115 iterations and 0.7 to 1 s, at most 4e-6 from a float64 solution to 1e-12 and with the same class at
    # every point. float64 throughout takes as many iterations and 2.2 to 2.9 s.
    return (graph.degrees[:, None] * x_NC * y_NC).sum(dim=0)


def _ratio(above_C: Tensor, below_C: Tensor, open_C: Tensor) -> Tensor:
    """above / below as float32 where the column is still open, else 0."""
    return torch.where(open_C, above_C / torch.where(open_C, below_C, 1.0), 0.0).float()
