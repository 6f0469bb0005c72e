"""The nearest columns of a table as matrix products: |y|^2 - 2xy, a tile at a time that stays in the cache.

Of many columns only the minima of groups are kept: a tile is passed over once, and never looked at again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dgal_bench.arrays import Features

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
class Table:
    """What queries are compared with: N points over their squared norms, (d + 1, N); infinite norms are no points."""

    columns: Tensor
    size: int

    @cached_property
    def reach(self) -> Tensor:
        """The largest |y|."""
        return self.columns[-1, : self.size].max().sqrt()


def table(base: Features) -> Table:
    """Of points (N, d), best centred."""
    size, sizes = len(base), _SIZES[base.device.type]
    missing = -size % sizes.columns if size > sizes.whole else 0
    columns = base.new_zeros(base.shape[1] + 1, size + missing)
    columns[:-1, :size] = base.T
    torch.sum(base.square(), 1, out=columns[-1, :size])
    columns[-1, size:] = torch.inf
    return Table(columns, size)


def candidates(queries: Features, table: Table, w: int) -> Tensor:
    """(m, w or more) columns, among them the w nearest to each query as the expansion sees it, in no order.

    More where there are many columns, with -1 for none; w is at most N.
    """
    sizes = _SIZES[queries.device.type]
    if table.size <= sizes.whole:
        found = [smallest(tile, w) for tile in _tiles(queries, table, sizes)]
    else:
        found = list(_of_many(queries, table, w, sizes))
    return torch.cat(found) if found else torch.empty(0, w, dtype=torch.int64, device=queries.device)


def closest(queries: Features, table: Table) -> Tensor:
    """(m,) the nearest column to each query, as the expansion sees it; the first of several."""
    sizes = _SIZES[queries.device.type]
    if table.size <= sizes.whole:
        return torch.cat([_lowest(tile) for tile in _tiles(queries, table, sizes)])
    return torch.cat([_closest_of_many(left, table, sizes) for left in _left(queries).split(sizes.rows)])


def _closest_of_many(left: Tensor, table: Table, sizes: _Sizes) -> Tensor:
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


def _tiles(queries: Features, table: Table, sizes: _Sizes) -> Iterator[Tensor]:
    """Some rows and all columns at a time; each is written over by the next."""
    width = table.columns.shape[1]
    rows = max(1, sizes.elements // width)
    buffer = queries.new_empty(min(rows, len(queries)), width)
    for left in _left(queries).split(rows) if len(queries) else ():
        yield torch.mm(left, table.columns, out=buffer[: len(left)])


def _of_many(queries: Features, table: Table, w: int, sizes: _Sizes) -> Iterator[Tensor]:
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
    chosen = smallest(of_sets.transpose(0, 1).reshape(m, n_sets * n_fine), min(w, n_sets * n_fine))
    number, place = chosen // n_fine * _GROUPS, chosen % n_fine
    number = torch.cat([number + step for step in range(_GROUPS)], 1)
    place = place.repeat(1, _GROUPS)
    rows = torch.arange(m, device=minima.device)[:, None]
    found = minima.flatten()[(number * minima.shape[1] + rows) * n_fine + place]
    chosen = smallest(found, min(w, found.shape[1]))
    return number.gather(1, chosen), place.gather(1, chosen)


def smallest(values: Tensor, w: int) -> Tensor:
    """(m, w) columns of the w smallest of each row of ``values`` (m, n), in no order."""
    n_groups = values.shape[1] // _GROUP
    if values.shape[1] < _GROUPED or n_groups < 2 * w:
        return _SELECT[values.device.type](values, w)
    # Groups are strided, so that their minima are taken over whole vectors; what is left over joins every choice.
    whole = n_groups * _GROUP
    groups = smallest(values[:, :whole].unflatten(1, (_GROUP, n_groups)).amin(1), w)
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
