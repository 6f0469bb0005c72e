"""The pool: which training images are labeled, and the labels known so far."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dgal_bench.core.errors import ConfigError, StrategyError
from dgal_bench.core.seeding import rng_for
from dgal_bench.core.types import Index, Labels


@dataclass(frozen=True, eq=False)
class Pool:
    """N positions, of which ``labeled`` (in order of acquisition) have the known ``labels``.

    The true labels of the other points are not here: the oracle in the loop holds them.
    """

    size: int
    n_classes: int
    labeled: Index
    labels: Labels

    def __post_init__(self) -> None:
        if len(self.labeled) != len(self.labels):
            raise ValueError(f"{len(self.labeled)} labeled points but {len(self.labels)} labels")

    @property
    def unlabeled(self) -> Index:
        """Ascending positions without a label."""
        return torch.nonzero(self._unlabeled_mask()).flatten()

    def _unlabeled_mask(self) -> Tensor:
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[self.labeled] = False
        return mask

    def annotate(self, batch: Index, labels: Labels) -> "Pool":
        """The pool after the oracle has labeled ``batch``."""
        return Pool(self.size, self.n_classes, torch.cat([self.labeled, batch]), torch.cat([self.labels, labels]))

    def check(self, points: Index, size: int, verb: str = "picked") -> None:
        """Raises StrategyError unless ``points`` are ``size`` distinct unlabeled positions of the pool.

        ``verb``: the verb of the message, ``picked`` for a batch or ``left`` for candidates.
        """
        if not isinstance(points, Tensor):
            raise StrategyError(f"the strategy {verb} a {type(points).__name__}, not a flat int64 tensor of positions")
        if points.dtype != torch.int64 or points.dim() != 1 or points.device.type != "cpu":
            kind = f"{tuple(points.shape)} {points.dtype} on {points.device}"
            raise StrategyError(f"the strategy {verb} {kind}, not a flat int64 tensor of positions on the CPU")
        if len(points) != size:
            raise StrategyError(f"the strategy {verb} {len(points)} points where the batch size is {size}")
        outside = points[(points < 0) | (points >= self.size)]
        if len(outside):
            some = ", ".join(map(str, outside[:5].tolist())) + (", ..." if len(outside) > 5 else "")
            raise StrategyError(f"the strategy {verb} [{some}], outside the pool of {self.size} points")
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[points] = True
        if twice := size - int(mask.sum()):
            raise StrategyError(f"the strategy {verb} {twice} of {size} points twice")
        if labeled := int(mask[self.labeled].sum()):
            raise StrategyError(f"the strategy {verb} {labeled} of {size} points that are labeled already")


def initial_set(labels: Labels, n_classes: int, size: int | None, seed: int, balanced: bool = False) -> Index:
    """The first labeled positions of a seed, the same for every strategy: uniform, or as even over classes as possible.

    ``size`` None: the whole pool.

    Raises:
        ConfigError: ``size`` is not in 1..N-1, or a class has too few points for a balanced set.
    """
    n_points = len(labels)
    if size is None:
        return torch.arange(n_points)
    if not 1 <= size < n_points:
        raise ConfigError(f"initial_size={size}, but the pool has {n_points} points: use 1 to {n_points - 1}")
    order = torch.from_numpy(rng_for(seed, "initial").permutation(n_points))
    if not balanced:
        return order[:size]
    # The k-th point of every class comes before the (k+1)-th of any: a stable sort by rank within the class.
    rank = torch.empty(n_points, dtype=torch.int64)
    for label in range(n_classes):
        members = torch.nonzero(labels[order] == label).flatten()
        rank[members] = torch.arange(len(members))
    chosen = order[rank.argsort(stable=True)[:size]]
    if size >= n_classes and len(labels[chosen].unique()) < n_classes:
        raise ConfigError(f"balanced=true, but some of the {n_classes} classes have no point in the pool")
    return chosen
