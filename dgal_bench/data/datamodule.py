"""PoolDataModule: labeled, unlabeled and test loaders over slices of the same in-memory images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import lightning
import torch
from torch import Tensor

from dgal_bench.core.errors import UserError
from dgal_bench.core.types import Index, Labels
from dgal_bench.data.image_data import ImageData
from dgal_bench.data.pool import Pool

# Elements of the temporary float64 block of ``channel_statistics``: 32 MB.
_BLOCK = 4_000_000


def channel_statistics(images: Tensor, maximum: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of (N, c, h, w) images in [0, 1]; deviation 1 where it is 0."""
    per_image = images[0].numel()
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    square = torch.zeros_like(total)
    for block in images.split(max(1, _BLOCK // per_image)):
        pixels = block.double() / maximum
        total += pixels.sum(dim=(0, 2, 3))
        square += (pixels**2).sum(dim=(0, 2, 3))
    count = len(images) * per_image // images.shape[1]
    mean = total / count
    variance = square / count - mean**2
    # A channel that is constant in the pool may vary in the test split: it must not be blown up there.
    deviation = torch.where(variance > 1e-12, variance, 1.0).sqrt()
    return mean.float(), deviation.float()


@dataclass(frozen=True, eq=False)
class Standardise:
    """uint8 (b, c, h, w) -> float32: (pixels in [0, 1] - the pool's mean) / its deviation.

    One multiplication and one addition: ``scale`` and ``shift`` are (1, c, 1, 1). ``layout``: of the result.
    """

    scale: Tensor
    shift: Tensor
    layout: torch.memory_format

    @classmethod
    def of_pool(cls, data: ImageData, channels_last: bool) -> "Standardise":
        mean, deviation = (part.view(1, -1, 1, 1) for part in channel_statistics(data.images, data.maximum))
        # channels_last makes the CNN's training step about 1.4 times faster on a CPU (measured on MNIST's).
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return cls(scale=1 / (deviation * data.maximum), shift=-mean / deviation, layout=layout)

    def __call__(self, images: Tensor) -> Tensor:
        # a copy even of embeddings, which are floats already
        return images.to(torch.float32, memory_format=self.layout, copy=True).mul_(self.scale).add_(self.shift)


@dataclass(frozen=True, eq=False)
class SliceLoader:
    """Batches as slices of one tensor: no per-item Dataset, no worker processes (a quarter faster on tiny nets).

    Iterating yields ``(images, labels)`` of ``ids``; with a ``shuffle`` generator in a new order every epoch, and a
    last batch of one joins the batch before it: it would break BatchNorm.
    """

    images: Tensor
    labels: Labels
    ids: Index
    batch_size: int
    transform: Callable[[Tensor], Tensor]
    shuffle: torch.Generator | None = None

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        starts = list(range(0, len(self.ids), self.batch_size))
        if self.shuffle is not None and len(starts) > 1 and len(self.ids) - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], len(self.ids)], strict=True))

    def __len__(self) -> int:
        return len(self._bounds)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.ids
        if self.shuffle is not None:
            order = order[torch.randperm(len(order), generator=self.shuffle)]
        for start, stop in self._bounds:
            batch = order[start:stop]
            yield self.transform(self.images[batch]), self.labels[batch]


@dataclass(frozen=True, eq=False)
class EpochLoader:
    """A loader of one item, a whole pass: one Lightning step of TaskModule."""

    minibatches: SliceLoader

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[SliceLoader]:
        yield self.minibatches


def halve(batch_size: int) -> int:
    """Half as many images for the next pass, after one ran out of memory; also frees the GPU memory held by torch.

    Raises:
        UserError: the pass was of a single image.
    """
    if batch_size == 1:
        raise UserError("the pass of a single image runs out of memory: use a smaller net or device=cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return batch_size // 2


class PoolDataModule(lightning.LightningDataModule):
    """The loaders of one round.

    ``train_dataloader`` serves the labeled points with the labels known so far, ``predict_dataloader`` the unlabeled
    points (their labels are -1), ``test_dataloader`` the test split.
    """

    def __init__(
        self,
        data: ImageData,
        pool: Pool,
        transform: Callable[[Tensor], Tensor],
        train_batch_size: int,
        predict_batch_size: int,
        order: torch.Generator,
    ) -> None:
        super().__init__()
        known = torch.full((pool.size,), -1, dtype=torch.int64)
        known[pool.labeled] = pool.labels
        # The predictor of a query holds this module: it must hold only the labels that the pool knows.
        self.data = replace(data, labels=known)
        self.pool = pool
        self.transform = transform
        self.train_batch_size = train_batch_size
        self.predict_batch_size = predict_batch_size
        self.order = order

    def halve_batch(self) -> None:
        """Half the images per pass from now on, after one ran out of memory; errors as in ``halve``."""
        self.predict_batch_size = halve(self.predict_batch_size)

    def train_dataloader(self) -> EpochLoader:
        """One item: a pass over the labeled points in minibatches."""
        single = len(self.pool.labeled) == 1  # given twice: the same mean loss, and no batch of one
        ids = self.pool.labeled.repeat(2) if single else self.pool.labeled
        return EpochLoader(
            SliceLoader(self.data.images, self.data.labels, ids, self.train_batch_size, self.transform, self.order)
        )

    def predict_dataloader(self) -> SliceLoader:
        return self.positions(self.pool.unlabeled)

    def positions(self, ids: Index) -> SliceLoader:
        """Any positions of the pool, in the order given; the label of an unlabeled point is -1."""
        return SliceLoader(self.data.images, self.data.labels, ids, self.predict_batch_size, self.transform)

    def test_dataloader(self) -> SliceLoader:
        everything = torch.arange(len(self.data.test_images))
        return SliceLoader(
            self.data.test_images, self.data.test_labels, everything, self.predict_batch_size, self.transform
        )
