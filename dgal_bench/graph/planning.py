"""How to search approximately: lists by k-means, and as few of them compared as reach the recall that is asked for."""

from math import log2, sqrt

import torch
from torch import Tensor

from dgal_bench.arrays import Features, Index
from dgal_bench.checks import check_recall_target
from dgal_bench.graph.exact import exact
from dgal_bench.graph.lists import Lists, by_distance
from dgal_bench.graph.tiles import closest, table
from dgal_bench.seeding import torch_rng_for
from dgal_bench.threads import Workers, workers

# Points per list that k-means is trained on, and its rounds.
_TRAINED_ON = 32
_ROUNDS = 6
# Points whose true neighbours say how many lists must be compared.
_SAMPLE = 500
# Standard errors of the sample's recall by which it must lie above the target.
_MARGIN = 2.0
# Points that one may be compared with, on average, before more lists are tried: selecting among fewer gains nothing.
_ENOUGH = 4096
# Lists whose distances from all are held at once.
_ROWS = 1024
# Numbers that are read and centred at once: 4 MB.
_BLOCK = 2**20


def plan_lists(features: Features, k: int, recall_target: float = 0.99) -> Lists:
    """Lists of about a thousand points, or four times as many where those must be compared with too many others.

    With the fewest probes whose recall on a sample is sure to reach the target; where none does, all lists are probed.
    ``features`` (N, d) may lie on disk: samples and blocks of them are read, and they are not copied.

    Raises:
        ConfigError: a target outside (0, 1].
    """
    check_recall_target(recall_target)
    size = len(features)
    sample = _some(size, _SAMPLE, "graph sample")
    with workers() as each:
        neighbors, _ = exact(features, sample, k, each)
        plan = _plan(features, _coarse(size), sample, neighbors, recall_target, each)
        n_lists = min(size, 4 * plan.n_lists)
        if plan.pairs <= max(_ENOUGH, n_lists) * size:  # to assign all points compares each with so many centroids
            return plan
        finer = _plan(features, n_lists, sample, neighbors, recall_target, each)
    return min(plan, finer, key=lambda some: some.pairs)


def _coarse(size: int) -> int:
    """A power of 2: lists of about a thousand points, but between sqrt(N) / 4 and sqrt(N) of them."""
    root = sqrt(size)
    return int(2 ** round(log2(max(1.0, root / 4, min(root, size / 1000)))))


def _plan(
    features: Features, n_lists: int, sample: Index, neighbors: Index, recall_target: float, each: Workers
) -> Lists:
    centroids = train(features, n_lists, each)
    owner = assign(features, centroids, each)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), owner.bincount(minlength=n_lists).cumsum(0)])
    n_probes, recall = fewest_probes(recall_by_probes(centroids, owner[sample], owner[neighbors]), recall_target)
    # cloned: a view would keep the distances' order of all lists
    probed = [by_distance(centroids, some)[:, :n_probes].clone() for some in torch.arange(n_lists).split(_ROWS)]
    return Lists(owner.argsort(stable=True), offsets, torch.cat(probed), centroids, recall)


def recall_by_probes(centroids: Features, own: Tensor, theirs: Tensor) -> Tensor:
    """(S, L) share of each sampled point's true neighbours that 1..L probes find.

    ``own`` (S,) is the list of each point, ``theirs`` (S, K) those of its neighbours: one is found if its list is among
    the first in the order from the point's own.
    """
    rank = by_distance(centroids, own).argsort(dim=1).gather(1, theirs)
    shares = torch.full(rank.shape, 1 / theirs.shape[1], dtype=torch.float64)
    found = torch.zeros(len(own), len(centroids), dtype=torch.float64).scatter_add_(1, rank, shares)
    return found.cumsum(1)


def fewest_probes(recalls: Tensor, target: float) -> tuple[int, float]:
    """And their mean recall, which lies above the target by the margin, or all of them where none does."""
    mean, error = recalls.mean(0), recalls.std(0, correction=0) / len(recalls) ** 0.5
    enough = mean - _MARGIN * error >= target - 1e-9  # shares of 1/K add up to 1 but for rounding
    n_probes = int(enough.int().argmax()) + 1 if bool(enough.any()) else recalls.shape[1]
    return n_probes, min(1.0, float(mean[n_probes - 1]))


def train(features: Features, n_lists: int, each: Workers) -> Features:
    """(L, d) centroids by Lloyd's rounds on a sample, from random points of it; a centroid that loses all gets another.

    Assignment is by block and the sums are in order, so that threads change nothing.
    """
    sample = features[_some(len(features), _TRAINED_ON * n_lists, "graph lists")].float()
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
    columns = table(centroids - centre)
    rows = max(1, _BLOCK // features.shape[1])

    def nearest(start: int) -> Tensor:
        return closest(features[start : start + rows].float() - centre, columns)

    return torch.cat(each(nearest, range(0, len(features), rows)))


def _some(size: int, most: int, role: str) -> Index:
    return torch.randperm(size, generator=torch_rng_for(0, role))[:most].sort().values
