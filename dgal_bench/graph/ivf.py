"""Approximate nearest neighbours by an inverted file (k-means): lists, with as few probes as the recall target needs.

An inverted file usually answers query by query, and each query reads the lists nearest to it. Here all points of a list
are compared with the lists nearest to their common centroid, so that the comparison is one matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log2, sqrt

import torch
from torch import Tensor

from dgal_bench.config.schema import check_recall_target
from dgal_bench.core.seeding import torch_rng_for
from dgal_bench.core.system import Workers, workers
from dgal_bench.core.types import Features, Index
from dgal_bench.graph.exact_knn import closest, distance_table, exact, merge_rankings, nearest_in

# Numbers of the points that a list is compared with at once: 16 MB.
_ELEMENTS = 2**22
# Points of one list that are compared at once.
_QUERIES = 4096


@dataclass(frozen=True, eq=False)
class InvertedLists:
    """N points in L lists: ``order`` (N,) positions, list by list and ascending in each, ``offsets`` (L + 1,) into it.

    The points of list i are compared with those of the lists in row i of ``probed`` (L, P): list i first, then by the
    distance of ``centroids`` (L, d). ``recall`` is the one expected of P probes.
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
        """How many pairs of points are compared."""
        return int((self.sizes * self.sizes[self.probed].sum(1)).sum())

    def rows(self, lists: Tensor) -> Index:
        """The places in ``order`` of the points in ``lists``, list after list."""
        sizes = self.sizes[lists]
        starts = self.offsets[lists] - sizes.cumsum(0) + sizes
        return torch.arange(int(sizes.sum())) + starts.repeat_interleave(sizes)

    @property
    def n_probes(self) -> int:
        return self.probed.shape[1]


def search_lists(
    plan: InvertedLists, sorted_features: Features, first: int, last: int, k: int
) -> tuple[Index, Tensor, Tensor]:
    """Positions (m,) of the points in lists first..last - 1, their k nearest others (m, k), and the distances (m, k).

    Every list is answered separately and on one thread: neither the grouping of lists nor the number of threads changes
    a bit. ``sorted_features`` are all points in the plan's order; they may be memory-mapped, only the rows needed are
    read.

    Raises:
        ValueError: fewer than k + 1 points altogether.
    """
    if not 1 <= k < len(plan.order):
        raise ValueError(f"{k} neighbours, but {len(plan.order)} points have 1 to {len(plan.order) - 1} each")
    with workers() as each:
        answers = each(lambda number: _search_list(plan, sorted_features, number, k), range(first, last))
    positions = plan.order[int(plan.offsets[first]) : int(plan.offsets[last])]
    ids, distances = (torch.cat(part) for part in zip(*answers, strict=True))
    return positions, ids, distances


def _search_list(plan: InvertedLists, sorted_features: Features, number: int, k: int) -> tuple[Tensor, Tensor]:
    rows, union = plan.rows(torch.tensor([number])), _probed_rows(plan, number, k)
    parts = union.split(max(1, _ELEMENTS // sorted_features.shape[1]))
    answers = [_nearest(plan, sorted_features, some, parts, k) for some in rows.split(_QUERIES)]
    return torch.cat([ids for ids, _ in answers]), torch.cat([distances for _, distances in answers])


def _probed_rows(plan: InvertedLists, number: int, k: int) -> Index:
    """The rows that a list is compared with, by position: those of its probes, of more lists if these are too few."""
    lists = plan.probed[number]
    if int(plan.sizes[lists].sum()) <= k:
        nearest = by_distance(plan.centroids, torch.tensor([number]))[0]
        lists = nearest[: int((plan.sizes[nearest].cumsum(0) <= k).sum()) + 1]
    rows = plan.rows(lists)
    return rows[plan.order[rows].argsort()]


def _nearest(
    plan: InvertedLists, sorted_features: Features, rows: Index, parts: Sequence[Index], k: int
) -> tuple[Tensor, Tensor]:
    answers = (_compare(sorted_features, rows, part, k) for part in parts)
    rankings = ((torch.where(near < 0, near, plan.order[near]), distances) for near, distances in answers)
    best = next(rankings)
    for other in rankings:  # merged one by one: all of them would take many times the memory
        ids, distances = (torch.cat(both, 1) for both in zip(best, other, strict=True))
        best = merge_rankings(ids, distances, k)
    return best


def _compare(sorted_features: Features, rows: Index, union: Index, k: int) -> tuple[Tensor, Tensor]:
    """Of the rows ``union`` the k nearest to each of ``rows``, or all but itself, -1 for none; (m, at most k) each."""
    device = sorted_features.device
    rows, union = rows.to(device), union.to(device)
    queries, base = sorted_features[rows].float(), sorted_features[union].float()
    by_row = union.sort()
    own = torch.searchsorted(by_row.values, rows).clamp(max=len(union) - 1)
    own = torch.where(by_row.values[own] == rows, by_row.indices[own], -1)
    # Centred at the queries, so that the products of the expansion are as small as possible.
    near, distances = nearest_in(base, queries, own, k, queries.mean(0))
    return torch.where(near < 0, near, union[near]).cpu(), distances.cpu()


def by_distance(centroids: Features, numbers: Index) -> Tensor:
    """(m, L) all lists by the distance of their centroids from that of each list in ``numbers``: that list first."""
    distances = torch.cdist(centroids[numbers].double(), centroids.double())
    return distances.scatter_(1, numbers[:, None], -1).argsort(dim=1, stable=True)


# Points per list that k-means is trained on, and its rounds.
_TRAINING_POINTS = 32
_ROUNDS = 6
# Points whose true neighbours decide the number of probes.
_SAMPLE = 500
# Standard errors by which the sample's recall must exceed the target.
_MARGIN = 2.0
# Average comparisons per point above which more lists are tried: selecting among fewer saves no time.
_ENOUGH = 4096
# Lists whose distances from all lists are in memory at once.
_ROWS = 1024
# Numbers that are read and centred at once: 4 MB.
_BLOCK = 2**20


def plan_lists(features: Features, k: int, recall_target: float = 0.99) -> InvertedLists:
    """Lists of about a thousand points, or four times as many lists where those need too many comparisons.

    With the fewest probes whose recall on a sample exceeds the target by a margin; without such a number all lists are
    probed. ``features`` (N, d) may be memory-mapped: samples and blocks of them are read, and they are not copied.

    Raises:
        ConfigError: a target outside (0, 1].
    """
    check_recall_target(recall_target)
    size = len(features)
    sample = _draw(size, _SAMPLE, "graph sample")
    with workers() as each:
        neighbors, _ = exact(features, sample, k, each)
        plan = _plan(features, _coarse(size), sample, neighbors, recall_target, each)
        n_lists = min(size, 4 * plan.n_lists)
        if plan.pairs <= max(_ENOUGH, n_lists) * size:  # assigning points compares each with n_lists centroids
            return plan
        finer = _plan(features, n_lists, sample, neighbors, recall_target, each)
    return min(plan, finer, key=lambda lists: lists.pairs)


def _coarse(size: int) -> int:
    """A power of 2: lists of about a thousand points, but between sqrt(N) / 4 and sqrt(N) of them."""
    root = sqrt(size)
    return int(2 ** round(log2(max(1.0, root / 4, min(root, size / 1000)))))


def _plan(
    features: Features, n_lists: int, sample: Index, neighbors: Index, recall_target: float, each: Workers
) -> InvertedLists:
    centroids = train(features, n_lists, each)
    owner = assign(features, centroids, each)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), owner.bincount(minlength=n_lists).cumsum(0)])
    n_probes, recall = fewest_probes(recall_by_probes(centroids, owner[sample], owner[neighbors]), recall_target)
    # cloned: a view would keep the distances' order of all lists
    probed = [by_distance(centroids, some)[:, :n_probes].clone() for some in torch.arange(n_lists).split(_ROWS)]
    return InvertedLists(owner.argsort(stable=True), offsets, torch.cat(probed), centroids, recall)


def recall_by_probes(centroids: Features, own: Tensor, theirs: Tensor) -> Tensor:
    """(S, L) share of each sampled point's true neighbours that 1..L probes find.

    ``own`` (S,) is the list of each point, ``theirs`` (S, K) those of its neighbours: P probes find a neighbour whose
    list is among the P nearest to the point's own.
    """
    rank = by_distance(centroids, own).argsort(dim=1).gather(1, theirs)
    shares = torch.full(rank.shape, 1 / theirs.shape[1], dtype=torch.float64)
    recalls = torch.zeros(len(own), len(centroids), dtype=torch.float64).scatter_add_(1, rank, shares)
    return recalls.cumsum(1)


def fewest_probes(recalls: Tensor, target: float) -> tuple[int, float]:
    """The fewest probes whose mean recall exceeds the target by the margin, else all; and that recall."""
    mean, error = recalls.mean(0), recalls.std(0, correction=0) / len(recalls) ** 0.5
    enough = mean - _MARGIN * error >= target - 1e-9  # shares of 1/K add up to 1 but for rounding
    n_probes = int(enough.int().argmax()) + 1 if bool(enough.any()) else recalls.shape[1]
    return n_probes, min(1.0, float(mean[n_probes - 1]))


def train(features: Features, n_lists: int, each: Workers) -> Features:
    """(L, d) centroids by Lloyd's rounds on a sample, from random points of it; an empty list gets another such point.

    Assignment is by block and the sums are in order, so that the number of threads changes nothing.
    """
    sample = features[_draw(len(features), _TRAINING_POINTS * n_lists, "graph lists")].float()
    centre = sample.mean(0)
    sample -= centre
    generator = torch_rng_for(0, "graph centroids")
    centroids = sample[torch.randperm(len(sample), generator=generator)[:n_lists]]
    for _ in range(_ROUNDS):
        owner = assign(sample, centroids, each)
        counts = owner.bincount(minlength=n_lists)
        sums = torch.zeros_like(centroids).index_add_(0, owner, sample)
        spare = sample[torch.randint(len(sample), (n_lists,), generator=generator)]
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None], spare)
    return centroids + centre


def assign(features: Features, centroids: Features, each: Workers) -> Tensor:
    """(N,) the nearest centroid of each point."""
    centre = centroids.mean(0)
    columns = distance_table(centroids - centre)
    rows = max(1, _BLOCK // features.shape[1])

    def nearest(start: int) -> Tensor:
        return closest(features[start : start + rows].float() - centre, columns)

    return torch.cat(each(nearest, range(0, len(features), rows)))


def _draw(size: int, most: int, role: str) -> Index:
    return torch.randperm(size, generator=torch_rng_for(0, role))[:most].sort().values
