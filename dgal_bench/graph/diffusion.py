"""Label diffusion over the graph, and the uncertainty scores read off it (paper eqs. 7-9, App. C). Pure functions.

One propagation serves every variant. With one-hot seeds, labeled rows clamped before each step and everything else
starting at 0, let U (N, C) be the result after T steps and h = sum_c U_c the mass that has reached a label. Then
eq. 8's matrix is chi = 2U - h 1^T, and App. C's multivariate diffusion is P = U + (1 - h) / C.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dgal_bench.core.errors import choose
from dgal_bench.core.types import Index, Labels, margins
from dgal_bench.graph.graph import Graph

# Largest product, in elements, that is made as a whole: glibc keeps up to 32 MB of freed memory for the next one.
WHOLE = 7 << 20
# Elements of a block of a larger product.
BLOCK = 1 << 20


def step(graph: Graph, values: Tensor, spare: Tensor | None = None) -> Tensor:
    """M @ values for (N, C) float32 values by node: the same bits for any number of threads.

    ``spare``: (N, C) to overwrite with the answer, which saves its memory.
    """
    # A million clustered rows of ten classes, two threads: 33 ms into reused memory. Fresh memory for the whole
    # answer may take the system 100 ms more; a block reuses that of the last block.
    if values.numel() <= WHOLE:
        return product(graph.indptr, graph.indices, graph.weights, values)
    n_rows = max(1, BLOCK // values.shape[1])
    answer = torch.empty_like(values) if spare is None else spare
    for rows, part in zip(answer.split(n_rows), graph.blocks(n_rows), strict=True):
        rows.copy_(product(*part, values))
    return answer


def product(indptr: Tensor, indices: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """(r, C): rows in CSR form, of M or some of its, times values (N, C) by node.

    A row's bits depend on that row alone: not on the other rows, nor on the number of threads.
    """
    # Bags of CSR rows and not torch's CSR product, which takes 40 ms where a step takes 33 (139 in the natural order of
    # rows, and bags 126). On a GPU each bag is summed in order too; cuSPARSE may split a row depending on others.
    return F.embedding_bag(indices, values, indptr, per_sample_weights=weights, mode="sum", include_last_offset=True)


def clamped_diffusion(graph: Graph, labeled: Tensor, labels: Labels, n_classes: int, steps: int) -> Tensor:
    """U (N, C) by node: one-hot labels of ``labeled`` (m,) nodes after T steps of ``U <- M U``, reset after each."""
    values = one_hot(graph, labeled, labels, n_classes)
    seeds, spare = values[labeled], torch.empty_like(values)
    for _ in range(steps):
        values, spare = step(graph, values, spare), values
        values[labeled] = seeds
    return values


def one_hot(graph: Graph, labeled: Tensor, labels: Labels, n_classes: int) -> Tensor:
    """(N, C) by node: where the diffusion starts; ``labeled`` (m,) nodes."""
    start = torch.zeros(graph.size, n_classes, device=graph.device)
    start[labeled, labels.to(graph.device)] = 1.0
    return start


def diffuse(graph: Graph, labeled: Index, labels: Labels, n_classes: int, steps: int) -> Tensor:
    """U (N, C) by position: one-hot labels diffused for T steps. Entries in [0, 1], rows sum to at most 1."""
    nodes = graph.nodes[labeled]
    return clamped_diffusion(graph, nodes, labels, n_classes, steps)[graph.nodes]


def reach_share(graph: Graph, labeled: Index, steps: int) -> float:
    """Share of all points with h > 0: those that a label reaches within T steps."""
    nodes = graph.nodes[labeled]
    return float((clamped_diffusion(graph, nodes, torch.zeros_like(labeled), 1, steps) > 0).float().mean())


def mass(heat_NC: Tensor) -> Tensor:
    """h (N, 1): the mass that has reached a label."""
    return heat_NC.sum(dim=1, keepdim=True)


def one_vs_all(heat_NC: Tensor) -> Tensor:
    """chi = 2U - h (eq. 8): one signal in [-1, 1] per class."""
    return 2 * heat_NC - mass(heat_NC)


def multivariate(heat_NC: Tensor) -> Tensor:
    """P = U + (1 - h) / C (App. C): a distribution over the classes, 1/C where no label has reached."""
    return heat_NC + (1 - mass(heat_NC)) / heat_NC.shape[1]


def ova_min(heat_NC: Tensor) -> Tensor:
    """min_c |chi_c| (eq. 9). It sees two-class boundaries only, and while h is small it ranks by reach."""
    return one_vs_all(heat_NC).abs_().amin(dim=1)


def ova_norm(heat_NC: Tensor, p: float) -> Tensor:
    """The p-norm of chi (App. C)."""
    norms: Tensor = torch.linalg.vector_norm(one_vs_all(heat_NC), ord=p, dim=1)
    return norms


def confidence(heat_NC: Tensor) -> Tensor:
    """max_c P_c (App. C, "uncertainty")."""
    return multivariate(heat_NC).amax(dim=1)


def margin(heat_NC: Tensor) -> Tensor:
    """The difference of the two largest P_c (App. C)."""
    if heat_NC.shape[1] == 1:
        return multivariate(heat_NC)[:, 0]
    return margins(multivariate(heat_NC))


def negentropy(heat_NC: Tensor) -> Tensor:
    """sum_c P_c log P_c (App. C)."""
    entropy: Tensor = torch.special.entr(multivariate(heat_NC).clamp_(min=0)).sum(dim=1)
    return -entropy


def normalised(heat_NC: Tensor) -> Tensor:
    """min_c |2 p_c - 1| with p = U / h; points that no label has reached come first (-1)."""
    h = mass(heat_NC)
    scores = (2 * heat_NC / h.clamp(min=torch.finfo(h.dtype).tiny) - 1).abs_().amin(dim=1)
    return torch.where(h[:, 0] > 0, scores, torch.full_like(scores, -1.0))


def score(name: str, p: float = 2.0) -> Callable[[Tensor], Tensor]:
    """The score called ``name``: heat (N, C) -> (N,), small = query it. ``p`` is the norm of ``ova_norm``."""
    scores: dict[str, Callable[[Tensor], Tensor]] = {
        "ova_min": ova_min,
        "ova_norm": lambda heat_NC: ova_norm(heat_NC, p),
        "confidence": confidence,
        "margin": margin,
        "negentropy": negentropy,
        "normalised": normalised,
    }
    return choose(scores, name, "score")
