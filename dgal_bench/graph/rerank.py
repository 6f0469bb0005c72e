"""What a search found, ranked again by exact distances: |x|^2 + |y|^2 - 2xy loses digits between near points.

And whether it found what it should: that product can lose the nearest points altogether.
"""

import numpy as np
import torch
from torch import Tensor

from dgal_bench.arrays import Features, Index

# Searched beyond K.
_SLACK = 8
# Products that reach no farther than this many times the distances found are as good as differences, about.
_NEAR = 4.0
# Numbers of the points that are ranked at once: on a CPU 1 MB in float32.
_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
# -1 in the lower half of a key.
_NONE = 2**32 - 1


def beyond(k: int, size: int) -> int:
    """How many to search among ``size`` points for the k nearest: some more, to rank again."""
    return min(size, k + _SLACK)


def wanted(k: int, size: int) -> int:
    """How many to search among ``size`` points for the k nearest others of each: itself as well."""
    return beyond(k + 1, size)


def nearest_others(features: Features, points: Index, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the positions (m, w) that a search found for ``points`` (m,), w > k, the k nearest others, as in ``ranked``.

    By id and not by column: among exact duplicates the point itself need not come first, or at all. Ids and distances
    are (m, k), a distance infinite where nothing was found; ``features`` (N, d) are best centred.
    """
    return ranked(features, features[points], found.masked_fill(found == points[:, None], -1), k)


def ranked(base: Features, queries: Features, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the positions (m, w) found for queries, -1 for none, the k nearest by exact distance and id, both (m, k)."""
    rows = max(1, _ELEMENTS[base.device.type] // max(1, found.shape[1] * base.shape[1]))
    answers = [_ranked(base, *some, k) for some in zip(queries.split(rows), found.split(rows), strict=True)]
    return torch.cat([ids for ids, _ in answers]), torch.cat([distances for _, distances in answers])


def _ranked(base: Features, queries: Features, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    exact = base.index_select(0, found.clamp(min=0).flatten()).view(*found.shape, base.shape[1])
    return merged(found, exact.sub_(queries[:, None]).square_().sum(-1).sqrt_().masked_fill_(found < 0, torch.inf), k)


def doubts(distances: Tensor, reach: Tensor, k: int, n_features: int) -> Tensor:
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


def merged(ids: Tensor, distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
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
