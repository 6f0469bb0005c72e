"""The parts of a strategy and everything it may see: ``Strategy("dgmg", Diffusion(graph, ...), Margin())``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from dgal_bench.arrays import Index, Outputs
from dgal_bench.clock import Stopwatch
from dgal_bench.data.pool import Pool
from dgal_bench.errors import StrategyError
from dgal_bench.seeding import TieBreak


@dataclass(frozen=True, eq=False)
class Query:
    """What a strategy may see in one round: no true label is in reach of it.

    ``predict`` passes points through the current network, each at most once, on the clock. ``rng`` is this round's own
    stream, ``ties`` the round's order of equal scores. ``note`` leaves a fact for the round's row, as a function that
    is called after the clock has stopped.
    """

    pool: Pool
    predict: Callable[[Index], Outputs]
    images: Tensor  # (N, channels, height, width) uint8: the pool's, without labels
    rng: np.random.Generator
    ties: TieBreak
    clock: Stopwatch
    notes: dict[str, Callable[[], float]] = field(default_factory=dict)

    def note(self, name: str, fact: Callable[[], float]) -> None:
        self.notes[name] = fact


class Restriction(Protocol):
    """Cuts the unlabeled pool down to candidates: ``restrict(query) -> Index``."""

    def __call__(self, query: Query, /) -> Index: ...


class Acquisition(Protocol):
    """Picks the batch from the candidates: ``acquire(query, candidates, batch_size) -> Index`` of exactly that many."""

    def __call__(self, query: Query, candidates: Index, batch_size: int, /) -> Index: ...


@dataclass(frozen=True, eq=False)
class Selection:
    """The positions to label, and the candidates they were picked from."""

    indices: Index
    candidates: Index


@dataclass(frozen=True, eq=False)
class Strategy:
    """A sentence: restrict the pool, then acquire from what is left."""

    name: str
    restrict: Restriction
    acquire: Acquisition

    def select(self, query: Query, batch_size: int) -> Selection:
        with query.clock.phase("select"):
            candidates = self.restrict(query)
        if not isinstance(candidates, Tensor) or len(candidates) < batch_size:
            n = f"{len(candidates)} points" if isinstance(candidates, Tensor) else f"a {type(candidates).__name__}"
            raise StrategyError(
                f"the restriction of the strategy left {n} where a batch of {batch_size} is picked from"
            )
        with query.clock.phase("acquire"):
            batch = self.acquire(query, candidates, batch_size)
        return Selection(batch, candidates)
