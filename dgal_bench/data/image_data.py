"""ImageData: a pool and a test split in memory; DatasetRequest: what a reader of data sets gets; a stratified split."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench.config.schema import DatasetConfig
from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.core.seeding import rng_for
from dgal_bench.core.types import Index, Labels, Progress


@dataclass(frozen=True, eq=False)
class Subset:
    """Ascending ``positions`` in a whole set ``of`` so many images."""

    positions: Index
    of: int

    def then(self, inner: "Subset") -> "Subset":
        """A subset of this one, as positions in the whole."""
        return Subset(self.positions[inner.positions], self.of)


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
    """For the header: class names, how labels were numbered, which split."""
    subset: Subset | None = None
    """Which images of the whole pool these are; None: all. ``test_subset``: the same of the test split.

    ``one_source``: both were split off one set, and their positions are those in it.
    """
    test_subset: Subset | None = None
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
        """Of the pool's pixels, in order: the cache key of what is made from them without labels."""
        return _sha256(self.images)

    @cached_property
    def test_pixels_sha256(self) -> str:
        """Of the test images' pixels, in order."""
        return _sha256(self.test_images)

    @cached_property
    def sha256(self) -> str:
        """Of everything a result depends on: pixels and labels of both splits, in order."""
        return _sha256(self.images, self.labels, self.test_images, self.test_labels)


# Bytes hashed at a time: a memory-mapped tensor need not fit in memory.
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
class DatasetRequest:
    """Which data set to read, where its files are, and the cache for decoded images.

    ``root``: the folder of all published data sets (``data=DIR``); a user's own data are at ``config.path``.
    """

    config: DatasetConfig
    root: Path
    cache: Path
    progress: Progress


def own_path(request: DatasetRequest, what: str) -> Path:
    """``dataset.path``, which a user's own data need; ``what``: DIR or FILE, for the message."""
    config = request.config
    if not config.path:
        raise ConfigError(
            f"dataset={config.name} needs to know where your data are: set dataset.path={what} (make: DATA_PATH={what})"
        )
    return Path(os.path.expanduser(config.path))


def stratified_split(labels: Labels, classes: Sequence[str], share: float) -> tuple[Index, Index]:
    """Positions of pool and test split, ascending: of every class ``share``, rounded, is drawn for the test, seed 0.

    A class's draw depends on its name and size alone.

    Raises:
        ConfigError: the share is not within (0, 1), or leaves a class without an example in the pool or in the test.
        DataError: a class has one example.
    """
    if not 0 < share < 1:
        raise ConfigError(f"dataset.test_share={share}: use a share above 0 and below 1, such as 0.2")
    by_class = np.split(labels.argsort(stable=True).numpy(), np.cumsum(labels.bincount(minlength=len(classes)))[:-1])
    test = []
    for name, members in zip(classes, by_class, strict=True):
        n, n_test = len(members), int(share * len(members) + 0.5)
        if n == 1:
            raise DataError(
                f"class '{name}' has a single example, and a split needs one for the pool and one for the test: "
                "add examples, remove the class or bring a test split of your own"
            )
        if not 0 < n_test < n:
            side, way = ("pool", "lower") if n_test else ("test", "raise")
            raise ConfigError(
                f"dataset.test_share={share} leaves class '{name}' of {n} examples none for the {side}: {way} it"
            )
        test.append(members[rng_for(0, "test split", name).permutation(n)[:n_test]])
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.concatenate(test)] = True
    return torch.from_numpy(np.flatnonzero(~chosen)), torch.from_numpy(np.flatnonzero(chosen))
