"""Readers of published data sets: checked files become uint8 images, the slow formats by way of the cache."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench.cache import Arrays, get_or_make, key_of
from dgal_bench.config import DatasetConfig
from dgal_bench.data.files import Source, check
from dgal_bench.data.images import ImageData, Request
from dgal_bench.errors import ConfigError, DataError


def mnist_like(source: Source, request: Request) -> ImageData:
    """Grey 28x28 images in torchvision's layout: ROOT/MNIST/raw/*-ubyte."""
    import torchvision

    classes = getattr(torchvision.datasets, source.torchvision_class).classes
    return _verified(source, _image_data(source, _idx(source, request), {"classes": classes}), (1, 28, 28))


def emnist_letters(source: Source, request: Request) -> ImageData:
    """Grey 28x28 images of letters, published transposed and with labels that count from 1; both are undone."""
    images, labels, test_images, test_labels = _idx(source, request)
    parts = [images.mT.contiguous(), labels - 1, test_images.mT.contiguous(), test_labels - 1]
    return _verified(source, _image_data(source, parts, {"classes": list(ascii_lowercase)}), (1, 28, 28), first=1)


def svhn(source: Source, request: Request) -> ImageData:
    """32x32 house numbers, label 10 being the digit 0: ROOT/{train,test}_32x32.mat, decoded once into the cache."""
    return _cached(_decode_svhn, source, request)


def cifar(source: Source, request: Request) -> ImageData:
    """32x32 photographs: pickles in ROOT/cifar-10-batches-py or cifar-100-python, decoded once into the cache."""
    return _cached(_decode_cifar, source, request)


def refuse_settings(config: DatasetConfig) -> None:
    """Settings of users' own images mean nothing to a data set that is read as it was published."""
    if config.path is not None:
        raise ConfigError(f"dataset.path={config.path}: {config.kind} is no data set of your own; use dataset=folder")
    if config.image_size is not None:
        raise ConfigError(
            f"dataset.image_size={config.image_size}: {config.kind} is read in its published size; "
            "net.input_size resizes at the network's door"
        )


def _image_data(source: Source, parts: list[Tensor], facts: Mapping[str, Any]) -> ImageData:
    images, labels, test_images, test_labels = parts
    n_classes = len(facts["classes"])
    return ImageData(source.name, images, labels, test_images, test_labels, n_classes=n_classes, facts=facts)


def _verified(source: Source, data: ImageData, shape: tuple[int, int, int], first: int = 0) -> ImageData:
    """Where a size alone is published, other content passes for it; and should a line of the registry ever be wrong.

    ``first``: the label that is 0 by now, to speak of labels as they are in the files.
    """
    sizes = ((data.images, data.labels), (data.test_images, data.test_labels))
    for split, (images, labels), count in zip(("pool", "test"), sizes, source.counts, strict=True):
        if tuple(images.shape) != (count, *shape) or len(labels) != count:
            found = "x".join(map(str, images.shape))
            wrong = f"a {split} split of {found} and {len(labels):,} labels, not {count:,} images of {shape}"
        elif labels.min() < 0 or labels.max() >= data.n_classes:
            span = f"{labels.min() + first} to {labels.max() + first}"
            wrong = f"labels {span} in the {split} split, not {first} to {data.n_classes - 1 + first}"
        else:
            continue
        raise DataError(f"data set '{source.name}' has {wrong}: {_instead(source)}")
    return data


@contextmanager
def _parsing(source: Source) -> Iterator[None]:
    """A parser's refusal, as one line."""
    try:
        yield
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"data set '{source.name}' cannot be read ({why}): {_instead(source)}") from error


def _instead(source: Source) -> str:
    files = ", ".join(source.files)
    return f"delete {files} and run `dgal-bench data {source.name}`, or put the published files there"


def _idx(source: Source, request: Request) -> list[Tensor]:
    """Pool images, labels, test images, labels: (n, 1, 28, 28) uint8 and (n,) int64, in the order of the files.

    By torchvision's functions and not its classes: those would prefer a processed/*.pt of old to the files checked.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file

    refuse_settings(request.config)
    check(source, request.root)
    images, labels, test_images, test_labels = (str(source.at(request.root) / name) for name in source.files)
    with _parsing(source):
        pool = [read_image_file(images).unsqueeze(1), read_label_file(labels)]
        return [*pool, read_image_file(test_images).unsqueeze(1), read_label_file(test_labels)]


_PARTS = ("images", "labels", "test_images", "test_labels")
_DECODER_VERSION = 1
"""Raised with any change of what a decoder makes of the same files."""


def cache_key(source: Source) -> str:
    """Of the decoded images: what was published, and how it was read."""
    digests = {name: file.digest for name, file in source.files.items()}
    return key_of({"data_set": source.name, "files": digests, "decoder_version": _DECODER_VERSION})


def is_decoded(source: Source, cache: Path) -> bool:
    """Whether the images are in the cache: the files need not even be there any more."""
    return (cache / cache_key(source)).is_dir()


def _cached(decode: Callable[[Source, Request], ImageData], source: Source, request: Request) -> ImageData:
    """The images from the cache, or from the files by way of it: those are checked when they are decoded."""
    refuse_settings(request.config)

    def make(folder: Path) -> tuple[Arrays, Mapping[str, Any]]:
        check(source, request.root)  # also because CIFAR's are pickles, which must be the published ones to be opened
        data = _verified(source, decode(source, request), (3, 32, 32))
        return {part: getattr(data, part).numpy() for part in _PARTS}, data.facts

    entry = get_or_make(request.cache, cache_key(source), make)
    parts = [torch.from_numpy(entry.arrays[part]) for part in _PARTS]
    return _image_data(source, parts, entry.facts | ({"memory_mapped": True} if entry.mapped else {}))


def _decode_svhn(source: Source, request: Request) -> ImageData:
    splits = _splits(source, request, {"split": "train"}, {"split": "test"})
    parts = [part for split in splits for part in (_tensor(split.data), _tensor(split.labels))]
    return _image_data(source, parts, {"classes": [str(digit) for digit in range(10)]})


def _decode_cifar(source: Source, request: Request) -> ImageData:
    splits = _splits(source, request, {"train": True}, {"train": False})
    parts = [part for split in splits for part in (_tensor(split.data).permute(0, 3, 1, 2), _tensor(split.targets))]
    return _image_data(source, [part.contiguous() for part in parts], {"classes": splits[0].classes})


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _splits(source: Source, request: Request, *settings: Mapping[str, Any]) -> list[Any]:
    """torchvision's data sets of both splits."""
    import torchvision

    parser = getattr(torchvision.datasets, source.torchvision_class)
    splits: list[Any] = []
    with _parsing(source):
        for setting in settings:
            request.progress(f"decoding {source.name}", len(splits), len(settings))
            splits.append(parser(str(source.at(request.root)), download=False, **setting))
    request.progress(f"decoding {source.name}", len(splits), len(settings))
    return splits
