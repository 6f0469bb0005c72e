"""The nearest columns of a table as matrix products: |y|^2 - 2xy, a tile at a time that stays in the cache.

Of many columns only the minima of groups are kept: a tile is passed over once, and never looked at again.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dgal_bench.core.system import Workers
from dgal_bench.core.types import Features, Index

# Columns of a group: the w smallest of a row lie in the w groups of smallest minimum. And groups of a set.
_GROUP, _GROUPS = 4, 8
# Columns from which on groups are faster.
_GROUPED = 1024


@dataclass(frozen=True)
class _Sizes:
    """``whole``: columns up to which one tile of ``elements`` has them all. Of more: a tile's ``rows``, ``columns``."""

    whole: int
    elements: int
    rows: int
    columns: int


# Tiles of 1 MB, and of 2 MB where they have all columns. A product of 34 rows and 60,000 columns takes 2.7 times as
# long as one of 256 by 1,024 (one thread, AMD): it puts all columns in order for itself, again for every tile.
_SIZES = {"cpu": _Sizes(8192, 2**19, 512, 512), "cuda": _Sizes(65_536, 2**26, 4096, 16_384)}


@dataclass(frozen=True, eq=False)
class DistanceTable:
    """What queries are compared with: N points over their squared norms, (d + 1, N); infinite norms are no points."""

    columns: Tensor
    size: int

    @cached_property
    def reach(self) -> Tensor:
        """The largest |y|."""
        return self.columns[-1, : self.size].max().sqrt()


def distance_table(base: Features) -> DistanceTable:
    """Of points (N, d), best centred."""
    size, sizes = len(base), _SIZES[base.device.type]
    missing = -size % sizes.columns if size > sizes.whole else 0
    columns = base.new_zeros(base.shape[1] + 1, size + missing)
    columns[:-1, :size] = base.T
    torch.sum(base.square(), 1, out=columns[-1, :size])
    columns[-1, size:] = torch.inf
    return DistanceTable(columns, size)


def candidates(queries: Features, table: DistanceTable, w: int) -> Tensor:
    """(m, w or more) columns, among them the w nearest to each query as the expansion sees it, in no order.

    More where there are many columns, with -1 for none; w is at most N.
    """
    sizes = _SIZES[queries.device.type]
    if table.size <= sizes.whole:
        found = [smallest_columns(tile, w) for tile in _tiles(queries, table, sizes)]
    else:
        found = list(_of_many(queries, table, w, sizes))
    return torch.cat(found) if found else torch.empty(0, w, dtype=torch.int64, device=queries.device)


def closest(queries: Features, table: DistanceTable) -> Tensor:
    """(m,) the nearest column to each query, as the expansion sees it; the first of several."""
    sizes = _SIZES[queries.device.type]
    if table.size <= sizes.whole:
        return torch.cat([_lowest(tile) for tile in _tiles(queries, table, sizes)])
    return torch.cat([_closest_of_many(left, table, sizes) for left in _left(queries).split(sizes.rows)])


def _closest_of_many(left: Tensor, table: DistanceTable, sizes: _Sizes) -> Tensor:
    tile = left.new_empty(len(left), sizes.columns)
    lowest, where = [], []
    for start, part in zip(range(0, table.size, sizes.columns), table.columns.split(sizes.columns, 1), strict=True):
        at = _lowest(torch.mm(left, part, out=tile))
        where.append(at + start)
        lowest.append(tile.gather(1, at[:, None]))
    of_tile = _lowest(torch.cat(lowest, 1))
    return torch.stack(where, 1).gather(1, of_tile[:, None])[:, 0]


def _left(queries: Features) -> Tensor:
    """(m, d + 1): what is multiplied with a table."""
    return torch.cat([queries * -2, queries.new_ones(len(queries), 1)], dim=1)


def _tiles(queries: Features, table: DistanceTable, sizes: _Sizes) -> Iterator[Tensor]:
    """Some rows and all columns at a time; each is written over by the next."""
    width = table.columns.shape[1]
    rows = max(1, sizes.elements // width)
    buffer = queries.new_empty(min(rows, len(queries)), width)
    for left in _left(queries).split(rows) if len(queries) else ():
        yield torch.mm(left, table.columns, out=buffer[: len(left)])


def _of_many(queries: Features, table: DistanceTable, w: int, sizes: _Sizes) -> Iterator[Tensor]:
    """Candidates of some rows at a time: the columns of the w lowest groups."""
    n_tiles, n_fine = table.columns.shape[1] // sizes.columns, sizes.columns // _GROUP
    n_sets, most = -(-n_tiles // _GROUPS), min(len(queries), sizes.rows)
    tile = queries.new_empty(most, sizes.columns)
    minima = queries.new_full((n_sets * _GROUPS, most, n_fine), torch.inf)  # once: new memory is slow
    for left in _left(queries).split(sizes.rows):
        m = len(left)
        of_sets = minima.new_full((n_sets, m, n_fine), torch.inf)
        for n, part in enumerate(table.columns.split(sizes.columns, dim=1)):
            torch.mm(left, part, out=tile[:m])
            torch.amin(tile[:m].view(m, _GROUP, n_fine), 1, out=minima[n, :m])
            one = of_sets[n // _GROUPS]
            torch.minimum(one, minima[n, :m], out=one)
        number, place = _lowest_groups(minima, of_sets, w)
        first = number * sizes.columns + place
        columns = torch.cat([first + step for step in range(0, sizes.columns, n_fine)], 1)
        yield columns.masked_fill_(columns >= table.size, -1)


def _lowest_groups(minima: Tensor, of_sets: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """(m, w) tiles and places in them of the lowest of the ``minima`` (tiles, m, f) of groups, or all of those.

    They are in the w sets of lowest minimum ``of_sets`` (sets, m, f): a set is the same place in successive tiles.
    """
    n_sets, m, n_fine = of_sets.shape
    chosen = smallest_columns(of_sets.transpose(0, 1).reshape(m, n_sets * n_fine), min(w, n_sets * n_fine))
    number, place = chosen // n_fine * _GROUPS, chosen % n_fine
    number = torch.cat([number + step for step in range(_GROUPS)], 1)
    place = place.repeat(1, _GROUPS)
    rows = torch.arange(m, device=minima.device)[:, None]
    found = minima.flatten()[(number * minima.shape[1] + rows) * n_fine + place]
    chosen = smallest_columns(found, min(w, found.shape[1]))
    return number.gather(1, chosen), place.gather(1, chosen)


def smallest_columns(values: Tensor, w: int) -> Tensor:
    """(m, w) columns of the w smallest of each row of ``values`` (m, n), in no order."""
    n_groups = values.shape[1] // _GROUP
    if values.shape[1] < _GROUPED or n_groups < 2 * w:
        return _SELECT[values.device.type](values, w)
    # Groups are strided, so that their minima are taken over whole vectors; what is left over joins every choice.
    whole = n_groups * _GROUP
    groups = smallest_columns(values[:, :whole].unflatten(1, (_GROUP, n_groups)).amin(1), w)
    steps = torch.arange(0, whole, n_groups, device=values.device)
    rest = torch.arange(whole, values.shape[1], device=values.device).expand(len(values), -1)
    columns = torch.cat([(groups[:, :, None] + steps).flatten(1), rest], 1)
    return columns.gather(1, _SELECT[values.device.type](values.gather(1, columns), w))


def _below(values: Tensor, w: int) -> Tensor:
    """By the w-th value: NumPy's partition of values is vectorised on more CPUs than that of places."""
    array = values.numpy()
    m, n = array.shape
    if not 0 < w < n:
        return torch.arange(min(w, n)).repeat(m, 1)
    bound = np.partition(array, w - 1, axis=1)[:, w - 1 : w]
    places = np.flatnonzero(array <= bound)
    if len(places) > m * w:  # ties
        return torch.from_numpy(np.argpartition(array, w - 1, axis=1)[:, :w])
    return torch.from_numpy(places.reshape(m, w) - np.arange(0, m * n, n)[:, None])


def _topk(values: Tensor, w: int) -> Tensor:
    return values.topk(w, dim=1, largest=False, sorted=False).indices


_SELECT: dict[str, Callable[[Tensor, int], Tensor]] = {"cpu": _below, "cuda": _topk}


def _lowest(values: Tensor) -> Tensor:
    """(m,) the first column of each row's minimum; on a CPU by NumPy, eight times as fast."""
    return torch.from_numpy(values.numpy().argmin(1)) if values.device.type == "cpu" else values.argmin(1)


# What a search found, ranked again by exact distances: |x|^2 + |y|^2 - 2xy loses digits between near points. And
# whether it found what it should: that product can lose the nearest points altogether.


# Searched beyond K.
_SLACK = 8
# Products that reach no farther than this many times the distances found are as good as differences, about.
_NEAR = 4.0
# Numbers of the points that are ranked at once: on a CPU 1 MB in float32.
_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
# -1 in the lower half of a key.
_NONE = 2**32 - 1


def widened_k(k: int, size: int) -> int:
    """How many to search among ``size`` points for the k nearest: some more, to rank again."""
    return min(size, k + _SLACK)


def search_width(k: int, size: int) -> int:
    """How many to search among ``size`` points for the k nearest others of each: itself as well."""
    return widened_k(k + 1, size)


def nearest_others(features: Features, points: Index, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the positions (m, w) that a search found for ``points`` (m,), w > k, the k nearest others, as in ``ranked``.

    By id and not by column: among exact duplicates the point itself need not come first, or at all. Ids and distances
    are (m, k), a distance infinite where nothing was found; ``features`` (N, d) are best centred.
    """
    return rank_exactly(features, features[points], found.masked_fill(found == points[:, None], -1), k)


def rank_exactly(base: Features, queries: Features, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the positions (m, w) found for queries, -1 for none, the k nearest by exact distance and id, both (m, k)."""
    rows = max(1, _ELEMENTS[base.device.type] // max(1, found.shape[1] * base.shape[1]))
    answers = [_rank_exactly(base, *some, k) for some in zip(queries.split(rows), found.split(rows), strict=True)]
    return torch.cat([ids for ids, _ in answers]), torch.cat([distances for _, distances in answers])


def _rank_exactly(base: Features, queries: Features, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    exact = base.index_select(0, found.clamp(min=0).flatten()).view(*found.shape, base.shape[1])
    return merge_rankings(
        found, exact.sub_(queries[:, None]).square_().sum(-1).sqrt_().masked_fill_(found < 0, torch.inf), k
    )


def uncertain_rows(distances: Tensor, reach: Tensor, k: int, n_features: int) -> Tensor:
    """(m,) 0 where the k nearest are sure to be among those found, by a search of |x|^2 + |y|^2 - 2xy; else ``reach``.

    ``distances`` (m, w) are the true ones of what was found, ascending, infinite for none; ``reach`` (m,) is |x| plus
    the largest |y|. A sum of d products errs by at most d units of rounding, here e = 2^-23 (d + 8) reach^2 (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1). So nothing that was not found has a squared distance
    below the largest found one's by more than 2e. Nothing is nearer than 0. And where e is as small as rounding makes
    the distances themselves, a point missed is as far as the k-th but for that: else equal distances were in doubt.
    """
    error = 2.0**-23 * (n_features + 8) * reach.square()
    kth = distances[:, k - 1].square()
    last = distances.masked_fill(distances.isinf(), 0).amax(1).square()
    sure = (kth + 2 * error <= last) | (kth == 0) | (reach.square() <= _NEAR**2 * kth)
    return reach.masked_fill(sure, 0)


def merge_rankings(ids: Tensor, distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of rankings side by side, (m, w) and without a pair twice, the k nearest by distance and id, both (m, k).

    ``ids`` below 2^32 - 1, -1 for none.
    """
    # of positive floats the bits are in the order of the numbers: one sort, where two stable ones took thrice as long
    keys = (distances.view(torch.int32).long() << 32) | (ids & _NONE)
    keys = _ascending(keys)[:, :k]
    ids = keys & _NONE
    return ids.masked_fill_(ids == _NONE, -1), (keys >> 32).int().view(torch.float32)


def _ascending(keys: Tensor) -> Tensor:
    """Each row sorted; on a CPU by NumPy, whose sort of short rows is vectorised."""
    return torch.from_numpy(np.sort(keys.numpy())) if keys.device.type == "cpu" else keys.sort(dim=1).values


# Exact search: what products find, a tile at a time, and again around points among themselves where that may be
# wrong. Where points are much nearer to each other than they are to the centre, the products lose what tells them
# apart. So an answer counts only where that is impossible; all others are searched again.


NeighborLists = tuple[Tensor, Tensor]
"""Ids and distances, (m, k) each."""

# Numbers of the points that some queries are compared with at once, by ``exact``: 2 MB.
_BLOCK = 2**19
# Queries that are answered at once.
_ROWS = 2048
# Points searched again around one of them: those within this share of how far its products reached, or its neighbours.
_AROUND = 1 / 8
# And how many at once: parts of a large group are shared among workers.
_AGAIN = 4096

Map = Callable[[Callable[[Index], NeighborLists], Iterable[Index]], Iterable[NeighborLists]]
"""Who does a work on every item: ``map``, or workers."""


def all_exact(features: Features, k: int, each: Workers) -> NeighborLists:
    """Ids and distances (N, k) of every point's nearest others among ``features`` (N, d), best centred."""
    columns = distance_table(features)

    def nearest(points: Index) -> tuple[Tensor, Tensor, Tensor]:
        queries = features[points]
        return _search(features, columns, queries, queries, points, k)

    points = torch.arange(len(features), device=features.device)
    answers = each(nearest, points.split(_ROWS))
    ids, distances, doubt = (torch.cat(part) for part in zip(*answers, strict=True))
    search_again(features, features, points, (ids, distances), doubt, each)
    return ids.cpu(), distances.cpu()


def exact(features: Features, points: Index, k: int, each: Workers) -> NeighborLists:
    """The same (m, k) of some ``points`` (m,) only; ``features`` may lie on disk."""
    points = points.to(features.device)
    return nearest_to(features, features[points], k, each, points)


def nearest_to(features: Features, queries: Features, k: int, each: Workers, own: Index | None = None) -> NeighborLists:
    """Positions in ``features`` (N, d) nearest to each of ``queries`` (m, d), and their distances, (m, k) both.

    ``own`` (m,) are positions that do not count, such as a query's own. ``features`` may lie on disk and are read a
    block at a time, once for every two thousand queries. Both tensors are on the CPU.
    """
    own = torch.full((len(queries),), -1, device=features.device) if own is None else own
    parts = zip(queries.split(_ROWS), own.split(_ROWS), strict=True)
    answers = [_nearest_to(features, some.float(), not_these, k, each) for some, not_these in parts]
    ids, distances = zip(*answers, strict=True)
    return torch.cat(ids), torch.cat(distances)


def _nearest_to(features: Features, queries: Features, own: Index, k: int, each: Workers) -> NeighborLists:
    rows = max(1, _BLOCK // features.shape[1])

    def nearest(start: int) -> NeighborLists:
        base = features[start : start + rows].float()
        ids, distances = nearest_in(base, queries, own - start, k, queries.mean(0))
        return torch.where(ids < 0, ids, ids + start).cpu(), distances.cpu()

    answers = each(nearest, range(0, len(features), rows))
    ids, distances = (torch.cat(part, 1) for part in zip(*answers, strict=True))
    return merge_rankings(ids, distances, k)


def nearest_in(base: Features, queries: Features, own: Index, k: int, centre: Features) -> NeighborLists:
    """The same for a base in memory, centred at ``centre`` (d,) for the products; at most k, -1 for none.

    Distances are the true ones but for rounding. Equal ones are in order of position; which of several points that are
    equally far is the k-th is free where there are more of them than were looked at (``rerank.wanted``).
    """
    ids, distances, doubt = _search(base, distance_table(base - centre), queries, queries - centre, own, k)
    search_again(base, queries, own, (ids, distances), doubt, map)
    return ids, distances


def _search(
    base: Features, columns: DistanceTable, queries: Features, centred: Features, own: Index, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, distances (m, k) as the products find them, and ``doubts`` (m,) of each row."""
    found = candidates(centred, columns, search_width(k, len(base)))
    return with_doubts(base, queries, own, found, centred.norm(dim=1) + columns.reach, k)


def with_doubts(
    base: Features, queries: Features, own: Index, found: Tensor, reach: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest of the positions ``found`` by products that reach so far, and ``doubts`` (m,) of each.

    Among what was ``found`` (m, w or more) are the w = wanted(k, N) nearest as the products see it, -1 for none.
    """
    w, others = search_width(k, len(base)), found.masked_fill(found == own[:, None], -1)
    all_found = w == len(base)
    # one of the w may be itself: the others are no farther than any that was not found
    ids, distances = rank_exactly(base, queries, others, w if all_found else w - 1)
    doubt = torch.zeros_like(reach) if all_found else uncertain_rows(distances, reach, k, base.shape[1])
    return ids[:, :k], distances[:, :k], doubt


def search_again(
    base: Features, queries: Features, own: Index, answer: NeighborLists, doubt: Tensor, each: Map
) -> None:
    """Rows of ``answer`` that are in doubt are replaced."""
    ids, distances = answer

    def again(some: Index) -> NeighborLists:
        return _around(base, queries[some], own[some], distances[some])

    parts = [part for group in _groups(queries, distances[:, -1], doubt) for part in group.split(_AGAIN)]
    for some, (near, lengths) in zip(parts, each(again, parts), strict=True):
        ids[some], distances[some] = near, lengths


def _groups(queries: Features, farthest: Tensor, doubt: Tensor) -> Iterator[Index]:
    """Rows in doubt, by those that lie around one of them, which comes first: the one whose products reached farthest.

    So what the next products reach is three quarters of that at most, and the search ends.
    """
    left = doubt.argsort(descending=True)[: int((doubt > 0).sum())]
    while len(left):
        radius = max(float(doubt[left[0]]) * _AROUND, float(farthest[left[0]]))
        inside = _differences(queries[left[0]], queries[left]) <= radius
        inside[0] = True
        yield left[inside]
        left = left[~inside]


def _around(base: Features, queries: Features, own: Index, distances: Tensor) -> NeighborLists:
    """The nearest to each query among what lies as near to the first as any answer can; better than ``distances``."""
    k, first = distances.shape[1], queries[0]
    radius = (_differences(first, queries) + distances[:, -1]).max() * (1 + 1e-4)  # more than rounding
    near = torch.nonzero(_differences(first, base) <= radius).flatten()
    place = torch.searchsorted(near, own).clamp(max=len(near) - 1)
    ids, lengths = nearest_in(base[near], queries, torch.where(near[place] == own, place, -1), k, first)
    return near[ids], lengths


def _differences(point: Features, others: Features) -> Tensor:
    """(n,) distances, summed from differences."""
    return torch.cdist(point[None], others, compute_mode="donot_use_mm_for_euclid_dist")[0]
