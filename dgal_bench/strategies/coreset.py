"""CoreSet (Sener and Savarese, 2018): greedy k-center over the network's features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dgal_bench.core.types import CLOSE, SAME, Features, Index, TieKeys
from dgal_bench.strategies.base import Query

# Distances to the first centres in a block: 2 MB in float32, which stay in a core's cache.
BLOCK = 500_000
# Pairs of near points whose differences are computed at a time.
_PAIRS = 100_000


@dataclass(frozen=True)
class KCenter:
    """Picks the candidate farthest from all labeled points and picks: a greedy cover, at most twice the best radius.

    ``indistinct`` in the row: picks at distance 0, where every remaining candidate coincided with a centre.
    """

    def __call__(self, query: Query, candidates: Index, batch_size: int) -> Index:
        labeled = query.pool.labeled
        features = query.predict(torch.cat([labeled, candidates])).features
        centres, features = features[: len(labeled)], features[len(labeled) :]
        places, n_indistinct = farthest_first(features, centres, batch_size, candidates, query.ties)
        query.note("indistinct", lambda: n_indistinct)
        return candidates[places]


def farthest_first(
    features_Nd: Features, centres_kd: Features, batch_size: int, ids: Index, ties: TieKeys
) -> tuple[Index, int]:
    """The greedy 2-approximation of k-center: O(N d (k + B)) time, O(N d) memory, no (N, k) matrix.

    Args:
        features_Nd: the points, float32.
        centres_kd: the first centres, at least one.
        batch_size: picks, at most N.
        ids: (N,) the positions of the points.
        ties: their tie keys, among equally far points.

    Returns:
        (B,) distinct places in order of picking, and how many of them were at distance 0 from a centre.
    """
    mean = features_Nd.mean(dim=0)
    points, centres = features_Nd - mean, centres_kd - mean  # centred: the expansion below loses the fewest digits
    norms = points.square().sum(dim=1)
    nearest = _nearest_centre(points, norms, centres)
    picks: list[int] = []
    n_indistinct = 0
    for _ in range(batch_size):
        far = nearest.max()
        level = torch.nonzero(nearest == far).flatten()
        pick = int(level[ties(ids[level]).argmin()])
        n_indistinct += int(far == 0)
        picks.append(pick)
        scale = norms + norms[pick]
        squared = torch.addmv(scale, points, points[pick], alpha=-2)
        _refine(squared[:, None], scale[:, None], points, points[pick, None])
        torch.minimum(nearest, squared, out=nearest)
        nearest[pick] = -1  # below any distance: not picked again
    return torch.tensor(picks), n_indistinct


def _nearest_centre(points_Nd: Tensor, norms_N: Tensor, centres_kd: Tensor) -> Tensor:
    """(N,) squared distances to the nearest centre, |x|^2 + |c|^2 - 2 x.c, in blocks of points."""
    centre_norms = centres_kd.square().sum(dim=1)
    nearest = []
    rows = max(1, BLOCK // len(centres_kd))
    for points, norms in zip(points_Nd.split(rows), norms_N.split(rows), strict=True):
        squared = torch.addmm(norms[:, None] + centre_norms, points, centres_kd.T, alpha=-2)
        part = squared.amin(dim=1)
        near = torch.nonzero(part <= CLOSE * (norms + centre_norms.max())).flatten()  # few: no pass over all pairs
        if len(near):
            squared = squared[near]
            _refine(squared, norms[near, None] + centre_norms, points[near], centres_kd)
            part[near] = squared.amin(dim=1)
        nearest.append(part)
    return torch.cat(nearest)


def _refine(squared_nk: Tensor, scale_nk: Tensor, points_nd: Tensor, centres_kd: Tensor) -> None:
    """Recompute, in place, near pairs from their differences; exactly 0 where points coincide."""
    rows, columns = torch.nonzero(squared_nk <= CLOSE * scale_nk, as_tuple=True)
    for r, c in zip(rows.split(_PAIRS), columns.split(_PAIRS), strict=True):
        exact = (points_nd[r] - centres_kd[c]).square_().sum(dim=1)
        squared_nk[r, c] = exact.masked_fill_(exact <= SAME * scale_nk[r, c], 0)
