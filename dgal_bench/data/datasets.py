"""Data sets by name: every one a pool and a test split of uint8 images in memory."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgal_bench.arrays import Labels, Progress
from dgal_bench.data.files import Source, check, missing, obtain
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
    def test_pixels_sha256(self) -> str:
        """Of the test images' pixels, in order."""
        return _sha256(self.test_images)

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


def _mnist_like(source: Source, root: Path) -> ImageData:
    """60,000 and 10,000 grey 28x28 images in torchvision's layout: ROOT/MNIST/raw/*-ubyte."""
    import torchvision

    parser = getattr(torchvision.datasets, source.torchvision_class)
    try:
        pool, test = (parser(str(root), train=train, download=False) for train in (True, False))
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise DataError(f"data set '{source.name}' cannot be read ({str(error).splitlines()[0]})") from error
    shapes = (tuple(pool.data.shape), tuple(test.data.shape))
    if shapes != ((60000, 28, 28), (10000, 28, 28)):
        raise DataError(f"data set '{source.name}' has shapes {shapes}, not 60,000 and 10,000 images of 28x28")
    return ImageData(
        source.name,
        pool.data.unsqueeze(1),
        pool.targets.long(),
        test.data.unsqueeze(1),
        test.targets.long(),
        n_classes=10,
    )


MNIST = Source(
    "mnist",
    "MNIST/raw",
    "MNIST",
    {
        "train-images-idx3-ubyte": (
            47_040_016,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        "train-labels-idx1-ubyte": (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
        "t10k-images-idx3-ubyte": (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        "t10k-labels-idx1-ubyte": (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    },
)
FASHION_MNIST = Source(
    "fashion_mnist",
    "FashionMNIST/raw",
    "FashionMNIST",
    {
        "train-images-idx3-ubyte": (
            47_040_016,
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        "train-labels-idx1-ubyte": (60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
        "t10k-images-idx3-ubyte": (7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        "t10k-labels-idx1-ubyte": (10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    },
)


@dataclass(frozen=True)
class Dataset:
    """How a data set is read from its root folder, and the files that this needs: None where it is embedded."""

    read: Callable[[Path], ImageData]
    source: Source | None = None


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(_digits),
    "mnist": Dataset(partial(_mnist_like, MNIST), MNIST),
    "fashion_mnist": Dataset(partial(_mnist_like, FASHION_MNIST), FASHION_MNIST),
}


def fetch(name: str, root: Path, progress: Progress, offline: bool = False) -> None:
    """The prepare step, the only one that downloads: the files of a data set under ``root``, checked.

    Raises:
        ConfigError: no such data set.
        DataError: a file cannot be had, or one that is there is not the published one.
    """
    if source := choose(DATASETS, name, "data set").source:
        obtain(source, root, progress, offline)


def whereabouts(name: str, root: Path) -> str:
    """One line: embedded, checked and where, or not there. A damaged file raises DataError."""
    source = choose(DATASETS, name, "data set").source
    if source is None:
        return "ships inside scikit-learn"
    where = source.at(root).resolve()
    if gone := missing(source, where):
        return (
            f"{len(gone)} of {len(source.files)} files are not there, at {where}: `dgal-bench data {name}` fetches them"
        )
    check(source, root)
    return f"{len(source.files)} files, {source.size / 1e6:.1f} MB, as published, at {where}"


def load(name: str, root: Path, pool_size: int | None = None, test_size: int | None = None) -> ImageData:
    """The data set called ``name``, optionally a seeded subset of it (smoke runs).

    Raises:
        ConfigError: no such data set, or a subset larger than the set.
        DataError: its files are missing, truncated or not the published ones under ``root``.
    """
    dataset = choose(DATASETS, name, "data set")
    if dataset.source:
        check(dataset.source, root)
    data = dataset.read(root)
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
