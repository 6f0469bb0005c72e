"""Published data sets, from MNIST to CIFAR-100: fetched, unpacked and decoded by torchvision, in its layout.

Only ``prepare_files`` writes below the data folder, one process at a time. Every reading checks the content.
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dgal_bench.config.schema import DatasetConfig
from dgal_bench.core.errors import ConfigError, DataError, error_text
from dgal_bench.core.files import lock
from dgal_bench.core.types import Progress
from dgal_bench.data.image_data import DatasetRequest, ImageData

LabeledImages: TypeAlias = tuple[Tensor, Tensor, list[str]]
"""Images (n, channels, height, width) uint8, labels (n,) from 0 on, and the names of the classes."""


def grey(split: Any) -> LabeledImages:
    """28x28 images."""
    return split.data.unsqueeze(1), split.targets, split.classes


def letters(split: Any) -> LabeledImages:
    """EMNIST's 28x28 images are published transposed and with labels from 1 on; class 0 is "N/A"."""
    return split.data.mT.unsqueeze(1), split.targets - 1, split.classes[1:]


def house_numbers(split: Any) -> LabeledImages:
    """32x32 images; torchvision has put channels first and made 0 of label 10."""
    return torch.from_numpy(split.data), torch.from_numpy(split.labels), [str(digit) for digit in range(10)]


def photographs(split: Any) -> LabeledImages:
    """32x32 images, in torchvision with channels last."""
    return torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets), split.classes


@dataclass(frozen=True)
class Source:
    """A data set of torchvision's ``publisher`` class.

    ``folder``: of files and archives under the root, "." for the root itself. ``files``: the sha256 or md5 of each.
    ``archives``: publisher -> the md5 of each archive, or of each file that is not packed. ``sha256``: of the decoded
    ``ImageData``; None where the publisher itself compares the md5 of every file whenever it reads.
    """

    name: str
    publisher: str
    folder: str
    files: Mapping[str, str]
    archives: Callable[[Any], Mapping[str, str]]
    decode: Callable[[Any], LabeledImages]
    sha256: str | None = None
    splits: tuple[Mapping[str, Any], Mapping[str, Any]] = ({"train": True}, {"train": False})

    def at(self, root: Path) -> Path:
        return root / self.folder

    @property
    def landmarks(self) -> str:
        """The names in the root by which it is recognised."""
        return ", ".join(dict.fromkeys((self.at(Path()) / name).parts[0] for name in self.files))


MNIST = Source(
    "mnist",
    "MNIST",
    "MNIST/raw",
    {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    lambda publisher: dict(publisher.resources),
    grey,
    "a29846c00097402e1385927dd0ea6f27c46f6f30d6200a16d7ddb1cca3b8f0ba",
)
FASHION_MNIST = Source(
    "fashion_mnist",
    "FashionMNIST",
    "FashionMNIST/raw",
    {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    lambda publisher: dict(publisher.resources),
    grey,
    "36e93975cb25501bc3e132a9a5fe42f63d34ddb52d69c648bdc2f8483fe26dcd",
)
EMNIST = Source(
    "emnist",
    "EMNIST",
    "EMNIST/raw",
    {
        "emnist-letters-train-images-idx3-ubyte": "7a786db773b2096a7b9a3f3275388a27711f4451548c3ca8be96f09ae94371ae",
        "emnist-letters-train-labels-idx1-ubyte": "e8e94c3f4353d5532fd9604b939cb4c76e7847945b9b0d9ff7884d881dead6bc",
        "emnist-letters-test-images-idx3-ubyte": "d5895e82d14765b22a84342337bc5c25f1affd61cc97d3821d4e65504bbf8dbc",
        "emnist-letters-test-labels-idx1-ubyte": "22dbcde0a929a7f166bdac863b9195b2994d840a1e082f8f6daaeac5606376a6",
    },
    lambda publisher: {"gzip.zip": publisher.md5},  # of all splits, which are unpacked: 3 GB of disk until it is done
    letters,
    "062fec30b7bc5e57406a876a3886aa59d35caa887f88639bbe46694974069646",
    ({"split": "letters", "train": True}, {"split": "letters", "train": False}),
)
SVHN = Source(
    "svhn",
    "SVHN",
    ".",
    {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373", "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
    lambda publisher: {file: md5 for split, (_, file, md5) in publisher.split_list.items() if split != "extra"},
    house_numbers,
    splits=({"split": "train"}, {"split": "test"}),
)
CIFAR10 = Source(
    "cifar10",
    "CIFAR10",
    ".",
    {
        "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
        "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
        "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    lambda publisher: {publisher.filename: publisher.tgz_md5},
    photographs,
)
CIFAR100 = Source(
    "cifar100",
    "CIFAR100",
    ".",
    {
        "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
        "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "cifar-100-python/meta": "7973b15100ade9c7d40fb424638fde48",
    },
    lambda publisher: {publisher.filename: publisher.tgz_md5},
    photographs,
)


def refuse_settings(config: DatasetConfig) -> None:
    """Settings for a user's own images do not apply to a published data set."""
    if config.path is not None:
        raise ConfigError(f"dataset.path={config.path}: {config.kind} is no data set of your own; use dataset=folder")
    if config.image_size is not None:
        raise ConfigError(
            f"dataset.image_size={config.image_size}: {config.kind} is read in its published size; "
            "net.input_size resizes at the network's door"
        )


def read_published(source: Source, request: DatasetRequest) -> ImageData:
    """The data set, from its files under the root.

    Raises:
        ConfigError: a setting for a user's own images.
        DataError: files are missing, or their content is not the published one.
    """
    refuse_settings(request.config)
    return check_content(source, request.root, request.config.name)


def missing_files(source: Source, root: Path) -> list[str]:
    """The names of the files that are not there."""
    return [name for name in source.files if not os.path.isfile(source.at(root) / name)]


def check_content(source: Source, root: Path, name: str) -> ImageData:
    """The images under ``root``, as ``name``, if they are the published ones.

    Raises:
        DataError: they are not there, or others; it names the file, and its hash beside the published one.
    """
    if missing_files(source, root):
        raise _missing_error(source, root)
    try:
        data = _decode(source, root, name)
    except (RuntimeError, OSError, ValueError, TypeError, LookupError, AssertionError, EOFError, UnpicklingError) as e:
        raise _content_error(source, root, f"cannot be decoded: {error_text(e)}") from e
    if source.sha256 not in (None, data.sha256):
        raise _content_error(source, root, f"decoded content {_differs('sha256', data.sha256, source.sha256)}")
    return data


def _decode(source: Source, root: Path, name: str, download: bool = False) -> ImageData:
    publisher = _publisher(source)
    pool, test = (source.decode(publisher(str(root), download=download, **split)) for split in source.splits)
    images, labels, test_images, test_labels = (array.contiguous() for array in (*pool[:2], *test[:2]))
    classes = pool[2]
    return ImageData(name, images, labels, test_images, test_labels, len(classes), facts={"classes": classes})


def _publisher(source: Source) -> Any:
    import torchvision  # takes a second

    return getattr(torchvision.datasets, source.publisher)


def _content_error(source: Source, root: Path, why: str) -> DataError:
    """Names the first file that is not as published; ``why`` where all are, as with older torchvision's processed/."""
    for name, digest in source.files.items():
        if error := _file_error(source, source.at(root) / name, digest):
            return error
    where = ", ".join(str((root / name).resolve()) for name in source.landmarks.split(", "))
    return DataError(
        f"data set '{source.name}' at {source.at(root).resolve()} is not the published one ({why}): delete {where} and "
        f"run `dgal-bench data {source.name}`"
    )


def _file_error(source: Source, path: Path, digest: str) -> DataError | None:
    """The error for a file of another content than ``digest``, an md5 or a sha256; None: it has that."""
    algorithm = "md5" if len(digest) == 32 else "sha256"
    try:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
            why = f"is not the published file ({path.stat().st_size:,} bytes, {_differs(algorithm, actual, digest)})"
    except OSError as error:
        actual, why = "", f"cannot be read ({error.strerror})"
    if actual == digest:
        return None
    return DataError(
        f"{path.resolve()} of data set '{source.name}' {why}: delete it and run `dgal-bench data {source.name}`, or "
        "put the published file there"
    )


def _differs(algorithm: str, actual: str, expected: str | None) -> str:
    return f"{algorithm} {actual[:12]}, not {(expected or '')[:12]}"


def _missing_error(source: Source, root: Path, why: str = "") -> DataError:
    missing = missing_files(source, root)
    state = "there" if len(missing) == len(source.files) else "complete"
    files = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    packed = [name for name in source.archives(_publisher(source)) if name not in source.files]
    archives = f" (or {packed[0] if len(packed) == 1 else 'their .gz'})" if packed else ""
    return DataError(
        f"data set '{source.name}' is not {state} at {source.at(root).resolve()}{why}: run `dgal-bench data "
        f"{source.name}` where there is a network, or put {files}{archives} there, or set DGAL_DATA (or data=DIR) to "
        f"the folder that holds {source.landmarks}"
    )


def prepare_files(source: Source, root: Path, progress: Progress, offline: bool = False) -> None:
    """The prepare step, for missing files: unpack the archives that are there, download the others, check all.

    One process at a time, in a folder of its own: a file gets its name when it is as published, so a kill leaves no
    half file. A file that is there is never replaced; the readers check it.

    Raises:
        DataError: files cannot be downloaded or written, or an archive that is there is not the published one.
    """
    if not missing_files(source, root):
        return
    if offline and not all((source.at(root) / name).is_file() for name in source.archives(_publisher(source))):
        raise _missing_error(source, root, " and offline=true forbids to download it")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f".{source.name}", wait=True):
            if missing := missing_files(source, root):  # another process may have fetched them meanwhile
                _fetch(source, root, missing, progress)
    except OSError as error:
        raise _missing_error(source, root, f" and cannot be put there ({error_text(error)})") from error


_TIMEOUT_SECONDS = 20


def _fetch(source: Source, root: Path, missing: list[str], progress: Progress) -> None:
    """Put the missing files in their places. torchvision itself gives a half file its final name, hence ``part``."""
    where, part = source.at(root), root / f".{source.name}.part"
    shutil.rmtree(part, ignore_errors=True)  # of a killed process
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_SECONDS)  # torchvision sets none, and would wait for ever
    try:
        source.at(part).mkdir(parents=True)
        archives = source.archives(_publisher(source))
        for name, md5 in archives.items():
            if (where / name).is_file():
                if error := _file_error(source, where / name, md5):
                    raise error
                (source.at(part) / name).symlink_to((where / name).resolve())  # taken for downloaded
        progress(f"fetching {', '.join(archives)}", 0, 1)
        try:
            _decode(source, part, source.name, download=True)
        except (RuntimeError, HTTPException, OSError) as error:
            raise _missing_error(source, root, f" and cannot be fetched ({error_text(error)})") from error
        for name in missing:
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (source.at(part) / name).replace(where / name)
    finally:
        socket.setdefaulttimeout(timeout)
        shutil.rmtree(part, ignore_errors=True)
