"""ImageData: a pool and a test split in memory; Request: what a reader of data sets is asked for."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dgal_bench.arrays import Index, Labels, Progress
from dgal_bench.config import DatasetConfig


@dataclass(frozen=True, eq=False)
class Subset:
    """``positions`` of a whole set ``of`` so many images that were kept, ascending."""

    positions: Index
    of: int

    def then(self, later: "Subset") -> "Subset":
        """A subset of this one, as places in the whole."""
        return Subset(self.positions[later.positions], self.of)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A pool of N images and a test split. Pixels are uint8; ``maximum`` is the value that means white (digits: 16).

    Embeddings take the place of images as (N, d, 1, 1) float32 with ``maximum`` 1.
    """

    name: str
    images: Tensor  # (N, channels, height, width) uint8
    labels: Labels  # (N,): the oracle's, never a strategy's
    test_images: Tensor
    test_labels: Labels
    n_classes: int
    maximum: int = 255
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the header says of them beside their sizes: class names, how labels were numbered, which split."""
    kept: Subset | None = None
    """Which images of the whole pool these are, where not all; ``test_kept``: the same of the test split.

    ``one_source``: both were split off one set, and are places in that.
    """
    test_kept: Subset | None = None
    one_source: bool = False

    @property
    def size(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def pool_sha256(self) -> str:
        """Of the pool's pixels, in order: the key of whatever is made from them without labels."""
        return _sha256(self.images)

    @cached_property
    def test_pixels_sha256(self) -> str:
        """Of the test images' pixels, in order."""
        return _sha256(self.test_images)

    @cached_property
    def sha256(self) -> str:
        """Of everything a result depends on: pixels and labels of both splits, in order."""
        return _sha256(self.images, self.labels, self.test_images, self.test_labels)


# Bytes of a tensor that are hashed at a time: a memory-mapped one need not fit in memory.
_BLOCK = 64 * 2**20


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        row = max(1, tensor[:1].numel() * tensor.element_size())
        for block in tensor.split(max(1, _BLOCK // row)):
            digest.update(block.contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Request:
    """Which data set is wanted, and where a reader finds its files and keeps what it has decoded.

    ``root``: the folder of all published data sets (``data=DIR``); a user's own lie at ``config.path``.
    """

    config: DatasetConfig
    root: Path
    cache: Path
    progress: Progress
