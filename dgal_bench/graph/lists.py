"""Approximate search in the order of the lists: what one list is compared with is one matrix, so all of it a product.

An inverted file (k-means) is usually asked query by query, each of which reads the lists nearest to it. Here all points
of a list are compared with the lists nearest to their common centroid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dgal_bench.arrays import Features, Index
from dgal_bench.graph.exact import nearest_in
from dgal_bench.graph.rerank import merged
from dgal_bench.threads import workers

# Numbers of the points that a list is compared with, held at once (16 MB): more of them are taken in parts.
_ELEMENTS = 2**22
# Points of one list that are compared at once.
_QUERIES = 4096


@dataclass(frozen=True, eq=False)
class Lists:
    """N points in L lists: ``order`` (N,) positions, list by list and ascending in each, ``offsets`` (L + 1,) into it.

    The points of list i are compared with those of ``probed`` (L, P), row i: itself first, then by the distance of
    ``centroids`` (L, d). ``recall`` is what was expected of P when it was chosen.
    """

    order: Index
    offsets: Tensor
    probed: Tensor
    centroids: Features
    recall: float

    @property
    def n_lists(self) -> int:
        return len(self.centroids)

    @cached_property
    def sizes(self) -> Tensor:
        """(L,) points of each list."""
        return self.offsets.diff()

    @cached_property
    def pairs(self) -> int:
        """How often two points are compared."""
        return int((self.sizes * self.sizes[self.probed].sum(1)).sum())

    def rows(self, lists: Tensor) -> Index:
        """The places in ``order`` of the points in ``lists``, list after list."""
        sizes = self.sizes[lists]
        starts = self.offsets[lists] - sizes.cumsum(0) + sizes
        return torch.arange(int(sizes.sum())) + starts.repeat_interleave(sizes)

    @property
    def n_probes(self) -> int:
        return self.probed.shape[1]


def search_lists(plan: Lists, sorted_features: Features, first: int, last: int, k: int) -> tuple[Index, Tensor, Tensor]:
    """Positions (m,) of the points in lists first..last - 1, their k nearest others (m, k), and the distances (m, k).

    Every list is answered by itself and on one thread: how lists are grouped, and how many threads there are, changes
    no bit. ``sorted_features`` are all points in the plan's order; they may be on disk, where only what the lists need
    is read.

    Raises:
        ValueError: fewer than k + 1 points altogether.
    """
    if not 1 <= k < len(plan.order):
        raise ValueError(f"{k} neighbours, but {len(plan.order)} points have 1 to {len(plan.order) - 1} each")
    with workers() as each:
        found = each(lambda number: _one_list(plan, sorted_features, number, k), range(first, last))
    positions = plan.order[int(plan.offsets[first]) : int(plan.offsets[last])]
    ids, distances = (torch.cat(part) for part in zip(*found, strict=True))
    return positions, ids, distances


def _one_list(plan: Lists, sorted_features: Features, number: int, k: int) -> tuple[Tensor, Tensor]:
    rows, union = plan.rows(torch.tensor([number])), _union(plan, number, k)
    parts = union.split(max(1, _ELEMENTS // sorted_features.shape[1]))
    answers = [_nearest(plan, sorted_features, some, parts, k) for some in rows.split(_QUERIES)]
    return torch.cat([ids for ids, _ in answers]), torch.cat([distances for _, distances in answers])


def _union(plan: Lists, number: int, k: int) -> Index:
    """The rows that a list is compared with, ordered by position: those of its lists, of more if they have too few."""
    lists = plan.probed[number]
    if int(plan.sizes[lists].sum()) <= k:
        nearest = by_distance(plan.centroids, torch.tensor([number]))[0]
        lists = nearest[: int((plan.sizes[nearest].cumsum(0) <= k).sum()) + 1]
    rows = plan.rows(lists)
    return rows[plan.order[rows].argsort()]


def _nearest(
    plan: Lists, sorted_features: Features, rows: Index, parts: Sequence[Index], k: int
) -> tuple[Tensor, Tensor]:
    answers = (_compare(sorted_features, rows, part, k) for part in parts)
    found = ((torch.where(near < 0, near, plan.order[near]), distances) for near, distances in answers)
    best = next(found)
    for other in found:  # merged as they come: all of them are many times what is kept
        ids, distances = (torch.cat(both, 1) for both in zip(best, other, strict=True))
        best = merged(ids, distances, k)
    return best


def _compare(sorted_features: Features, rows: Index, union: Index, k: int) -> tuple[Tensor, Tensor]:
    """Of the rows ``union`` the k nearest to each of ``rows``, or all but itself, -1 for none; (m, at most k) each."""
    device = sorted_features.device
    rows, union = rows.to(device), union.to(device)
    queries, base = sorted_features[rows].float(), sorted_features[union].float()
    by_row = union.sort()
    own = torch.searchsorted(by_row.values, rows).clamp(max=len(union) - 1)
    own = torch.where(by_row.values[own] == rows, by_row.indices[own], -1)
    # Centred where they are, the products of the expansion are as small as they can be.
    near, distances = nearest_in(base, queries, own, k, queries.mean(0))
    return torch.where(near < 0, near, union[near]).cpu(), distances.cpu()


def by_distance(centroids: Features, numbers: Index) -> Tensor:
    """(m, L) all lists in the order of their centroids' distance from those of the lists ``numbers``: itself first."""
    distances = torch.cdist(centroids[numbers].double(), centroids.double())
    return distances.scatter_(1, numbers[:, None], -1).argsort(dim=1, stable=True)
