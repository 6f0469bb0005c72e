"""Data sets by name: every one a pool and a test split of uint8 images in memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dgal_bench.core.errors import ConfigError, choose
from dgal_bench.core.seeding import rng_for
from dgal_bench.core.types import Progress
from dgal_bench.data import mini_imagenet
from dgal_bench.data.array_file import read_array_file
from dgal_bench.data.image_data import DatasetRequest, ImageData, Subset
from dgal_bench.data.image_folder import read_image_folder
from dgal_bench.data.torchvision import (
    CIFAR10,
    CIFAR100,
    EMNIST,
    FASHION_MNIST,
    MNIST,
    SVHN,
    Source,
    check_content,
    missing_files,
    prepare_files,
    read_published,
    refuse_settings,
)


def _digits(request: DatasetRequest) -> ImageData:
    """1,797 images of 8x8 that ship inside scikit-learn; 360 of them, stratified with seed 0, are the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    refuse_settings(request.config)
    raw = load_digits()
    images = torch.from_numpy(raw.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(raw.target.astype(np.int64))
    pool, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=raw.target, random_state=0)
    parts = images[pool], labels[pool], images[test], labels[test]
    return ImageData(request.config.name, *parts, n_classes=10, maximum=16)


@dataclass(frozen=True)
class Dataset:
    """The reader of a data set, and the published files that it needs, if any.

    Without published files: ``describe`` says where the data are; ``folder`` is the one under the root that users fill
    by hand, if there is one.
    """

    read: Callable[[DatasetRequest], ImageData]
    source: Source | None = None
    describe: Callable[[Path], str] = lambda root: "your own: dataset.path says where"
    folder: str | None = None


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(_digits, describe=lambda root: "ships inside scikit-learn"),
    "mnist": Dataset(partial(read_published, MNIST), MNIST),
    "fashion_mnist": Dataset(partial(read_published, FASHION_MNIST), FASHION_MNIST),
    "emnist": Dataset(partial(read_published, EMNIST), EMNIST),
    "svhn": Dataset(partial(read_published, SVHN), SVHN),
    "cifar10": Dataset(partial(read_published, CIFAR10), CIFAR10),
    "cifar100": Dataset(partial(read_published, CIFAR100), CIFAR100),
    "mini_imagenet": Dataset(
        mini_imagenet.read_mini_imagenet, describe=mini_imagenet.describe_mini_imagenet, folder="mini_imagenet"
    ),
    "folder": Dataset(read_image_folder),
    "npz": Dataset(read_array_file),
}


def fetch(name: str, root: Path, progress: Progress, offline: bool = False) -> None:
    """The prepare step, the only one that downloads: the files of a data set under ``root``.

    Raises:
        ConfigError: no such data set.
        DataError: a file cannot be fetched.
    """
    if source := choose(DATASETS, name, "data set").source:
        prepare_files(source, root, progress, offline)


def describe_files(name: str, root: Path) -> str:
    """One line on where the files are and what is missing. Other content than the published one raises DataError."""
    dataset = choose(DATASETS, name, "data set")
    source = dataset.source
    if source is None:
        return dataset.describe(root)
    where = source.at(root).resolve()
    if n := len(missing_files(source, root)):
        return f"{n} of {len(source.files)} files are not there, at {where}: `dgal-bench data {name}` fetches them"
    check_content(source, root, name)
    size = sum((where / file).stat().st_size for file in source.files) / 1e6
    return f"{len(source.files)} files, {size:.1f} MB, as published, at {where}"


def load(request: DatasetRequest) -> ImageData:
    """The data set, or the seeded subset of it that ``pool_size`` and ``test_size`` give (smoke runs).

    Raises:
        ConfigError: no such data set, a setting that does not fit it, or a subset larger than the set.
        DataError: its files are missing, truncated or not the published ones.
    """
    config = request.config
    dataset = choose(DATASETS, config.kind, "dataset.kind")
    data = dataset.read(request)
    if config.n_classes not in (None, data.n_classes):
        raise ConfigError(f"dataset.n_classes={config.n_classes}, but {data.name} has {data.n_classes} classes")
    if config.pool_size is not None:
        part = _draw_subset(data.size, config.pool_size, data.name, "pool_size")
        images, labels = data.images[part.positions], data.labels[part.positions]
        data = replace(data, images=images, labels=labels, subset=data.subset.then(part) if data.subset else part)
    if config.test_size is not None:
        part = _draw_subset(len(data.test_images), config.test_size, data.name, "test_size")
        images, labels = data.test_images[part.positions], data.test_labels[part.positions]
        test_subset = data.test_subset.then(part) if data.test_subset else part
        data = replace(data, test_images=images, test_labels=labels, test_subset=test_subset)
    return data


def _draw_subset(available: int, size: int, name: str, key: str) -> Subset:
    if not 1 <= size <= available:
        raise ConfigError(f"dataset.{key}={size}, but {name} has {available} images to keep from: use 1 to {available}")
    chosen = rng_for(0, "subset", name, key).choice(available, size, replace=False)
    return Subset(torch.from_numpy(np.sort(chosen)), of=available)
