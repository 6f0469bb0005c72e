"""A strategy, ``Strategy("dgmg", Diffusion(graph, ...), Margin())``, its parts, and the ``Query`` that they may see."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.errors import StrategyError
from dgal_bench.core.seeding import TieBreak
from dgal_bench.core.types import Index, Outputs
from dgal_bench.data.pool import Pool


class Predict(Protocol):
    """Passes points through the current network, each at most once, on the clock's ``phase``."""

    def __call__(self, indices: Index, phase: str = "infer") -> Outputs: ...


@dataclass(frozen=True, eq=False)
class Query:
    """What a strategy may see in one round; no label of an unlabeled point is among it.

    ``rng`` is this round's own stream, ``ties`` the round's order of equal scores. ``memory`` holds what the previous
    round's query of this run remembered: nothing in the first round, and after a resume what a rehearsal of that round
    remembers. In a ``rehearsal``, before the first timed query of a process, the network is untrained and answers for
    two batches only, and long work may be cut short.
    """

    pool: Pool
    predict: Predict
    images: Tensor  # (N, channels, height, width) uint8: the pool's, without labels
    rng: np.random.Generator
    ties: TieBreak
    clock: Stopwatch
    maximum: int = 255  # the pixel value that means white
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    memory: Mapping[str, Any] = field(default_factory=dict)
    rehearsal: bool = False
    notes: dict[str, Callable[[], float]] = field(default_factory=dict)
    remembered: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, fact: Callable[[], float]) -> None:
        """Add a fact to the round's row; the function is called after the clock has stopped."""
        self.notes[name] = fact

    def remember(self, name: str, value: Any) -> None:
        """Put into the next round's ``memory`` what saves time there; picks must be the same without it.

        It must depend on the pool and the set-up alone, never on the network: a rehearsal has no trained one.
        """
        self.remembered[name] = value


class Restriction(Protocol):
    """Cuts the unlabeled pool down to candidates: ``restrict(query) -> Index``."""

    def __call__(self, query: Query, /) -> Index: ...


class Acquisition(Protocol):
    """Picks the batch from the candidates: ``acquire(query, candidates, batch_size) -> Index`` of exactly that size."""

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
        """The batch; fewer candidates than that are topped up uniformly, and the row says so.

        Raises:
            StrategyError: the candidates are no tensor, or too few and not distinct unlabeled positions. All other
                checks of batch and candidates are the loop's, off the clock.
        """
        with query.clock.phase("select"):
            candidates = self.restrict(query)
            if not isinstance(candidates, Tensor):
                raise StrategyError(
                    f"the restriction of the strategy returned a {type(candidates).__name__}, "
                    "not a flat int64 tensor of positions"
                )
            if len(candidates) < batch_size:
                candidates = _top_up(query, candidates, batch_size)
        with query.clock.phase("acquire"):
            batch = self.acquire(query, candidates, batch_size)
        return Selection(batch, candidates)


def _top_up(query: Query, candidates: Index, size: int) -> Index:
    """``size`` points: the candidates, and other unlabeled points drawn uniformly."""
    n_missing = size - len(candidates)
    query.pool.check(candidates, len(candidates), "left")
    others = query.pool.unlabeled
    others = others[~torch.isin(others, candidates)]
    query.note("topped_up", lambda: n_missing)
    return torch.cat([candidates, others[torch.from_numpy(query.rng.choice(len(others), n_missing, replace=False))]])
