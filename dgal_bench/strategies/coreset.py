"""CoreSet (Sener and Savarese, 2018): greedy k-center over the network's features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dgal_bench.arrays import Features, Index, TieKeys
from dgal_bench.strategies.base import Query

# Squared distances below this share of the two squared norms are rounding (float32, d terms): the points coincide.
_INDISTINCT = 16 * torch.finfo(torch.float32).eps
# Elements of one block of distances to the first centres: 16 MB in float32.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class KCenter:
    """B times the candidate farthest from all labeled points and picks: a greedy cover, at most twice the best radius.

    ``indistinct`` in the row: picks at distance 0, where every candidate left coincided with a centre.
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
    points, centres = features_Nd - mean, centres_kd - mean  # centred, the expansion below loses the fewest digits
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
        torch.minimum(nearest, _without_rounding(squared, scale), out=nearest)
        nearest[picks] = -1  # below any distance: never again
    return torch.tensor(picks), n_indistinct


def _nearest_centre(points_Nd: Tensor, norms_N: Tensor, centres_kd: Tensor) -> Tensor:
    """(N,) squared distances to the nearest centre, |x|^2 + |c|^2 - 2 x.c, in blocks of points."""
    centre_norms = centres_kd.square().sum(dim=1)
    nearest = []
    rows = max(1, _BLOCK // len(centres_kd))
    for points, norms in zip(points_Nd.split(rows), norms_N.split(rows), strict=True):
        scale = norms[:, None] + centre_norms
        squared = torch.addmm(scale, points, centres_kd.T, alpha=-2)
        nearest.append(_without_rounding(squared, scale).amin(dim=1))
    return torch.cat(nearest)


def _without_rounding(squared: Tensor, scale: Tensor) -> Tensor:
    """Squared distances, exactly 0 where a point cannot be told from a centre; both arguments are used up."""
    return squared.masked_fill_(squared <= scale.mul_(_INDISTINCT), 0)
