"""The points of lowest score among many: scored in blocks of rows, and found by the lowest score of each block."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dgal_bench.arrays import Index, TieKeys, refuse_nan, smallest, tied_share
from dgal_bench.graph.journal import Journal, Name, Scratch
from dgal_bench.graph.transition import Graph

# Nodes of a block that is looked into or passed over as a whole.
_BLOCK = 64
# Elements of heat that are scored at once: with what a score makes on its way they stay in the cache.
_SCORED = 1 << 17

# Rows that are scored at once at least: on a GPU, with fewer, torch may sum a row in another order (its reductions
# spread over the threads that rows would have had), and a row's bits would depend on how many have changed with it.
_ROWS = 16

Score = Callable[[Tensor], Tensor]
"""Heat (n, C) -> (n,), each from its own row alone."""


def scored(score: Score, heat_nC: Tensor) -> Tensor:
    """(n,) scores of the rows, a cacheful at a time: the same bits whatever rows they are among."""
    blocks = heat_nC.split(max(_ROWS, _SCORED // heat_nC.shape[1]))
    return torch.cat([score(F.pad(block, (0, 0, 0, max(0, _ROWS - len(block)))))[: len(block)] for block in blocks])


def ranked(score: Score, heat_NC: Tensor, labeled: Tensor) -> tuple[Tensor, Tensor]:
    """Scores by node, infinite where labeled and beyond the last node, and the minima of their blocks."""
    beyond = torch.full((-len(heat_NC) % _BLOCK,), torch.inf, device=heat_NC.device)
    scores = torch.cat([scored(score, heat_NC), beyond])
    scores[labeled] = torch.inf
    return scores, scores.view(-1, _BLOCK).amin(dim=1)


def ranks_without_heat(score: Score, graph: Graph, n_classes: int) -> dict[Name, Tensor]:
    """The journal's ``scores`` and ``minima`` where no label is known: the score of an unreached point everywhere."""
    n_blocks = -(-graph.size // _BLOCK)
    unreached = scored(score, torch.zeros(1, n_classes, device=graph.device))
    scores = unreached.repeat(n_blocks * _BLOCK)
    scores[graph.size :] = torch.inf
    return {"scores": scores, "minima": unreached.repeat(n_blocks)}


def rank_bytes(size: int) -> int:
    """Of ``scores`` and ``minima`` of so many nodes."""
    return 4 * -(-size // _BLOCK) * (_BLOCK + 1)


def rank_again(
    score: Score, heat_NC: Tensor, labeled: Tensor, touched: Tensor | None, journal: Journal, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """The journal's ``scores`` and ``minima``, up to date where only the rows ``touched`` have changed, None for all.

    What is newly labeled is among them.
    """
    if touched is None:
        for name, tensor in zip(("scores", "minima"), ranked(score, heat_NC, labeled), strict=True):
            journal.replace(name, tensor)
    elif len(touched):
        journal.write("scores", touched, scored(score, heat_NC.index_select(0, touched)))
        journal["scores"][labeled] = torch.inf
        blocks = scratch.distinct(touched // _BLOCK)
        journal.write("minima", blocks, journal["scores"].view(-1, _BLOCK).index_select(0, blocks).amin(dim=1))
    return journal["scores"], journal["minima"]


def lowest(graph: Graph, scores: Tensor, minima: Tensor, size: int, ties: TieKeys) -> tuple[Index, Callable[[], float]]:
    """Positions of the ``size`` lowest scores by (score, tie key), as ``smallest``; and their tied share.

    No more than there are finite ones. The block of every point that can be among them has a minimum no larger than
    the ``size``-th smallest minimum.

    Raises:
        UserError: a score is NaN.
    """
    if bool(torch.isnan(minima).any()):
        refuse_nan(scores[~torch.isinf(scores)])
    if 0 < size < len(minima):
        near = torch.nonzero(minima <= minima.kthvalue(size).values).flatten()
    else:
        near = torch.arange(len(minima), device=minima.device)
    nodes = (near[:, None] * _BLOCK + torch.arange(_BLOCK, device=near.device)).flatten()
    values = scores.view(-1, _BLOCK).index_select(0, near).flatten().cpu()
    chosen = smallest(values, size, nodes.cpu(), lambda some: ties(graph.points[some.to(graph.device)].cpu()))
    return graph.points[nodes[chosen.to(graph.device)]].cpu(), lambda: tied_share(values, chosen)
