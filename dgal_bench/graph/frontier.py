"""Diffusion that goes on from round to round: of its T iterates only the rows that new labels touch are made again.

New labels change row i of iterate t only where they lie within t steps of it. Those rows alone are computed, from the
iterate before and to the same bits as by the whole product, which takes over where they hold too many edges.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dgal_bench.arrays import Labels
from dgal_bench.graph.diffusion import product, step
from dgal_bench.graph.kept import Kept
from dgal_bench.graph.transition import Graph

# Share of all edges above which gathering them costs more than the whole product (from 60,000 to a million points).
_LARGE = 0.1


def advance(kept: Kept, labeled: Tensor, labels: Labels) -> tuple[Tensor | None, float]:
    """Bring the iterates 0..T of the journal up to date with labels that are new since ``kept``, in the turn begun.

    Args:
        kept: of the first of these labels, and no others; on a graph with a symmetric affinity, so that who hears of a
            node is whom it hears of.
        labeled: (m,) distinct nodes.
        labels: (m,) their classes.

    Returns:
        The nodes whose row in iterate T may have changed, None for all, and the share of the edges of T whole products
        that were multiplied.
    """
    graph, steps, journal, n_multiplied = kept.course.graph, kept.course.steps, kept.journal, 0
    seeds_mC = F.one_hot(labels.to(graph.device), kept.course.n_classes).float()
    new = labeled[kept.n_labeled :]
    journal.write(0, new, seeds_mC[kept.n_labeled :])
    touched, part = new, _part(graph, new)
    for t in range(1, steps + 1):
        if part is not None:
            touched = kept.scratch.distinct(torch.cat([new, part.indices.long()]))
            part = _part(graph, touched)
        if part is None:
            after = step(graph, journal[t - 1])
            after[labeled] = seeds_mC
            journal.replace(t, after)
        else:
            journal.write(t, touched, product(part.indptr, part.indices, part.weights, journal[t - 1]))
            journal[t][labeled] = seeds_mC
        n_multiplied += len(graph.indices if part is None else part.indices)
    return None if part is None else touched, n_multiplied / max(1, steps * len(graph.indices))


@dataclass(frozen=True, eq=False)
class _Part:
    """Some rows of M in CSR form."""

    indptr: Tensor
    indices: Tensor
    weights: Tensor


def _part(graph: Graph, nodes: Tensor) -> _Part | None:
    """The rows of some nodes, or None where they hold too many edges."""
    starts = graph.indptr.index_select(0, nodes)
    counts = graph.indptr.index_select(0, nodes + 1) - starts
    pointers = F.pad(counts.cumsum(0, dtype=starts.dtype), (1, 0))
    n_edges = int(pointers[-1])
    if n_edges > _LARGE * len(graph.indices):
        return None
    shifts = torch.repeat_interleave(starts - pointers[:-1], counts, output_size=n_edges)
    edges = shifts + torch.arange(n_edges, dtype=starts.dtype, device=graph.device)
    return _Part(pointers, graph.indices.index_select(0, edges), graph.weights.index_select(0, edges))
