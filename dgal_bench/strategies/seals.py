"""SEALS (Coleman et al., 2022): the network scores only the nearest neighbours of labeled points (paper 5.3)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dgal_bench.core.types import Features, Index
from dgal_bench.data.pool import Pool
from dgal_bench.graph.exact_knn import nearest_others, search_width
from dgal_bench.graph.knn import SearchIndex
from dgal_bench.strategies.base import Query
from dgal_bench.strategies.restrict import at_least_one, draw_uniform

# Labeled points whose neighbours are ranked at a time: about 100 neighbours each.
_POINTS = 1000


class NewIndex(Protocol):
    """A nearest-neighbour index over features (N, d): exact up to ``exact_limit`` points (a setting by default)."""

    def __call__(self, base: Features, *, exact_limit: int = ...) -> SearchIndex: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class _Neighbors:
    """``seals_k`` neighbours of each labeled point, their union cut to ``restricted_size`` if that is given."""

    new_index: NewIndex
    seals_k: int = 100
    restricted_size: int | None = None

    def __post_init__(self) -> None:
        at_least_one("seals_k", self.seals_k)
        at_least_one("restricted_size", self.restricted_size)


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelNeighbors(_Neighbors):
    """SEALS: the union of the labeled points' ``seals_k`` nearest pool points under the current network's features.

    Every round embeds and indexes the whole pool, on the clock; the union is never pruned, so that it holds at most
    seals_k points per label. With ``restricted_size`` it is cut uniformly to that many ("matched").
    """

    def __call__(self, query: Query) -> Index:
        pool = query.pool
        features = query.predict(torch.arange(pool.size), phase="embed").features
        with query.clock.phase("index"):
            features = features - features.mean(dim=0)  # as for the graph: distances keep more digits
            # Exact at any size: an inverted file would cost more to train than it saves for so few searches.
            search = self.new_index(features, exact_limit=pool.size)
        with query.clock.phase("search"):
            near = neighbor_mask(pool.labeled, features, search, self.seals_k)
        return draw_uniform(without_labeled(near, pool), self.restricted_size, query.rng)


@dataclass(frozen=True, eq=False, kw_only=True)
class GraphNeighbors(_Neighbors):
    """VAE-SEALS: the same union in the features that the graph was built on; each labeled point is searched once.

    The paper's Algorithm 3 trains its embedding on the labeled set; 5.3 says "the same VAE latent space as DGMG",
    as here: ten images cannot train a VAE. The union grows by at most seals_k points per label.
    """

    features: Features

    @cached_property
    def _indexed(self) -> tuple[Features, SearchIndex]:
        """Made once, like the graph: in the rehearsal, off the clock."""
        centred = self.features - self.features.mean(dim=0)
        return centred, self.new_index(centred)

    def __call__(self, query: Query) -> Index:
        pool = query.pool
        with query.clock.phase("search"):
            near: Tensor = query.memory.get("near", torch.zeros(pool.size, dtype=torch.bool))
            new = pool.labeled[query.memory.get("n_searched", 0) :]  # labeled is in order of acquisition
            near = near | neighbor_mask(new, *self._indexed, self.seals_k)
            query.remember("near", near)
            query.remember("n_searched", len(pool.labeled))
        return draw_uniform(without_labeled(near, pool), self.restricted_size, query.rng)


def neighbor_mask(points: Index, features: Features, search: SearchIndex, k: int) -> Tensor:
    """(N,) mask of the union of the points' k nearest others in ``features`` (N, d), which ``search`` indexes."""
    size = len(features)
    k = min(k, size - 1)
    near = torch.zeros(size, dtype=torch.bool)
    for block in points.split(_POINTS):
        ids, distances = nearest_others(features, block, search(features[block], search_width(k, size)), k)
        near[ids[torch.isfinite(distances)]] = True
    return near


def without_labeled(near: Tensor, pool: Pool) -> Index:
    """Ascending positions of a mask, without the labeled ones."""
    candidates = near.clone()
    candidates[pool.labeled] = False
    return torch.nonzero(candidates).flatten()
