"""Approximate nearest neighbours by an inverted file: lists from FAISS's k-means, as few probes as the recall needs.

An inverted file usually answers query by query. Here it answers list by list, in the order and with the parts of
``faiss.contrib.big_batch_search``: all queries that probe a list are compared with it in one matrix product. That
function itself is not called: it holds all distances to a list at once, prints a line for every list, and updates its
heap on one thread. A million points of 64 features took 69 s and 3.2 GB, and take 33 s and 1.5 GB here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dgal_bench.core.seeding import seed_for, torch_rng_for
from dgal_bench.core.system import workers
from dgal_bench.core.types import Features, Index, Progress
from dgal_bench.graph.exact_knn import NeighborLists, exact, merge_rankings, rank_exactly, search_width

Floats = npt.NDArray[np.float32]

# Lists, in units of sqrt(N). From 1 to 2 the seconds differ by less than a tenth, at 60,000 points and at a million.
_LISTS = 1.5
# Points per list that k-means is trained on, and its rounds.
_TRAINING_POINTS, _ROUNDS = 32, 6
# Points whose true neighbours decide the number of probes.
_SAMPLE = 500
# Standard errors by which the sample's recall must exceed the target.
_MARGIN = 2.0
# Relative difference of two sums of the same distance by rounding: they come from different devices and products.
_ROUNDING = 1e-6
# Queries that are answered at once by a worker: enough that a list's product is not a narrow one.
_QUERIES = 16_384
# Distances that are computed at once by a worker: 4 MB.
_TILE = 2**20
# Numbers that are read and centred at once: 4 MB.
_BLOCK = 2**20


@dataclass(frozen=True, eq=False)
class InvertedFile:
    """L lists by the nearest of ``centroids`` (L, d), relative to ``centre`` (d,), and how many a query probes.

    ``n_compared``: points that a query is compared with, on average. ``sample`` (S,) are the points on which the recall
    is measured, ``farthest`` (S,) their true K-th distances.
    """

    centroids: Floats
    centre: Tensor
    n_probes: int
    n_compared: float
    sample: Index
    farthest: Tensor

    @property
    def n_lists(self) -> int:
        return len(self.centroids)

    def centred_rows(self, features: Features, rows: slice | Index) -> Features:
        """Rows of ``features`` (N, d), float32 in memory; centred, distances by products keep more digits."""
        return (features[rows] - self.centre).float()

    def nearest_lists(self, points: Features, n_lists: int) -> npt.NDArray[np.int64]:
        """(m, n_lists) the lists nearest to centred points (m, d), on one thread."""
        import faiss

        faiss.omp_set_num_threads(1)
        lists: npt.NDArray[np.int64] = faiss.knn(points.numpy(), self.centroids, n_lists)[1]
        return lists

    def recall(self, distances: Tensor) -> float:
        """Share of a search's ``distances`` (N, K), ascending, that are at most the true K-th, on the sample."""
        found = distances[self.sample] <= self.farthest[:, None] * (1 + _ROUNDING)
        return float(found.double().mean())


def plan(features: Features, k: int, recall_target: float) -> InvertedFile:
    """Lists for the k nearest others in ``features`` (N, d), and the fewest probes whose recall exceeds the target.

    The recall of every number of probes is known from the true neighbours of a sample: P probes find a neighbour whose
    list is among the P nearest to the query. The target must be exceeded by two standard errors; where no number of
    probes does that, all lists are probed. ``features`` may be memory-mapped: a sample of them is copied.
    """
    size = len(features)
    n_lists = max(1, int(_LISTS * sqrt(size)))
    sample = _draw(size, _SAMPLE, "graph sample")
    training = features[_draw(size, _TRAINING_POINTS * n_lists, "graph lists")].float()
    centre = training.mean(0)
    training -= centre
    with workers() as each:  # it restores the number of threads, which FAISS and torch may share
        neighbors, _ = exact(features, sample, k, each)
        lists = InvertedFile(_train(training, n_lists), centre, n_lists, size, sample, torch.empty(0))
        points = lists.centred_rows(features, sample)
        # as the search computes it: points far from the centre lose digits when they are centred
        farthest = (points - lists.centred_rows(features, neighbors[:, -1])).square().sum(1).sqrt()
        order = torch.from_numpy(lists.nearest_lists(points, n_lists))
        owner = torch.from_numpy(lists.nearest_lists(lists.centred_rows(features, neighbors.flatten()), 1)).view(-1, k)
        sizes = np.bincount(lists.nearest_lists(training, 1)[:, 0], minlength=n_lists) * size / len(training)
    rank = order.argsort(dim=1).gather(1, owner)
    hits = torch.zeros(order.shape, dtype=torch.float64).scatter_add_(1, rank, torch.full(rank.shape, 1 / k).double())
    recalls = hits.cumsum(1)
    low = recalls.mean(0) - _MARGIN * recalls.std(0, correction=0) / len(sample) ** 0.5
    enough = low >= recall_target - 1e-9  # shares of 1/K add up to 1 but for rounding
    n_probes = int(enough.int().argmax()) + 1 if bool(enough.any()) else n_lists
    n_compared = float(sizes[order[:, :n_probes].numpy()].sum(1).mean())
    return replace(lists, n_probes=n_probes, n_compared=n_compared, farthest=farthest)


def _train(training: Features, n_lists: int) -> Floats:
    import faiss

    faiss.omp_set_num_threads(1)  # FAISS does not promise the same bits for every number of threads
    kmeans = faiss.Kmeans(
        training.shape[1], n_lists, niter=_ROUNDS, seed=seed_for(0, "graph centroids") % 2**31,
        min_points_per_centroid=1, max_points_per_centroid=_TRAINING_POINTS,
    )  # fmt: skip
    kmeans.train(training.numpy())
    centroids: Floats = np.asarray(kmeans.centroids)
    return centroids


def search(features: Features, lists: InvertedFile, k: int, progress: Progress) -> NeighborLists:
    """Ids and distances (N, k) of the nearest others of every point among those in the lists that it probes.

    Equal distances are in order of position. Blocks of queries are answered each on one thread, so that the number of
    threads changes no bit. A point that has fewer than k others in its lists is compared with all. ``features`` (N, d)
    may be memory-mapped; they are copied once, in float32 and in the order of the lists.
    """
    size, n_features = features.shape
    starts = range(0, size, step := max(1, _BLOCK // n_features))
    blocks = [slice(start, start + step) for start in starts]
    with workers() as each:
        owners = each(lambda rows: lists.nearest_lists(lists.centred_rows(features, rows), 1)[:, 0], blocks)
        owner = torch.from_numpy(np.concatenate(owners))
        order = owner.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(size))
        in_order = torch.empty(size, n_features)
        for rows in blocks:  # by position: mapped features are read from the disk in order
            in_order[place[rows]] = lists.centred_rows(features, rows)
        offsets = np.concatenate([[0], owner.bincount(minlength=lists.n_lists).cumsum(0).numpy()])
        ids, distances = torch.empty(size, k, dtype=torch.int64), torch.empty(size, k)
        queries = torch.arange(size).split(_QUERIES)
        progress("neighbours", 0, len(queries))
        answers = each.pool.map(lambda rows: _answer(in_order, order, offsets, lists, rows, k), queries)
        for n, (rows, (near, lengths)) in enumerate(zip(queries, answers, strict=True), start=1):
            ids[order[rows]], distances[order[rows]] = near, lengths
            progress("neighbours", n, len(queries))
        if len(few := torch.nonzero(distances[:, -1].isinf()).flatten()):
            ids[few], distances[few] = exact(features, few, k, each)
    return ids, distances


def _answer(
    in_order: Features, order: Index, offsets: npt.NDArray[np.int64], lists: InvertedFile, rows: Index, k: int
) -> NeighborLists:
    """For ``rows`` of the features in the lists' order; -1 and infinity for none."""
    import faiss

    queries, points = in_order[rows], in_order.numpy()
    heap = faiss.ResultHeap(len(rows), search_width(k, len(order)))
    probed = lists.nearest_lists(queries, lists.n_probes)
    for number, some in _by_list(probed, lists.n_lists):
        first, last = offsets[number : number + 2]
        if first == last:
            continue
        # centred at the list, so that the products of the expansion are as small as possible
        centre = points[first:last].mean(0)
        base, members, step = points[first:last] - centre, np.arange(first, last), max(1, _TILE // (last - first))
        for part in np.split(some, range(step, len(some), step)):
            heap.add_result_subset(part, faiss.pairwise_distances(queries.numpy()[part] - centre, base), members)
    ids = torch.from_numpy(heap.I)
    near, distances = rank_exactly(in_order, queries, ids.masked_fill(ids == rows[:, None], -1), ids.shape[1])
    return merge_rankings(torch.where(near < 0, near, order[near]), distances, k)


def _by_list(probed: npt.NDArray[np.int64], n_lists: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Each list that a row of ``probed`` (m, P) names, and those rows."""
    by_list = probed.argsort(axis=None, kind="stable")
    counts = np.bincount(probed.ravel(), minlength=n_lists)
    for number, places in enumerate(np.split(by_list, counts.cumsum()[:-1])):
        if len(places):
            yield number, places // probed.shape[1]


def _draw(size: int, most: int, role: str) -> Index:
    return torch.randperm(size, generator=torch_rng_for(0, role))[:most].sort().values
