"""The points of lowest score among many: scored in blocks of rows, and found by the lowest score of each block."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgal_bench.core.types import Index, Labels, TieKeys, refuse_nan, smallest, tied_share
from dgal_bench.graph.diffusion import product, score, step
from dgal_bench.graph.graph import Graph

# Tensors that are written in place from turn to turn, with the way back out of the last turn.


Name = str | int


class UndoLog:
    """Tensors that each turn changes a little, too large to be copied for that.

    A turn is known by its number. ``begin(turn)`` brings the tensors to what they were when that turn had ended, if it
    is the last one or the one before; ``end()`` names the new one. So whoever holds a number gets those very tensors
    or learns that they are gone, however often it is used, and also after a turn or a ``begin`` that was broken off.
    """

    def __init__(self, tensors: Mapping[Name, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._numbers = count()
        self._now: int | None = next(self._numbers)
        self._before: int | None = None
        self._log: list[tuple[Name, Tensor | None, Tensor]] = []

    def __getitem__(self, name: Name) -> Tensor:
        """To be read, and not beyond the turn."""
        return self._tensors[name]

    def begin(self, turn: int) -> bool:
        """Start from the end of that turn, 0 at first; False, and nothing is done, where no way leads back to it."""
        if turn not in (self._now, self._before):
            return False
        back = turn != self._now
        self._now = None  # first, so that half a way back is not taken for the end of a turn
        if back:
            self._undo()
        else:
            self._before = None  # the log leads from here to there no more
        self._log = []
        self._before = turn
        return True

    def _undo(self) -> None:
        """To the beginning of the log, from wherever it leads; it stays, so that this can be done again from midway."""
        for name, rows, old in reversed(self._log):
            if rows is None:
                self._tensors[name] = old
            else:
                self._tensors[name].index_copy_(0, rows, old)

    def end(self) -> int:
        self._now = next(self._numbers)
        return self._now

    def write(self, name: Name, rows: Tensor, values: Tensor) -> None:
        """Put values into distinct rows (r,) int64 of a tensor."""
        tensor = self._tensors[name]
        self._log.append((name, rows, tensor.index_select(0, rows)))
        tensor.index_copy_(0, rows, values)

    def replace(self, name: Name, tensor: Tensor) -> None:
        """Put another tensor in the place of one; it is the journal's from now on."""
        self._log.append((name, None, self._tensors[name]))
        self._tensors[name] = tensor

    def forget(self) -> None:
        """Give all memory back: every turn is gone, for whoever holds its number."""
        self._now = self._before = None
        self._tensors, self._log = {}, []


class Scratch:
    """An array that finds the distinct ones of many of N numbers."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._places = torch.empty(size, dtype=torch.int32, device=device)

    def distinct(self, numbers: Tensor) -> Tensor:
        """Each once, in no order: without a sort, and without a look at all N."""
        mine = torch.arange(len(numbers), dtype=torch.int32, device=numbers.device)
        self._places[numbers] = mine
        return numbers[self._places[numbers] == mine]


# Nodes of a block that is looked into or passed over as a whole.
_BLOCK = 64
# Elements of heat that are scored at once: with what a score makes on its way they stay in the cache.
_SCORED = 1 << 17

# Rows that are scored at once at least: on a GPU, with fewer, torch may sum a row in another order (its reductions
# spread over the threads that rows would have had), and a row's bits would depend on how many have changed with it.
_ROWS = 16

Score = Callable[[Tensor], Tensor]
"""Heat (n, C) -> (n,), each from its own row alone."""


def score_rows(score: Score, heat_nC: Tensor) -> Tensor:
    """(n,) scores of the rows, a cacheful at a time: the same bits whatever rows they are among."""
    blocks = heat_nC.split(max(_ROWS, _SCORED // heat_nC.shape[1]))
    return torch.cat([score(F.pad(block, (0, 0, 0, max(0, _ROWS - len(block)))))[: len(block)] for block in blocks])


def rank_scores(score: Score, heat_NC: Tensor, labeled: Tensor) -> tuple[Tensor, Tensor]:
    """Scores by node, infinite where labeled and beyond the last node, and the minima of their blocks."""
    beyond = torch.full((-len(heat_NC) % _BLOCK,), torch.inf, device=heat_NC.device)
    scores = torch.cat([score_rows(score, heat_NC), beyond])
    scores[labeled] = torch.inf
    return scores, scores.view(-1, _BLOCK).amin(dim=1)


def ranks_without_heat(score: Score, graph: Graph, n_classes: int) -> dict[Name, Tensor]:
    """The journal's ``scores`` and ``minima`` where no label is known: the score of an unreached point everywhere."""
    n_blocks = -(-graph.size // _BLOCK)
    unreached = score_rows(score, torch.zeros(1, n_classes, device=graph.device))
    scores = unreached.repeat(n_blocks * _BLOCK)
    scores[graph.size :] = torch.inf
    return {"scores": scores, "minima": unreached.repeat(n_blocks)}


def rank_bytes(size: int) -> int:
    """Of ``scores`` and ``minima`` of so many nodes."""
    return 4 * -(-size // _BLOCK) * (_BLOCK + 1)


def rank_again(
    score: Score, heat_NC: Tensor, labeled: Tensor, touched: Tensor | None, journal: UndoLog, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """The journal's ``scores`` and ``minima``, up to date where only the rows ``touched`` have changed, None for all.

    What is newly labeled is among them.
    """
    if touched is None:
        for name, tensor in zip(("scores", "minima"), rank_scores(score, heat_NC, labeled), strict=True):
            journal.replace(name, tensor)
    elif len(touched):
        journal.write("scores", touched, score_rows(score, heat_NC.index_select(0, touched)))
        journal["scores"][labeled] = torch.inf
        blocks = scratch.distinct(touched // _BLOCK)
        journal.write("minima", blocks, journal["scores"].view(-1, _BLOCK).index_select(0, blocks).amin(dim=1))
    return journal["scores"], journal["minima"]


def lowest_scores(
    graph: Graph, scores: Tensor, minima: Tensor, size: int, ties: TieKeys
) -> tuple[Index, Callable[[], float]]:
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


# What a diffusion keeps from round to round: iterates and scores, at the end of a turn that later ones write over.


@dataclass(frozen=True)
class DiffusionSettings:
    """What a diffusion's state follows from beside the labels; equal where the state of one is that of the other."""

    graph: Graph  # the object: another one of the same content is another graph
    n_classes: int
    steps: int
    score: str
    p: float

    @property
    def measure(self) -> Score:
        return score(self.score, self.p)

    @property
    def n_bytes(self) -> int:
        """The most that a state, the way back out of a turn and an iterate about to be written can take.

        A turn may replace every tensor, or write to each of its rows and note which those were.
        """
        size, iterate = self.graph.size, 4 * self.graph.size * self.n_classes
        state = (self.steps + 1) * iterate + rank_bytes(size)
        places, scratch = 8 * size * (self.steps + 3), 4 * size
        return 2 * state + places + iterate + 2 * scratch  # a state that is begun anew has a scratch of its own


@dataclass(frozen=True, eq=False)
class DiffusionState:
    """``journal`` holds the iterates 0..T (N, C) and the ranks by the last, by node, and ``turn`` is when it did so.

    ``labeled`` positions and ``labels`` are those that had been diffused.
    """

    course: DiffusionSettings
    journal: UndoLog
    scratch: Scratch
    turn: int
    labeled: Index
    labels: Labels

    @property
    def n_labeled(self) -> int:
        return len(self.labeled)

    def goes_on(self, course: DiffusionSettings, labeled: Index, labels: Labels) -> bool:
        """Begin a turn, if these labels are the kept ones and more, and the kept state is not written over for good."""
        old = slice(self.n_labeled)
        same = torch.equal(self.labeled, labeled[old]) and torch.equal(self.labels, labels[old])
        return self.course == course and same and self.journal.begin(self.turn)

    def ended(self, labeled: Index, labels: Labels) -> "DiffusionState":
        """The state of these labels, which the turn has brought about."""
        return replace(self, turn=self.journal.end(), labeled=labeled, labels=labels)


def blank_state(course: DiffusionSettings) -> DiffusionState:
    """A turn begun on no label at all."""
    graph, shape = course.graph, (course.graph.size, course.n_classes)
    # numpy's zeros and not torch's: on a CPU the system gives no memory for them before they are written to
    zeros = [torch.from_numpy(np.zeros(shape, dtype=np.float32)).to(graph.device) for _ in range(course.steps + 1)]
    iterates: dict[Name, Tensor] = dict(enumerate(zeros))
    journal = UndoLog(iterates | ranks_without_heat(course.measure, graph, course.n_classes))
    journal.begin(turn := 0)
    nothing = torch.empty(0, dtype=torch.int64)
    return DiffusionState(course, journal, Scratch(graph.size, graph.device), turn, nothing, nothing)


# Diffusion that goes on from round to round: of its T iterates only the rows that new labels touch are made again.
# New labels change row i of iterate t only where they lie within t steps of it. Those rows alone are computed, from
# the iterate before and to the same bits as by the whole product, which takes over where they hold too many edges.


# Share of all edges above which gathering them costs more than the whole product (from 60,000 to a million points).
_LARGE = 0.1


def advance(kept: DiffusionState, labeled: Tensor, labels: Labels) -> tuple[Tensor | None, float]:
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
