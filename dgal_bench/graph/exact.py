"""Exact search: what products find, a tile at a time, and again around points among themselves where that may be wrong.

Where points are much nearer to each other than they are to the centre, the products lose what tells them apart. So an
answer counts only where that is impossible; all others are searched again.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dgal_bench.arrays import Features, Index
from dgal_bench.graph.rerank import doubts, merged, ranked, wanted
from dgal_bench.graph.tiles import Table, candidates, table
from dgal_bench.threads import Workers

Found = tuple[Tensor, Tensor]
"""Ids and distances, (m, k) each."""

# Numbers of the points that some queries are compared with at once, by ``exact``: 2 MB.
_BLOCK = 2**19
# Queries that are answered at once.
_ROWS = 2048
# Points searched again around one of them: those within this share of how far its products reached, or its neighbours.
_AROUND = 1 / 8
# And how many at once: parts of a large group are shared among workers.
_AGAIN = 4096

Map = Callable[[Callable[[Index], Found], Iterable[Index]], Iterable[Found]]
"""Who does a work on every item: ``map``, or workers."""


def all_exact(features: Features, k: int, each: Workers) -> Found:
    """Ids and distances (N, k) of every point's nearest others among ``features`` (N, d), best centred."""
    columns = table(features)

    def nearest(points: Index) -> tuple[Tensor, Tensor, Tensor]:
        queries = features[points]
        return _searched(features, columns, queries, queries, points, k)

    points = torch.arange(len(features), device=features.device)
    answers = each(nearest, points.split(_ROWS))
    ids, distances, doubt = (torch.cat(part) for part in zip(*answers, strict=True))
    search_again(features, features, points, (ids, distances), doubt, each)
    return ids.cpu(), distances.cpu()


def exact(features: Features, points: Index, k: int, each: Workers) -> Found:
    """The same (m, k) of some ``points`` (m,) only; ``features`` may lie on disk."""
    points = points.to(features.device)
    return nearest_to(features, features[points], k, each, points)


def nearest_to(features: Features, queries: Features, k: int, each: Workers, own: Index | None = None) -> Found:
    """Positions in ``features`` (N, d) nearest to each of ``queries`` (m, d), and their distances, (m, k) both.

    ``own`` (m,) are positions that do not count, such as a query's own. ``features`` may lie on disk and are read a
    block at a time, once for every two thousand queries. Both tensors are on the CPU.
    """
    own = torch.full((len(queries),), -1, device=features.device) if own is None else own
    parts = zip(queries.split(_ROWS), own.split(_ROWS), strict=True)
    answers = [_nearest_to(features, some.float(), not_these, k, each) for some, not_these in parts]
    ids, distances = zip(*answers, strict=True)
    return torch.cat(ids), torch.cat(distances)


def _nearest_to(features: Features, queries: Features, own: Index, k: int, each: Workers) -> Found:
    rows = max(1, _BLOCK // features.shape[1])

    def nearest(start: int) -> Found:
        base = features[start : start + rows].float()
        ids, distances = nearest_in(base, queries, own - start, k, queries.mean(0))
        return torch.where(ids < 0, ids, ids + start).cpu(), distances.cpu()

    answers = each(nearest, range(0, len(features), rows))
    ids, distances = (torch.cat(part, 1) for part in zip(*answers, strict=True))
    return merged(ids, distances, k)


def nearest_in(base: Features, queries: Features, own: Index, k: int, centre: Features) -> Found:
    """The same for a base in memory, centred at ``centre`` (d,) for the products; at most k, -1 for none.

    Distances are the true ones but for rounding. Equal ones are in order of position; which of several points that are
    equally far is the k-th is free where there are more of them than were looked at (``rerank.wanted``).
    """
    ids, distances, doubt = _searched(base, table(base - centre), queries, queries - centre, own, k)
    search_again(base, queries, own, (ids, distances), doubt, map)
    return ids, distances


def _searched(
    base: Features, columns: Table, queries: Features, centred: Features, own: Index, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, distances (m, k) as the products find them, and ``doubts`` (m,) of each row."""
    found = candidates(centred, columns, wanted(k, len(base)))
    return with_doubts(base, queries, own, found, centred.norm(dim=1) + columns.reach, k)


def with_doubts(
    base: Features, queries: Features, own: Index, found: Tensor, reach: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest of the positions ``found`` by products that reach so far, and ``doubts`` (m,) of each.

    Among what was ``found`` (m, w or more) are the w = wanted(k, N) nearest as the products see it, -1 for none.
    """
    w, others = wanted(k, len(base)), found.masked_fill(found == own[:, None], -1)
    all_found = w == len(base)
    # one of the w may be itself: the others are no farther than any that was not found
    ids, distances = ranked(base, queries, others, w if all_found else w - 1)
    doubt = torch.zeros_like(reach) if all_found else doubts(distances, reach, k, base.shape[1])
    return ids[:, :k], distances[:, :k], doubt


def search_again(base: Features, queries: Features, own: Index, answer: Found, doubt: Tensor, each: Map) -> None:
    """Rows of ``answer`` that are in doubt are replaced."""
    ids, distances = answer

    def again(some: Index) -> Found:
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


def _around(base: Features, queries: Features, own: Index, distances: Tensor) -> Found:
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
