"""Batches of a VAE's training: uint8 images in memory or on disk, whole or shared out between processes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dgal_bench.arrays import Index


def as_float(images: Tensor, maximum: int) -> Tensor:
    """uint8 images -> float32 in [0, 1]."""
    # channels_last: 1.7 times faster on MNIST's VAE (two threads, with the fused Adam)
    return images.to(torch.float32, memory_format=torch.channels_last).div_(maximum)


class Batch(NamedTuple):
    """This process's rows of a batch: floats in [0, 1], their positions in the pool, and what their mean counts for.

    The mean over processes of ``weight`` x (mean loss of the rows) is the mean loss of the whole batch.
    """

    images: Tensor
    ids: Index
    weight: float


@dataclass(frozen=True)
class Share:
    """Which rows of every batch are this process's: every ``of``-th from ``rank`` on."""

    rank: int = 0
    of: int = 1

    def __call__(self, rows: Tensor) -> Tensor:
        return rows[self.rank :: self.of]


@dataclass(frozen=True, eq=False)
class Batches:
    """A share of batches of uint8 images, in a new order every epoch; a last batch of one is left out."""

    images: Tensor
    maximum: int
    ids: Index
    batch_size: int
    order: torch.Generator
    share: Share

    def __len__(self) -> int:
        return max(1, math.ceil((len(self.ids) - 1) / self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.ids), generator=self.order)
        for places in order.split(self.batch_size)[: len(self)]:
            own = self.share(places)
            weight = len(own) * self.share.of / len(places)
            # Without a row there is still a gradient to take part with: that of any row, times 0.
            ids = self.ids[own if len(own) else places[:1]]
            yield Batch(as_float(self.images[ids], self.maximum), ids, weight)
