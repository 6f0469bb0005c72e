"""Images with classes to be told apart, generated, and the network, the slices and the per-item loader over them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from dgal_bench.config.compose import compose
from dgal_bench.config.schema import RunConfig
from dgal_bench.core.seeding import isolated, rng_for, torch_rng_for
from dgal_bench.data import datasets
from dgal_bench.data.datamodule import PoolDataModule, Standardise, channel_statistics
from dgal_bench.data.image_data import DatasetRequest, ImageData
from dgal_bench.data.pool import Pool
from dgal_bench.models.nets import build_net
from dgal_bench.models.task import TaskModule

SEED = 0
SIDE = 28
_COARSE = 7  # runs a side of a class's pattern: convolutions see edges, as in drawn strokes


def settings(*overrides: str, strategy: str = "margin", dataset: str = "mnist") -> RunConfig:
    """A run's configuration, on the CPU: MNIST's network, batch sizes and training unless ``overrides`` say else."""
    choices = {"dataset": dataset, "representation": "default", "profile": "paper", "strategy": strategy}
    return compose(choices, ["device=cpu", f"seed={SEED}", *overrides])


def patterns(n_images: int, n_classes: int, role: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, 28, 28) uint8 and (n,) int64: one pattern per class, half covered by noise."""
    coarse = rng_for(SEED, "benchmark patterns").integers(0, 256, (n_classes, _COARSE, _COARSE), dtype=np.uint8)
    run = SIDE // _COARSE
    rng = rng_for(SEED, "benchmark", role)
    labels = rng.integers(n_classes, size=n_images)
    images = rng.integers(0, 128, (n_images, SIDE, SIDE), dtype=np.uint8)
    images += (coarse.repeat(run, axis=1).repeat(run, axis=2) // 2)[labels]
    return images, labels


def generated(n_pool: int, n_test: int, n_classes: int = 10) -> ImageData:
    """In memory, as any other data set."""
    parts = [*patterns(n_pool, n_classes, "pool"), *patterns(n_test, n_classes, "test")]
    images, labels, test_images, test_labels = map(torch.from_numpy, parts)
    return ImageData("generated", images[:, None], labels, test_images[:, None], test_labels, n_classes)


def coloured(data: ImageData) -> ImageData:
    """The same in CIFAR-10's shape: three channels and 32x32 pixels."""

    def shaped(images: Tensor) -> Tensor:
        return F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1)

    return replace(data, images=shaped(data.images), test_images=shaped(data.test_images))


def mixture(labels: np.ndarray, n_classes: int, n_features: int, role: str) -> np.ndarray:
    """(n, d) float32: a cloud per class, as far from each other as half of their own width."""
    centres = rng_for(SEED, "benchmark centres").standard_normal((n_classes, n_features), dtype=np.float32) / 2
    latents = rng_for(SEED, "benchmark latents", role).standard_normal((len(labels), n_features), dtype=np.float32)
    latents += centres[labels]
    return latents


def write_files(folder: Path, n_pool: int, n_test: int, n_classes: int, n_features: int) -> None:
    """set.npz, latents.npy and test_latents.npy, as a user would bring images and embeddings of them."""
    images, labels = patterns(n_pool, n_classes, "pool")
    test_images, test_labels = patterns(n_test, n_classes, "test")
    np.savez(folder / "set.npz", images=images, labels=labels, test_images=test_images, test_labels=test_labels)
    np.save(folder / "latents.npy", mixture(labels, n_classes, n_features, "pool"))
    np.save(folder / "test_latents.npy", mixture(test_labels, n_classes, n_features, "test"))


def mnist(config: RunConfig, root: Path, n_images: int) -> ImageData:
    """The first images of the real one under ``root``, in torchvision's layout; DataError where it is not there."""
    no_cache = root  # MNIST's files need no decoding
    data = datasets.load(DatasetRequest(config.dataset, root, no_cache, lambda what, done, of: None))
    return replace(data, images=data.images[:n_images], labels=data.labels[:n_images])


def first_pool(data: ImageData, n_labeled: int) -> Pool:
    """With the first points labeled: generated ones are in no order."""
    return Pool(data.size, data.n_classes, torch.arange(n_labeled), data.labels[:n_labeled])


def new_module(config: RunConfig, data: ImageData) -> TaskModule:
    """As Run.new_module makes it: the same weights every time."""
    with isolated(config.seed, "weights", 0):
        net = build_net(data.image_shape, data.n_classes, config.net)
    return TaskModule(net, data.n_classes, config.training)


def standardise(config: RunConfig, data: ImageData) -> Standardise:
    """A pass over the whole pool: made once for all repetitions."""
    return Standardise.of_pool(data, config.net.channels_last)


def datamodule(config: RunConfig, data: ImageData, pool: Pool, transform: Standardise) -> PoolDataModule:
    """As Run.datamodule makes it: the same order of the labeled points every time."""
    order = torch_rng_for(config.seed, "order", 0)
    return PoolDataModule(data, pool, transform, config.training.train_batch_size, config.predict_batch_size, order)


class PerItem(Dataset[tuple[Tensor, int]]):
    """The usual data set: a picture of an array is made a tensor and normalised, one at a time.

    By way of a PIL image, as in torchvision's own MNIST, an item takes more than twice as long still.
    """

    def __init__(self, data: ImageData) -> None:
        mean, deviation = channel_statistics(data.images, data.maximum)
        self.images = data.images.permute(0, 2, 3, 1).numpy()
        self.labels = data.labels.tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(mean.tolist(), deviation.tolist())]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]
