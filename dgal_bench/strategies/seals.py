"""SEALS (Coleman et al., 2022): only the nearest neighbours of labeled points are shown to the network (paper 5.3)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dgal_bench.arrays import Features, Index
from dgal_bench.data.pool import Pool
from dgal_bench.graph.knn import Search
from dgal_bench.strategies.base import Query
from dgal_bench.strategies.restrict import at_least_one, drawn

NewIndex = Callable[[Features], Search]


@dataclass(frozen=True, eq=False)
class ModelNeighbors:
    """SEALS: the union of the labeled points' ``seals_k`` nearest pool points under the current network's features.

    The whole pool is embedded and indexed anew in every round, on the clock; the union is never pruned, so that it
    holds at most seals_k points per label. With ``restricted_size`` it is cut uniformly to that many ("matched").
    """

    new_index: NewIndex
    seals_k: int = 100
    restricted_size: int | None = None

    def __post_init__(self) -> None:
        at_least_one("seals_k", self.seals_k)
        at_least_one("restricted_size", self.restricted_size)

    def __call__(self, query: Query) -> Index:
        pool = query.pool
        features = query.predict(torch.arange(pool.size), phase="embed").features
        with query.clock.phase("index"):
            search = self.new_index(features)
        with query.clock.phase("search"):
            near = neighbors_of(pool.labeled, features, search, self.seals_k)
        return drawn(without_labeled(near, pool), self.restricted_size, query.rng)


@dataclass(frozen=True, eq=False)
class GraphNeighbors:
    """VAE-SEALS: the same union in the latents that the graph was built on, each labeled point searched once.

    The paper's Algorithm 3 trains its embedding on the labeled set; 5.3 says "the same VAE latent space as DGMG",
    which is what is done here: ten images cannot train a VAE. Grows by at most seals_k points per label.
    """

    latents: Features
    new_index: NewIndex
    seals_k: int = 100
    restricted_size: int | None = None

    def __post_init__(self) -> None:
        at_least_one("seals_k", self.seals_k)
        at_least_one("restricted_size", self.restricted_size)

    @cached_property
    def _search(self) -> Search:
        """Made once, like the graph: in the rehearsal, off the clock."""
        return self.new_index(self.latents)

    def __call__(self, query: Query) -> Index:
        pool = query.pool
        with query.clock.phase("search"):
            near: Tensor = query.memory.get("near", torch.zeros(pool.size, dtype=torch.bool)).clone()
            new = pool.labeled[query.memory.get("n_searched", 0) :]  # in order of acquisition: the last are new
            near |= neighbors_of(new, self.latents, self._search, self.seals_k)
            query.remember("near", near)
            query.remember("n_searched", len(pool.labeled))
        return drawn(without_labeled(near, pool), self.restricted_size, query.rng)


def neighbors_of(points: Index, features: Features, search: Search, k: int) -> Tensor:
    """(N,) mask of the union of the points' k nearest others in ``features`` (N, d), which ``search`` indexes."""
    found = search(features[points], min(k + 1, len(features)))
    # By id and not by column: among exact duplicates the point itself need not come first, or at all.
    other = (found != points[:, None]) & (found >= 0)
    near = torch.zeros(len(features), dtype=torch.bool)
    near[found[other & (other.cumsum(dim=1) <= k)]] = True
    return near


def without_labeled(near: Tensor, pool: Pool) -> Index:
    """Ascending positions of a mask, without those that are labeled."""
    near[pool.labeled] = False
    return torch.nonzero(near).flatten()
