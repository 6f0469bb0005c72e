"""Restrictions: the unlabeled points that the network scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgal_bench.core.errors import ConfigError, choose
from dgal_bench.core.types import Index, TieOrder
from dgal_bench.graph.diffusion import clamped_diffusion, score
from dgal_bench.graph.graph import Graph
from dgal_bench.graph.incremental import (
    DiffusionSettings,
    DiffusionState,
    advance,
    blank_state,
    lowest_scores,
    rank_scores,
    update_ranks,
)
from dgal_bench.strategies.base import Query


class PositionOrder:
    """Each position is its own rank, as in a stable sort."""

    def __call__(self, ids: Index) -> Tensor:
        return ids

    at = __call__


TIE_BREAKS: Mapping[str, Callable[[TieOrder], TieOrder]] = {
    "hash": lambda ties: ties,
    "position": lambda _: PositionOrder(),
}
"""The order of equal scores: the round's seeded permutation, or the position in the data set."""


def at_least_one(name: str, value: float | None) -> None:
    """Raises ConfigError for a setting below 1."""
    if value is not None and value < 1:
        raise ConfigError(f"{name}={value} is too small: use 1 or more")


def draw_uniform(points: Index, size: int | None, rng: np.random.Generator) -> Index:
    """``size`` of the points, uniformly without replacement; all where there are fewer, or ``size`` is None."""
    if size is None:
        return points
    return points[torch.from_numpy(rng.choice(len(points), min(size, len(points)), replace=False))]


@dataclass(frozen=True)
class Everything:
    """The whole unlabeled pool."""

    def __call__(self, query: Query) -> Index:
        return query.pool.unlabeled


@dataclass(frozen=True)
class Uniform:
    """``restricted_size`` unlabeled points drawn uniformly: the baseline for every other restriction (RSMG)."""

    restricted_size: int

    def __post_init__(self) -> None:
        at_least_one("restricted_size", self.restricted_size)

    def __call__(self, query: Query) -> Index:
        return draw_uniform(query.pool.unlabeled, self.restricted_size, query.rng)


@dataclass(frozen=True, eq=False)
class Diffusion:
    """DGAL (paper, Alg. 2): the ``restricted_size`` unlabeled points most uncertain under the diffused labels.

    ``diffusion_steps`` T is ceil(log_K N) unless given; ``score`` is one of graph.diffusion's (eq. 9, App. C), and
    ``p`` the norm of ``ova_norm``; ``tie_break`` is one of TIE_BREAKS. Where T + 1 iterates of N x C and an undo log,
    at most as large again, fit into ``memory_limit`` bytes, they are remembered, and the next round computes only what
    its new labels touch; else every round computes all, to the same picks.
    """

    graph: Graph
    restricted_size: int
    diffusion_steps: int | None = None
    score: str = "ova_min"
    p: float = 2.0
    tie_break: str = "hash"
    memory_limit: int = 8 << 30

    def __post_init__(self) -> None:
        at_least_one("restricted_size", self.restricted_size)
        at_least_one("diffusion_steps", self.diffusion_steps)
        at_least_one("p", self.p)
        if self.memory_limit < 0:
            raise ConfigError(f"memory_limit={self.memory_limit} is too small: use 0 (nothing is remembered) or more")
        score(self.score)
        choose(TIE_BREAKS, self.tie_break, "tie_break")

    def __call__(self, query: Query) -> Index:
        pool, graph = query.pool, self.graph
        settings = DiffusionSettings(graph, pool.n_classes, self._steps, self.score, self.p)
        with query.clock.phase("diffuse"):
            labeled, state, touched, share = graph.nodes[pool.labeled], self._begin(query, settings), None, 1.0
            if state is None:
                heat_NC = clamped_diffusion(graph, labeled, pool.labels, pool.n_classes, settings.steps)
            else:
                touched, share = advance(state, labeled, pool.labels)
                heat_NC = state.tensors[settings.steps]
        if state is None:
            ranks = rank_scores(settings.score_function, heat_NC, labeled)
        else:
            ranks = update_ranks(settings.score_function, heat_NC, labeled, touched, state.tensors, state.scratch)
            query.remember("diffusion", state.end(pool.labeled, pool.labels))
        size = min(self.restricted_size, pool.size - len(labeled))
        candidates, tied = lowest_scores(graph, *ranks, size, TIE_BREAKS[self.tie_break](query.ties))
        query.note("ties", tied)
        query.note("touched", lambda: share)
        return candidates

    @property
    def _steps(self) -> int:
        return self.graph.default_steps if self.diffusion_steps is None else self.diffusion_steps

    def _begin(self, query: Query, settings: DiffusionSettings) -> DiffusionState | None:
        """The state to update: the last round's if possible, else a blank one; None where nothing is remembered."""
        if not self.graph.symmetric or settings.n_bytes > self.memory_limit:
            return None
        state: DiffusionState | None = query.memory.get("diffusion")
        if state is not None:
            if state.begin(settings, query.pool.labeled, query.pool.labels):
                return state
            state.tensors.forget()  # the caller still refers to it, and two states would exceed the limit
        return blank_state(settings)
