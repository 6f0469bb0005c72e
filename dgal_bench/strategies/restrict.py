"""Restrictions: which unlabeled points the network is asked about."""

from dataclasses import dataclass

import numpy as np
import torch

from dgal_bench.arrays import Index, smallest, tied_share
from dgal_bench.errors import ConfigError
from dgal_bench.graph.diffusion import diffuse, score
from dgal_bench.graph.transition import Graph
from dgal_bench.strategies.base import Query


def at_least_one(name: str, value: float | None) -> None:
    """Raises ConfigError for a setting below 1."""
    if value is not None and value < 1:
        raise ConfigError(f"{name}={value} is too small: use 1 or more")


def drawn(points: Index, size: int | None, rng: np.random.Generator) -> Index:
    """``size`` of the points, uniformly without replacement; all of them where there are no more, or it is None."""
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
    """``restricted_size`` unlabeled points drawn uniformly: what any cleverer restriction must beat (RSMG)."""

    restricted_size: int

    def __post_init__(self) -> None:
        at_least_one("restricted_size", self.restricted_size)

    def __call__(self, query: Query) -> Index:
        return drawn(query.pool.unlabeled, self.restricted_size, query.rng)


@dataclass(frozen=True, eq=False)
class Diffusion:
    """DGAL (paper, Alg. 2): the ``restricted_size`` unlabeled points most uncertain under the diffused labels.

    ``diffusion_steps`` T is ceil(log_K N) unless given; ``score`` is one of graph.diffusion's (eq. 9, App. C), and
    ``p`` the norm of ``ova_norm``.
    """

    graph: Graph
    restricted_size: int
    diffusion_steps: int | None = None
    score: str = "ova_min"
    p: float = 2.0

    def __post_init__(self) -> None:
        at_least_one("restricted_size", self.restricted_size)
        at_least_one("diffusion_steps", self.diffusion_steps)
        at_least_one("p", self.p)
        score(self.score)

    def __call__(self, query: Query) -> Index:
        pool = query.pool
        steps = self.graph.default_steps if self.diffusion_steps is None else self.diffusion_steps
        with query.clock.phase("diffuse"):
            heat_NC = diffuse(self.graph, pool.labeled, pool.labels, pool.n_classes, steps)
        unlabeled = pool.unlabeled
        scores = score(self.score, self.p)(heat_NC).cpu()[unlabeled]
        chosen = smallest(scores, min(self.restricted_size, len(unlabeled)), unlabeled, query.ties)
        query.note("ties", lambda: tied_share(scores, chosen))
        return unlabeled[chosen]
