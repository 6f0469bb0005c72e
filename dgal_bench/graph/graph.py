"""The transition matrix M = D^-1 W of the random walk (paper 4.1, eq. 2), and images outside it attached to it."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, log

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Graph:
    """The transition matrix M in CSR form: row i holds ``indices[indptr[i]:indptr[i+1]]`` with ``weights``.

    Rows and columns are *nodes*, an order in which neighbours are near each other in memory; node i is the point at
    position ``points[i]`` (N,) int64 of the pool, and position p is node ``nodes[p]``. float32 weights that sum to 1
    in every row that has any, a row's entries by ascending position; int32 nodes where they fit. ``degrees`` (N,)
    float64 are the row sums D of the affinity W = D M; ``symmetric`` says whether W equals its transpose.
    """

    indptr: Tensor
    indices: Tensor
    weights: Tensor
    degrees: Tensor
    points: Tensor
    graph_k: int
    symmetric: bool

    @property
    def size(self) -> int:
        return len(self.indptr) - 1

    @cached_property
    def nodes(self) -> Tensor:
        """(N,) int64: position -> node."""
        return torch.empty_like(self.points).scatter_(0, self.points, torch.arange(self.size, device=self.device))

    def blocks(self, n_rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(indptr, indices, weights) of successive blocks of ``n_rows`` rows; cut once."""
        if n_rows not in self._cuts:
            firsts = range(0, self.size, n_rows)
            self._cuts[n_rows] = [self._rows(self.indptr[first : first + n_rows + 1]) for first in firsts]
        return self._cuts[n_rows]

    @cached_property
    def _cuts(self) -> dict[int, list[tuple[Tensor, Tensor, Tensor]]]:
        return {}

    def _rows(self, pointers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        edges = slice(int(pointers[0]), int(pointers[-1]))
        return pointers - pointers[0], self.indices[edges], self.weights[edges]

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def default_steps(self) -> int:
        """T = ceil(log_K N): a walk that covers most of the graph (paper, App. B); K = 1 counts as 2."""
        return max(1, ceil(log(self.size) / log(max(2, self.graph_k)) - 1e-12))

    def to(self, device: torch.device) -> "Graph":
        if device == self.device:
            return self
        return replace(self, **{name: getattr(self, name).to(device) for name in GRAPH_ARRAYS})

    def neighbors(self, point: int) -> Tensor:
        """int64 positions that share an edge out of ``point``, ascending."""
        node = int(self.nodes[point])
        return self.points[self.indices[self.indptr[node] : self.indptr[node + 1]].long()]


GRAPH_ARRAYS = ("indptr", "indices", "weights", "degrees", "points")


@dataclass(frozen=True, eq=False)
class Attachment:
    """n images outside the graph, attached to it: ``ids`` (n, K) int64 are the points of the pool nearest to each.

    ``weights`` (n, K) float32 are the kernel's, normalised to sum to 1 in every row.
    """

    ids: Tensor
    weights: Tensor
