"""Diffusion from round to round: of its T iterates and the scores only the rows that new labels touch are made again.

New labels change row i of iterate t only where they lie within t steps of it. Only those rows are computed, from the
iterate before and to the same bits as by the whole product, which takes over where the rows hold too many edges.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgal_bench.core.types import Index, Labels, TieOrder, refuse_nan, smallest, tied_share
from dgal_bench.graph.diffusion import product, score, step
from dgal_bench.graph.graph import Graph

Name = str | int


class UndoLog:
    """Tensors that each update changes a little, too large to copy for each; the last update can be undone.

    ``begin(version)`` restores the tensors of that version, if it is the last one or the one before; ``end()`` returns
    the number of the new version. A caller with a number gets exactly those tensors or False, any number of times, also
    after an update or a ``begin`` that was interrupted.
    """

    def __init__(self, tensors: Mapping[Name, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._numbers = count()
        self._version: int | None = next(self._numbers)
        self._previous: int | None = None
        self._log: list[tuple[Name, Tensor | None, Tensor]] = []

    def __getitem__(self, name: Name) -> Tensor:
        """To read only, and only until the next ``begin``."""
        return self._tensors[name]

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds, to read only: the present ones, and what undoes the last update."""
        undone = [tensor for _, *some in self._log for tensor in some if tensor is not None]
        return [*self._tensors.values(), *undone]

    def begin(self, version: int) -> bool:
        """Start from that version, 0 at first; False, and nothing is done, where it cannot be restored."""
        if version not in (self._version, self._previous):
            return False
        undo = version != self._version
        self._version = None  # first, so that a half-finished undo is not taken for a version
        if undo:
            self._undo()
        else:
            self._previous = None  # the log no longer leads to it
        self._log = []
        self._previous = version
        return True

    def _undo(self) -> None:
        """Back to the beginning of the log; the log stays, so that an interrupted undo can start again."""
        for name, rows, old in reversed(self._log):
            if rows is None:
                self._tensors[name] = old
            else:
                self._tensors[name].index_copy_(0, rows, old)

    def end(self) -> int:
        self._version = next(self._numbers)
        return self._version

    def write(self, name: Name, rows: Tensor, values: Tensor) -> None:
        """Put values into distinct rows (r,) int64 of a tensor."""
        tensor = self._tensors[name]
        self._log.append((name, rows, tensor.index_select(0, rows)))
        tensor.index_copy_(0, rows, values)

    def replace(self, name: Name, tensor: Tensor) -> None:
        """Put another tensor in the place of one; the caller must not write to it afterwards."""
        self._log.append((name, None, self._tensors[name]))
        self._tensors[name] = tensor

    def forget(self) -> None:
        """Free all memory: no version can be restored any more."""
        self._version = self._previous = None
        self._tensors, self._log = {}, []


class Scratch:
    """A reusable array that removes duplicates from numbers below N."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.places = torch.empty(size, dtype=torch.int32, device=device)

    def distinct(self, numbers: Tensor) -> Tensor:
        """Each number once, in no order: without a sort, and without a pass over all N."""
        places = torch.arange(len(numbers), dtype=torch.int32, device=numbers.device)
        self.places[numbers] = places
        return numbers[self.places[numbers] == places]


# Nodes of a block, which is searched or skipped as a whole by its lowest score.
_BLOCK = 64
# Blocks of which it is counted how many hold the lowest score: a pass over all of ten million points' takes 0.3 ms.
_COUNTED = 8192
# Elements of heat that are scored at once: with the intermediate tensors of a score they stay in the cache.
SCORED = 1 << 17

# Fewest rows that are scored at once: with fewer, torch may sum a row in another order on a GPU (its reductions use the
# idle threads), and a row's bits would depend on how many rows have changed with it.
_ROWS = 16

Score = Callable[[Tensor], Tensor]
"""Heat (n, C) -> (n,), each from its own row alone."""


def score_rows(score: Score, heat_nC: Tensor) -> Tensor:
    """(n,) scores of the rows, in blocks that fit the cache: a row's bits do not depend on the other rows."""
    blocks = heat_nC.split(max(_ROWS, SCORED // heat_nC.shape[1]))
    return torch.cat([score(F.pad(block, (0, 0, 0, max(0, _ROWS - len(block)))))[: len(block)] for block in blocks])


def rank_scores(score: Score, heat_NC: Tensor, labeled: Tensor) -> tuple[Tensor, Tensor]:
    """Scores by node, infinite where labeled and beyond the last node, and the minima of their blocks."""
    beyond = torch.full((-len(heat_NC) % _BLOCK,), torch.inf, device=heat_NC.device)
    scores = torch.cat([score_rows(score, heat_NC), beyond])
    scores[labeled] = torch.inf
    return scores, scores.view(-1, _BLOCK).amin(dim=1)


def ranks_without_heat(score: Score, graph: Graph, n_classes: int) -> dict[Name, Tensor]:
    """``scores`` and ``minima`` where no label is known: the score of an unreached point everywhere."""
    n_blocks = -(-graph.size // _BLOCK)
    unreached = score_rows(score, torch.zeros(1, n_classes, device=graph.device))
    scores = unreached.repeat(n_blocks * _BLOCK)
    scores[graph.size :] = torch.inf
    return {"scores": scores, "minima": unreached.repeat(n_blocks)}


def rank_bytes(size: int) -> int:
    """Of ``scores`` and ``minima`` of so many nodes."""
    return 4 * -(-size // _BLOCK) * (_BLOCK + 1)


def update_ranks(
    score: Score, heat_NC: Tensor, labeled: Tensor, touched: Tensor | None, tensors: UndoLog, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """``scores`` and ``minima`` of ``tensors``, brought up to date for the rows ``touched``, None for all.

    ``touched`` holds the newly labeled nodes too.
    """
    if touched is None:
        for name, tensor in zip(("scores", "minima"), rank_scores(score, heat_NC, labeled), strict=True):
            tensors.replace(name, tensor)
    elif len(touched):
        tensors.write("scores", touched, score_rows(score, heat_NC.index_select(0, touched)))
        tensors["scores"][labeled] = torch.inf
        blocks = scratch.distinct(touched // _BLOCK)
        tensors.write("minima", blocks, tensors["scores"].view(-1, _BLOCK).index_select(0, blocks).amin(dim=1))
    return tensors["scores"], tensors["minima"]


def lowest_scores(
    graph: Graph, scores: Tensor, minima: Tensor, size: int, ties: TieOrder
) -> tuple[Index, Callable[[], float]]:
    """Positions of the ``size`` lowest finite scores by (score, rank), as ``smallest``; and their tied share.

    The block of every point that can be among them has a minimum no larger than the ``size``-th smallest minimum.

    Raises:
        UserError: a score is NaN.
    """
    lowest = minima.min()
    if bool(torch.isnan(lowest)):
        refuse_nan(scores[~torch.isinf(scores)])
    first = _first_tied(graph, scores, minima, lowest, size, ties)
    if first is not None:
        return first, lambda: float(int((scores == lowest).sum()) > size)
    if 0 < size < len(minima):
        near = torch.nonzero(minima <= minima.kthvalue(size).values).flatten()
    else:
        near = torch.arange(len(minima), device=minima.device)
    nodes = (near[:, None] * _BLOCK + torch.arange(_BLOCK, device=near.device)).flatten()
    values = scores.view(-1, _BLOCK).index_select(0, near).flatten().cpu()
    chosen = smallest(values, size, nodes.cpu(), lambda some: ties(graph.points[some.to(graph.device)].cpu()))
    return graph.points[nodes[chosen.to(graph.device)]].cpu(), lambda: tied_share(values, chosen)


def _first_tied(
    graph: Graph, scores: Tensor, minima: Tensor, lowest: Tensor, size: int, ties: TieOrder
) -> Index | None:
    """The first ``size`` positions of the lowest score, by rank; None where so many are not found soon.

    Ranks are tried from the first on: of ten million points, nearly all of them tied, some hundred, where ranking all
    that are tied took 700 ms. At most as many are tried as there may be tied points.
    """
    stride = max(1, len(minima) // _COUNTED)
    most = stride * _BLOCK * int((minima[::stride] == lowest).sum())
    if size == 0 or size * graph.size > most**2:  # the tries that are expected are more than that
        return None
    expected = size * graph.size // most
    found, n_found, step = [torch.empty(0, dtype=torch.int64)], 0, 2 * max(size, expected)
    for start in range(0, min(most, graph.size), step):
        positions = ties.at(torch.arange(start, min(start + step, graph.size)))
        tied = scores[graph.nodes[positions.to(graph.device)]] == lowest
        found.append(positions[tied.cpu()])
        n_found += len(found[-1])
        if n_found >= size:
            return torch.cat(found)[:size]
    return None


@dataclass(frozen=True)
class DiffusionSettings:
    """What a diffusion's state depends on beside the labels: equal settings and labels give equal states."""

    graph: Graph  # compared by identity
    n_classes: int
    steps: int
    score: str
    p: float

    @property
    def score_function(self) -> Score:
        return score(self.score, self.p)

    @property
    def n_bytes(self) -> int:
        """The most that a state, its undo log and an iterate about to be written can take.

        An update may replace every tensor, or write to all rows of it and log their places.
        """
        size, iterate = self.graph.size, 4 * self.graph.size * self.n_classes
        state = (self.steps + 1) * iterate + rank_bytes(size)
        places, scratch = 8 * size * (self.steps + 3), 4 * size
        return 2 * state + places + iterate + 2 * scratch  # a new state has a scratch of its own


@dataclass(frozen=True, eq=False)
class DiffusionState:
    """A version of ``tensors``: the iterates 0..T (N, C), and scores and minima of the last, by node.

    ``labeled`` positions and ``labels`` are those that were diffused.
    """

    settings: DiffusionSettings
    tensors: UndoLog
    scratch: Scratch
    version: int
    labeled: Index
    labels: Labels

    @property
    def n_labeled(self) -> int:
        return len(self.labeled)

    def begin(self, settings: DiffusionSettings, labeled: Index, labels: Labels) -> bool:
        """Begin an update; False where these labels do not extend the state's, or its version cannot be restored."""
        old = slice(self.n_labeled)
        same = torch.equal(self.labeled, labeled[old]) and torch.equal(self.labels, labels[old])
        return self.settings == settings and same and self.tensors.begin(self.version)

    def end(self, labeled: Index, labels: Labels) -> "DiffusionState":
        """The state of these labels, after the update."""
        return replace(self, version=self.tensors.end(), labeled=labeled, labels=labels)


def blank_state(settings: DiffusionSettings) -> DiffusionState:
    """The state of no label at all, with an update begun."""
    graph, shape = settings.graph, (settings.graph.size, settings.n_classes)
    # NumPy's zeros, not torch's: on a CPU the system gives no memory for them before they are written to
    zeros = [torch.from_numpy(np.zeros(shape, dtype=np.float32)).to(graph.device) for _ in range(settings.steps + 1)]
    iterates: dict[Name, Tensor] = dict(enumerate(zeros))
    tensors = UndoLog(iterates | ranks_without_heat(settings.score_function, graph, settings.n_classes))
    tensors.begin(version := 0)
    nothing = torch.empty(0, dtype=torch.int64)
    return DiffusionState(settings, tensors, Scratch(graph.size, graph.device), version, nothing, nothing)


# Share of all edges above which gathering them costs more than the whole product (from 60,000 to a million points).
LARGE = 0.1


def advance(state: DiffusionState, labeled: Tensor, labels: Labels) -> tuple[Tensor | None, float]:
    """Bring the iterates 0..T up to date with the labels that are new since ``state``, in the update begun.

    Args:
        state: of the first of these labels, and no others; on a graph with a symmetric affinity, so that the nodes that
            a node affects are those in its own row.
        labeled: (m,) distinct nodes.
        labels: (m,) their classes.

    Returns:
        The nodes whose row in iterate T may have changed, None for all, and the share of the edges of T whole products
        that were multiplied.
    """
    graph, steps, tensors, n_multiplied = state.settings.graph, state.settings.steps, state.tensors, 0
    seeds_mC = F.one_hot(labels.to(graph.device), state.settings.n_classes).float()
    new = labeled[state.n_labeled :]
    tensors.write(0, new, seeds_mC[state.n_labeled :])
    touched, rows = new, _rows_of(graph, new)
    for t in range(1, steps + 1):
        if rows is not None:
            touched = state.scratch.distinct(torch.cat([new, rows.indices.long()]))
            rows = _rows_of(graph, touched)
        if rows is None:
            after = step(graph, tensors[t - 1])
            after[labeled] = seeds_mC
            tensors.replace(t, after)
        else:
            tensors.write(t, touched, product(rows.indptr, rows.indices, rows.weights, tensors[t - 1]))
            tensors[t][labeled] = seeds_mC
        n_multiplied += len(graph.indices if rows is None else rows.indices)
    return None if rows is None else touched, n_multiplied / max(1, steps * len(graph.indices))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows of M in CSR form."""

    indptr: Tensor
    indices: Tensor
    weights: Tensor


def _rows_of(graph: Graph, nodes: Tensor) -> _Rows | None:
    """The rows of some nodes, or None where they hold too many edges."""
    starts = graph.indptr.index_select(0, nodes)
    counts = graph.indptr.index_select(0, nodes + 1) - starts
    pointers = F.pad(counts.cumsum(0, dtype=starts.dtype), (1, 0))
    n_edges = int(pointers[-1])
    if n_edges > LARGE * len(graph.indices):
        return None
    shifts = torch.repeat_interleave(starts - pointers[:-1], counts, output_size=n_edges)
    edges = shifts + torch.arange(n_edges, dtype=starts.dtype, device=graph.device)
    return _Rows(pointers, graph.indices.index_select(0, edges), graph.weights.index_select(0, edges))
