"""The pool: which training images are labeled, and the labels known so far."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dgal_bench.arrays import Index, Labels
from dgal_bench.errors import ConfigError, StrategyError
from dgal_bench.seeding import rng_for


@dataclass(frozen=True, eq=False)
class Pool:
    """N positions, of which ``labeled`` (in order of acquisition) have the known ``labels``.

    True labels of other points are not in here: they live with the oracle, in the loop.
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

    def check(self, batch: Index, batch_size: int) -> None:
        """Distrust every strategy: ``batch_size`` distinct unlabeled positions of the pool, or StrategyError."""
        if not isinstance(batch, Tensor):
            raise StrategyError(
                f"the strategy must pick a flat int64 tensor of positions, not a {type(batch).__name__}"
            )
        if batch.dtype != torch.int64 or batch.dim() != 1 or batch.device.type != "cpu":
            kind = f"{tuple(batch.shape)} {batch.dtype} on {batch.device}"
            raise StrategyError(f"the strategy must pick a flat int64 tensor of positions on the CPU, not {kind}")
        if len(batch) != batch_size:
            raise StrategyError(f"the strategy picked {len(batch)} points where the batch size is {batch_size}")
        outside = batch[(batch < 0) | (batch >= self.size)]
        if len(outside):
            raise StrategyError(f"the strategy picked {outside.tolist()}, outside the pool of {self.size} points")
        if twice := batch_size - len(batch.unique()):
            raise StrategyError(f"the strategy picked {twice} of {batch_size} points twice")
        if known := int((~self._unlabeled_mask()[batch]).sum()):
            raise StrategyError(f"the strategy picked {known} of {batch_size} points that are labeled already")


def initial_set(labels: Labels, n_classes: int, size: int, seed: int, balanced: bool = False) -> Index:
    """The first labeled positions of a seed, the same for every strategy: uniform, or as even over classes as can be.

    Raises:
        ConfigError: ``size`` is not in 1..N-1, or a class has too few points for a balanced set.
    """
    n_points = len(labels)
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
