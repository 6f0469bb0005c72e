"""Data sets by name: every one a pool and a test split of uint8 images in memory."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgal_bench.arrays import Labels
from dgal_bench.errors import ConfigError, DataError, choose
from dgal_bench.seeding import rng_for


@dataclass(frozen=True, eq=False)
class ImageData:
    """A pool of N images and a test split. Pixels are uint8; ``maximum`` is the value that means white (digits: 16)."""

    name: str
    images: Tensor  # (N, channels, height, width) uint8
    labels: Labels  # (N,): the oracle's, never a strategy's
    test_images: Tensor
    test_labels: Labels
    n_classes: int
    maximum: int = 255

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
    def sha256(self) -> str:
        """Of everything a result depends on: pixels and labels of both splits, in order."""
        return _sha256(self.images, self.labels, self.test_images, self.test_labels)


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digits(root: Path) -> ImageData:
    """1,797 images of 8x8 that ship inside scikit-learn; 360 of them, stratified with seed 0, are the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = torch.from_numpy(raw.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(raw.target.astype(np.int64))
    pool, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=raw.target, random_state=0)
    return ImageData("digits", images[pool], labels[pool], images[test], labels[test], n_classes=10, maximum=16)


def _mnist_like(name: str, class_name: str, root: Path) -> ImageData:
    """60,000 and 10,000 grey 28x28 images in torchvision's layout: ROOT/<class_name>/raw/*-ubyte."""
    import torchvision

    source = getattr(torchvision.datasets, class_name)
    where = root / class_name / "raw"
    try:
        pool, test = (source(str(root), train=train, download=False) for train in (True, False))
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        what = "is not complete" if where.is_dir() else "is not there"
        raise DataError(
            f"data set '{name}' {what} at {where.resolve()} ({str(error).splitlines()[0]}): put the four *-ubyte "
            "files of the set there, or set DGAL_DATA (or data=DIR) to the folder that holds them"
        ) from error
    shapes = (tuple(pool.data.shape), tuple(test.data.shape))
    if shapes != ((60000, 28, 28), (10000, 28, 28)):
        raise DataError(f"data set '{name}' at {where} has shapes {shapes}, not 60,000 and 10,000 images of 28x28")
    return ImageData(
        name, pool.data.unsqueeze(1), pool.targets.long(), test.data.unsqueeze(1), test.targets.long(), n_classes=10
    )


DATASETS: dict[str, Callable[[Path], ImageData]] = {
    "digits": _digits,
    "mnist": lambda root: _mnist_like("mnist", "MNIST", root),
    "fashion_mnist": lambda root: _mnist_like("fashion_mnist", "FashionMNIST", root),
}


def load(name: str, root: Path, pool_size: int | None = None, test_size: int | None = None) -> ImageData:
    """The data set called ``name``, optionally a seeded subset of it (smoke runs).

    Raises:
        ConfigError: no such data set, or a subset larger than the set.
        DataError: its files are missing, truncated or of the wrong shape under ``root``.
    """
    data = choose(DATASETS, name, "data set")(root)
    if pool_size is not None:
        keep = _subset(data.size, pool_size, name, "pool_size")
        data = replace(data, images=data.images[keep], labels=data.labels[keep])
    if test_size is not None:
        keep = _subset(len(data.test_images), test_size, name, "test_size")
        data = replace(data, test_images=data.test_images[keep], test_labels=data.test_labels[keep])
    return data


def _subset(available: int, size: int, name: str, key: str) -> Tensor:
    if not 1 <= size <= available:
        raise ConfigError(f"dataset.{key}={size}, but {name} has {available} images to keep from: use 1 to {available}")
    chosen = rng_for(0, "subset", name, key).choice(available, size, replace=False)
    return torch.from_numpy(np.sort(chosen))
