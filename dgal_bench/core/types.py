"""The arrays of all modules. Letters: N points, C classes, d features, K neighbours, B batch, m candidates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from dgal_bench.core.errors import UserError

Index: TypeAlias = Tensor
"""(m,) int64 positions in the full training set, on the CPU. Never positions in a subset: one index space."""

Labels: TypeAlias = Tensor
"""(m,) int64 classes 0..C-1."""

ImageShape: TypeAlias = tuple[int, int, int]
"""(channels, height, width)."""

Features: TypeAlias = Tensor
"""(N, d) float32."""

TieKeys: TypeAlias = Callable[[Index], Tensor]
"""Positions -> (m,) int64 keys that order equal scores; a pure function of the position."""


class TieOrder(Protocol):
    """Tie keys that are ranks: the positions of the first ranks can be asked for."""

    def __call__(self, ids: Index) -> Tensor:
        """(m,) positions -> (m,) int64 ranks from 0 on."""

    def at(self, ranks: Tensor) -> Index:
        """(m,) ranks -> (m,) positions."""


CLOSE = 1e-3
"""Squared distances by expansion below this share of the two squared norms are computed again from differences.

Above it float32's rounding leaves four digits; points much nearer to each other than to 0 would lose all digits.
"""

SAME = (16 * torch.finfo(torch.float32).eps) ** 2
"""Below this share two points agree in all digits of a forward pass: they are one point, at distance 0."""

_TIES = 1 << 16
"""Tied points whose keys are made at once: for a million it takes a third of the time of one go."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Reports progress of long work: what is being done, how much is done, and of how much."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """The task network's outputs for m points: ``log_probs`` (m, C) and penultimate ``features`` (m, d), on the CPU."""

    log_probs: Tensor
    features: Tensor

    @property
    def probs(self) -> Tensor:
        return self.log_probs.exp()


def margins(values_NC: Tensor) -> Tensor:
    """(N,) differences of the two largest values in each row; C of at least 2."""
    # Two maxima are two to four times as fast as topk(2), which sorts (60,000 rows of 10 to 100, one thread).
    first, column = values_NC.max(dim=1, keepdim=True)
    return first[:, 0] - values_NC.scatter(1, column, -torch.inf).amax(dim=1)


def smallest(scores: Tensor, size: int, ids: Index, ties: TieKeys) -> Tensor:
    """Places of the ``size`` smallest scores in ascending (score, tie key) order, without a full sort.

    Equal scores are ordered by ``ties(ids)``, not by place: thousands of points that no label has reached share one
    score, and in a data set stored class by class their places would pick one class.

    Args:
        scores: (m,) floats; the smallest are taken.
        size: how many, at most m.
        ids: (m,) the positions that the scores belong to.
        ties: positions to tie keys.

    Raises:
        UserError: a score is NaN.
        ValueError: ``size`` exceeds m.
    """
    if size > len(scores):
        raise ValueError(f"cannot take {size} of {len(scores)} points")
    if size == 0:
        return torch.empty(0, dtype=torch.int64)
    refuse_nan(scores)
    threshold = torch.topk(scores, size, largest=False).values[-1]
    below = torch.nonzero(scores < threshold).flatten()
    level = torch.nonzero(scores == threshold).flatten()
    if len(below) + len(level) > size:
        level = _first_by_key(level, size - len(below), ids, ties)
    chosen = torch.cat([below, level])
    if len(scores[chosen].unique()) < size:
        chosen = chosen[ties(ids[chosen]).argsort(stable=True)]
    return chosen[scores[chosen].argsort(stable=True)]


def _first_by_key(places: Tensor, size: int, ids: Index, ties: TieKeys) -> Tensor:
    """The ``size`` places of the smallest tie keys, in no order; many places are split into parts that fit a cache."""
    while len(places) > size:
        firsts = []
        for part in places.split(max(_TIES, 2 * size)):
            keys = ties(ids[part])
            firsts.append(part[keys.topk(min(size, len(part)), largest=False).indices])
        places = torch.cat(firsts)
    return places


def refuse_nan(scores: Tensor) -> None:
    """Raises UserError where scores (m,) are NaN."""
    if bad := int(torch.isnan(scores).sum()):
        raise UserError(f"{bad} of {len(scores)} scores are NaN: has a network diverged? then lower its learning rate")


def tied_share(scores: Tensor, chosen: Tensor) -> float:
    """Share of the chosen (places in ``scores``) that tie keys decided: their level has more points than fit."""
    if len(chosen) == 0:
        return 0.0
    taken = scores[chosen]
    level = taken.max()
    n_taken = int((taken == level).sum())
    return n_taken / len(chosen) if int((scores == level).sum()) > n_taken else 0.0
