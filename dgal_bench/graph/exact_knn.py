"""Exact nearest neighbours: by matrix products in tiles that stay in the cache, then ranked by exact distances.

The product |x|^2 + |y|^2 - 2xy loses digits where points are much nearer to each other than to the centre, and can miss
the nearest points altogether. So an answer is accepted only where the error bound excludes a miss. The other queries
are grouped, and each group is searched again with coordinates centred on one of them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dgal_bench.core.system import Workers
from dgal_bench.core.types import Features, Index

# Columns of a group, and groups of a set: the w smallest of a row lie in the w groups of smallest minimum. Only minima
# are stored, so that a tile is read once.
_GROUP, _GROUPS = 4, 8
# Columns from which groups are faster.
_GROUPED = 1024


@dataclass(frozen=True)
class _Sizes:
    """Up to ``whole`` columns, one tile of ``elements`` has all of them; above, a tile has ``rows`` and ``columns``."""

    whole: int
    elements: int
    rows: int
    columns: int


# Tiles of 1 MB, and of 2 MB where they have all columns. A product of 34 rows and 60,000 columns takes 2.7 times as
# long as one of 256 by 1,024 (one thread, AMD): it reorders all columns internally, again for every tile.
_SIZES = {"cpu": _Sizes(8192, 2**19, 512, 512), "cuda": _Sizes(65_536, 2**26, 4096, 16_384)}


@dataclass(frozen=True, eq=False)
class DistanceTable:
    """N points with their squared norms below, (d + 1, N): queries are compared with it. Infinite norms are padding."""

    columns: Tensor
    size: int

    @cached_property
    def reach(self) -> Tensor:
        """The largest |y|."""
        return self.columns[-1, : self.size].max().sqrt()


def distance_table(base: Features) -> DistanceTable:
    """The table of points (N, d), preferably centred."""
    size, sizes = len(base), _SIZES[base.device.type]
    missing = -size % sizes.columns if size > sizes.whole else 0
    columns = base.new_zeros(base.shape[1] + 1, size + missing)
    columns[:-1, :size] = base.T
    torch.sum(base.square(), 1, out=columns[-1, :size])
    columns[-1, size:] = torch.inf
    return DistanceTable(columns, size)


def candidates(queries: Features, table: DistanceTable, w: int) -> Tensor:
    """(m, w or more) columns, among them the w nearest to each query by the expansion, in no order.

    More than w, with -1 for none, where there are many columns; w is at most N.
    """
    sizes = _SIZES[queries.device.type]
    if table.size <= sizes.whole:
        columns = [smallest_columns(tile, w) for tile in _tiles(queries, table, sizes)]
    else:
        columns = list(_candidates_of_many(queries, table, w, sizes))
    return torch.cat(columns) if columns else torch.empty(0, w, dtype=torch.int64, device=queries.device)


def _augmented(queries: Features) -> Tensor:
    """(m, d + 1): the factor of a product with a table."""
    return torch.cat([queries * -2, queries.new_ones(len(queries), 1)], dim=1)


def _tiles(queries: Features, table: DistanceTable, sizes: _Sizes) -> Iterator[Tensor]:
    """Some rows and all columns at a time; each tile overwrites the one before."""
    width = table.columns.shape[1]
    rows = max(1, sizes.elements // width)
    buffer = queries.new_empty(min(rows, len(queries)), width)
    for factor in _augmented(queries).split(rows) if len(queries) else ():
        yield torch.mm(factor, table.columns, out=buffer[: len(factor)])


def _candidates_of_many(queries: Features, table: DistanceTable, w: int, sizes: _Sizes) -> Iterator[Tensor]:
    """The same in tiles, some rows at a time: the columns of the w lowest groups."""
    n_tiles, n_fine = table.columns.shape[1] // sizes.columns, sizes.columns // _GROUP
    n_sets, most = -(-n_tiles // _GROUPS), min(len(queries), sizes.rows)
    tile = queries.new_empty(most, sizes.columns)
    minima = queries.new_full((n_sets * _GROUPS, most, n_fine), torch.inf)  # allocated once: new memory is slow
    for factor in _augmented(queries).split(sizes.rows):
        m = len(factor)
        of_sets = minima.new_full((n_sets, m, n_fine), torch.inf)
        for n, part in enumerate(table.columns.split(sizes.columns, dim=1)):
            torch.mm(factor, part, out=tile[:m])
            torch.amin(tile[:m].view(m, _GROUP, n_fine), 1, out=minima[n, :m])
            of_set = of_sets[n // _GROUPS]
            torch.minimum(of_set, minima[n, :m], out=of_set)
        number, place = _lowest_groups(minima, of_sets, w)
        first = number * sizes.columns + place
        columns = torch.cat([first + step for step in range(0, sizes.columns, n_fine)], 1)
        yield columns.masked_fill_(columns >= table.size, -1)


def _lowest_groups(minima: Tensor, of_sets: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """(m, w) tiles of the lowest ``minima`` (tiles, m, f) of groups, and places in them; all where there are fewer.

    They lie in the w sets of lowest minimum ``of_sets`` (sets, m, f): a set is the same place in successive tiles.
    """
    n_sets, m, n_fine = of_sets.shape
    chosen = smallest_columns(of_sets.transpose(0, 1).reshape(m, n_sets * n_fine), min(w, n_sets * n_fine))
    number, place = chosen // n_fine * _GROUPS, chosen % n_fine
    number = torch.cat([number + step for step in range(_GROUPS)], 1)
    place = place.repeat(1, _GROUPS)
    rows = torch.arange(m, device=minima.device)[:, None]
    of_groups = minima.flatten()[(number * minima.shape[1] + rows) * n_fine + place]
    chosen = smallest_columns(of_groups, min(w, of_groups.shape[1]))
    return number.gather(1, chosen), place.gather(1, chosen)


def smallest_columns(values: Tensor, w: int) -> Tensor:
    """(m, w) columns of the w smallest of each row of ``values`` (m, n), in no order."""
    n_groups = values.shape[1] // _GROUP
    if values.shape[1] < _GROUPED or n_groups < 2 * w:
        return _SELECT[values.device.type](values, w)
    # Groups are strided, so that minima are taken over whole vectors; the remaining columns are added to every choice.
    whole = n_groups * _GROUP
    groups = smallest_columns(values[:, :whole].unflatten(1, (_GROUP, n_groups)).amin(1), w)
    steps = torch.arange(0, whole, n_groups, device=values.device)
    rest = torch.arange(whole, values.shape[1], device=values.device).expand(len(values), -1)
    columns = torch.cat([(groups[:, :, None] + steps).flatten(1), rest], 1)
    return columns.gather(1, _SELECT[values.device.type](values.gather(1, columns), w))


def _partition(values: Tensor, w: int) -> Tensor:
    """All values up to the w-th: NumPy's ``partition`` is vectorised on more CPUs than ``argpartition``."""
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


_SELECT: dict[str, Callable[[Tensor, int], Tensor]] = {"cpu": _partition, "cuda": _topk}


# How many are searched beyond K.
_SLACK = 8
# Products that reach at most this many times the distances are about as exact as differences.
_NEAR = 4.0
# Numbers of the points that are ranked at once: on a CPU 1 MB in float32.
_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
# -1 in the lower half of a key.
_NONE = 2**32 - 1


def widened_k(k: int, size: int) -> int:
    """How many to search among ``size`` points for the k nearest: some more, to rank them by exact distances."""
    return min(size, k + _SLACK)


def search_width(k: int, size: int) -> int:
    """How many to search among ``size`` points for the k nearest others of each: the point itself as well."""
    return widened_k(k + 1, size)


def nearest_others(features: Features, points: Index, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest others among the ids (m, w) that a search returned for ``points`` (m,), w > k; as ``rank_exactly``.

    The point itself is removed by id, not by column: among exact duplicates it need not be first, or present at all.
    Ids and distances are (m, k), a distance infinite for none; ``features`` (N, d) are preferably centred.
    """
    return rank_exactly(features, features[points], ids.masked_fill(ids == points[:, None], -1), k)


def rank_exactly(base: Features, queries: Features, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of ``ids`` (m, w), -1 for none, to each query by exact distance and id; both (m, k)."""
    rows = max(1, _ELEMENTS[base.device.type] // max(1, ids.shape[1] * base.shape[1]))
    answers = [_rank_exactly(base, *some, k) for some in zip(queries.split(rows), ids.split(rows), strict=True)]
    return torch.cat([near for near, _ in answers]), torch.cat([distances for _, distances in answers])


def _rank_exactly(base: Features, queries: Features, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    points = base.index_select(0, ids.clamp(min=0).flatten()).view(*ids.shape, base.shape[1])
    distances = points.sub_(queries[:, None]).square_().sum(-1).sqrt_().masked_fill_(ids < 0, torch.inf)
    return merge_rankings(ids, distances, k)


def uncertain_rows(distances: Tensor, reach: Tensor, k: int, n_features: int) -> Tensor:
    """(m,) 0 where a search of |x|^2 + |y|^2 - 2xy is sure to have returned the k nearest; else ``reach``.

    ``distances`` (m, w) are the true ones of its answer, ascending, infinite for none; ``reach`` (m,) is |x| plus the
    largest |y|. A sum of d products errs by at most d units of rounding, here e = 2^-23 (d + 8) reach^2 (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1). So the squared distance of any other point is at least
    the largest of the answer less 2e. A row is also sure where the k-th distance is 0, and where e is as small as the
    rounding of the distances: a point missed is then as far as the k-th up to rounding, as equal distances are.
    """
    error = 2.0**-23 * (n_features + 8) * reach.square()
    kth = distances[:, k - 1].square()
    last = distances.masked_fill(distances.isinf(), 0).amax(1).square()
    sure = (kth + 2 * error <= last) | (kth == 0) | (reach.square() <= _NEAR**2 * kth)
    return reach.masked_fill(sure, 0)


def merge_rankings(ids: Tensor, distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of rankings side by side (m, w), without duplicates, by distance and id; ids and distances (m, k).

    ``ids`` are below 2^32 - 1, -1 for none.
    """
    # the bits of positive floats sort like the numbers: one sort, where two stable ones took three times as long
    keys = (distances.view(torch.int32).long() << 32) | (ids & _NONE)
    keys = _ascending(keys)[:, :k]
    ids = keys & _NONE
    return ids.masked_fill_(ids == _NONE, -1), (keys >> 32).int().view(torch.float32)


def _ascending(keys: Tensor) -> Tensor:
    """Each row sorted; on a CPU by NumPy, whose sort of short rows is vectorised."""
    return torch.from_numpy(np.sort(keys.numpy())) if keys.device.type == "cpu" else keys.sort(dim=1).values


NeighborLists = tuple[Tensor, Tensor]
"""Ids and distances, (m, k) each."""

# Numbers of the points that ``exact`` compares queries with at once: 2 MB.
_BLOCK = 2**19
# Queries that are answered at once.
_ROWS = 2048
# Points are searched again in groups around one of them: within this share of its reach, or as far as its neighbours.
_AROUND = 1 / 8
# Points searched again at once: a large group is divided among workers.
_AGAIN = 4096

Map = Callable[[Callable[[Index], NeighborLists], Iterable[Index]], Iterable[NeighborLists]]
"""Applies a function to every item: ``map``, or workers."""


def all_exact(features: Features, k: int, each: Workers) -> NeighborLists:
    """Ids and distances (N, k) of every point's nearest others among ``features`` (N, d), preferably centred."""
    columns = distance_table(features)

    def nearest(points: Index) -> tuple[Tensor, Tensor, Tensor]:
        queries = features[points]
        return _search(features, columns, queries, queries, points, k)

    points = torch.arange(len(features), device=features.device)
    answers = each(nearest, points.split(_ROWS))
    ids, distances, reach = (torch.cat(part) for part in zip(*answers, strict=True))
    search_again(features, features, points, (ids, distances), reach, each)
    return ids.cpu(), distances.cpu()


def exact(features: Features, points: Index, k: int, each: Workers) -> NeighborLists:
    """The same (m, k) of some ``points`` (m,) only; ``features`` may be memory-mapped."""
    points = points.to(features.device)
    return nearest_to(features, features[points], k, each, points)


def nearest_to(features: Features, queries: Features, k: int, each: Workers, own: Index | None = None) -> NeighborLists:
    """Positions in ``features`` (N, d) nearest to each of ``queries`` (m, d), and their distances, (m, k) both.

    ``own`` (m,) are positions to leave out, such as a query's own. ``features`` may be memory-mapped and are read in
    blocks, once for every two thousand queries. Both results are on the CPU.
    """
    own = torch.full((len(queries),), -1, device=features.device) if own is None else own
    parts = zip(queries.split(_ROWS), own.split(_ROWS), strict=True)
    answers = [_nearest_to(features, some.float(), some_own, k, each) for some, some_own in parts]
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

    Distances are true up to rounding, equal ones in order of position. Where more points are at the k-th distance than
    were compared (``search_width``), any of them may be the k-th.
    """
    ids, distances, reach = _search(base, distance_table(base - centre), queries, queries - centre, own, k)
    search_again(base, queries, own, (ids, distances), reach, map)
    return ids, distances


def _search(
    base: Features, columns: DistanceTable, queries: Features, centred: Features, own: Index, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, distances (m, k) by the products, and the reach (m,) of uncertain rows, 0 of the others."""
    ids = candidates(centred, columns, search_width(k, len(base)))
    return rank_and_check(base, queries, own, ids, centred.norm(dim=1) + columns.reach, k)


def rank_and_check(
    base: Features, queries: Features, own: Index, ids: Tensor, reach: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest of ``ids`` (m, w or more) with their distances, and ``uncertain_rows`` (m,).

    ``ids`` (-1: none) must hold the w = search_width(k, N) nearest by the expanded product. ``reach`` (m,) is |x| + max
    |y|, which bounds the product's rounding error.
    """
    w, others = search_width(k, len(base)), ids.masked_fill(ids == own[:, None], -1)
    complete = w == len(base)
    # one of the w may be the point itself: the w - 1 others are no farther than any point outside ``ids``
    near, distances = rank_exactly(base, queries, others, w if complete else w - 1)
    uncertain = torch.zeros_like(reach) if complete else uncertain_rows(distances, reach, k, base.shape[1])
    return near[:, :k], distances[:, :k], uncertain


def search_again(
    base: Features, queries: Features, own: Index, answer: NeighborLists, reach: Tensor, each: Map
) -> None:
    """Replace the rows of ``answer`` that are uncertain: those of positive ``reach``."""
    ids, distances = answer

    def again(some: Index) -> NeighborLists:
        return _around(base, queries[some], own[some], distances[some])

    parts = [part for group in _groups(queries, distances[:, -1], reach) for part in group.split(_AGAIN)]
    for some, (near, lengths) in zip(parts, each(again, parts), strict=True):
        ids[some], distances[some] = near, lengths


def _groups(queries: Features, farthest: Tensor, reach: Tensor) -> Iterator[Index]:
    """Uncertain rows in groups, each around its first row, which is the one of largest reach.

    So the next products reach at most three quarters as far, and the search ends.
    """
    rest = reach.argsort(descending=True)[: int((reach > 0).sum())]
    while len(rest):
        radius = max(float(reach[rest[0]]) * _AROUND, float(farthest[rest[0]]))
        inside = _differences(queries[rest[0]], queries[rest]) <= radius
        inside[0] = True
        yield rest[inside]
        rest = rest[~inside]


def _around(base: Features, queries: Features, own: Index, distances: Tensor) -> NeighborLists:
    """The nearest to each query among all points that can be nearer to it than its ``distances``."""
    k, first = distances.shape[1], queries[0]
    radius = (_differences(first, queries) + distances[:, -1]).max() * (1 + 1e-4)  # more than rounding
    near = torch.nonzero(_differences(first, base) <= radius).flatten()
    place = torch.searchsorted(near, own).clamp(max=len(near) - 1)
    ids, lengths = nearest_in(base[near], queries, torch.where(near[place] == own, place, -1), k, first)
    return near[ids], lengths


def _differences(point: Features, others: Features) -> Tensor:
    """(n,) distances, summed from differences."""
    return torch.cdist(point[None], others, compute_mode="donot_use_mm_for_euclid_dist")[0]
