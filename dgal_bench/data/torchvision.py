"""Published data sets, from MNIST to CIFAR-100: what their files must be, how they are read, and how they are fetched.

Folders are torchvision's. Only ``prepare_files`` writes below the data folder, one process at a time.
"""

import fcntl
import gzip
import hashlib
import json
import os
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from string import ascii_lowercase
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dgal_bench.config.schema import DatasetConfig
from dgal_bench.core.cache import Arrays, get_or_make, key_of
from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.core.types import Progress
from dgal_bench.data.image_data import DatasetRequest, ImageData

_MEGABYTE = 1_000_000

ArchiveContents: TypeAlias = Iterator[tuple[str, bytes]]
"""(name of a file of the data set, its next megabyte); the last chunk of each file is empty."""

Unpack: TypeAlias = Callable[[Path, Mapping[str, str]], ArchiveContents]
"""(archive, path inside it -> name of the data set's file) -> the contents of these members, in one pass."""


@dataclass(frozen=True)
class Archive:
    """A published file; ``members``: path inside it -> name of the data set's file.

    ``unpack`` None: it is not packed, but the data set's file itself.
    """

    name: str
    members: Mapping[str, str]
    unpack: Unpack | None


@dataclass(frozen=True)
class Address:
    """Where an archive is published: its md5, and the URLs to try in turn."""

    md5: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class File:
    """The published size in bytes and ``digest``, "sha256:..." or "md5:..."; None where it is not published."""

    size: int | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set's files under the root, what they must be, and the archives that hold them.

    ``folder``: of files and archives, "." for the root itself. ``addresses``: torchvision's class -> the address of
    each archive. ``counts``: images of the pool and of the test split.
    """

    name: str
    folder: str
    torchvision_class: str
    files: Mapping[str, File]
    archives: tuple[Archive, ...]
    addresses: Callable[[Any], Mapping[str, Address]]
    counts: tuple[int, int]

    def at(self, root: Path) -> Path:
        return root / self.folder

    @property
    def landmark(self) -> str:
        """The folder or file by which a root folder of this data set is recognised."""
        return self.folder if self.folder != "." else next(iter(self.files)).split("/")[0]

    def archive_addresses(self) -> Mapping[str, Address]:
        """By name; called only if a file is missing, as torchvision takes a second to import."""
        import torchvision

        return self.addresses(getattr(torchvision.datasets, self.torchvision_class))


def unpack_gzip(archive_path: Path, members: Mapping[str, str]) -> ArchiveContents:
    """A .gz of one file."""
    with _name_archive(archive_path), gzip.open(archive_path) as file:
        for name in members.values():
            yield from _chunks(name, file)


def unpack_tar(archive_path: Path, members: Mapping[str, str]) -> ArchiveContents:
    """A .tar.gz, read as a stream; no path inside it decides where a file is written."""
    with _name_archive(archive_path), gzip.open(archive_path) as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
        for entry in archive:
            file = archive.extractfile(entry) if entry.isfile() and entry.name in members else None
            if file:
                yield from _chunks(members[entry.name], file)


def unpack_zip_of_gzips(archive_path: Path, members: Mapping[str, str]) -> ArchiveContents:
    """A .zip whose members are a .gz of one file each."""
    with _name_archive(archive_path), zipfile.ZipFile(archive_path) as archive:
        for path in archive.namelist():
            if path in members:
                with archive.open(path) as member, gzip.open(member) as file:
                    yield from _chunks(members[path], file)


def _chunks(name: str, file: IO[bytes] | gzip.GzipFile) -> ArchiveContents:
    while chunk := file.read(_MEGABYTE):
        yield name, chunk
    yield name, b""


@contextmanager
def _name_archive(archive_path: Path) -> Iterator[None]:
    """Name the archive in errors of reading it; a full disk is not one of them, files are written outside of this."""
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{archive_path.resolve()} cannot be unpacked ({error}): delete it and try again") from error


def from_mirrors(publisher: Any) -> dict[str, Address]:
    """MNIST's: several archives, each on several mirrors."""
    return {
        name: Address(md5, tuple(f"{mirror}{name}" for mirror in publisher.mirrors))
        for name, md5 in publisher.resources
    }


def from_zip(publisher: Any) -> dict[str, Address]:
    """EMNIST's: one archive, named by the end of its URL."""
    return {publisher.url.rsplit("/", 1)[-1]: Address(publisher.md5, (publisher.url,))}


def from_tgz(publisher: Any) -> dict[str, Address]:
    """CIFAR's: one archive."""
    return {publisher.filename: Address(publisher.tgz_md5, (publisher.url,))}


def from_splits(publisher: Any) -> dict[str, Address]:
    """SVHN's: a file for each split, not packed."""
    return {name: Address(md5, (url,)) for url, name, md5 in publisher.split_list.values()}


def each_gz(files: Mapping[str, File]) -> tuple[Archive, ...]:
    """An archive of its own for each file."""
    return tuple(Archive(f"{name}.gz", {name: name}, unpack_gzip) for name in files)


def idx_files(prefixes: tuple[str, str], counts: tuple[int, int], *digests: str) -> dict[str, File]:
    """28x28 images and labels of pool and test split; an idx file is 4 bytes, 4 per dimension, and one per value.

    ``digests``: none, or of the four files in the order pool images, pool labels, test images, test labels.
    """
    sizes: dict[str, int] = {}
    for prefix, count in zip(prefixes, counts, strict=True):
        sizes |= {f"{prefix}-images-idx3-ubyte": 16 + count * 28**2, f"{prefix}-labels-idx1-ubyte": 8 + count}
    pairs = zip(sizes.items(), digests or (None,) * len(sizes), strict=True)
    return {name: File(size, digest) for (name, size), digest in pairs}


# Sizes and digests below are those of the unpacked files.
_MNIST_FILES = idx_files(
    ("train", "t10k"),
    (60_000, 10_000),
    "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
MNIST = Source("mnist", "MNIST/raw", "MNIST", _MNIST_FILES, each_gz(_MNIST_FILES), from_mirrors, (60_000, 10_000))

_FASHION_FILES = idx_files(
    ("train", "t10k"),
    (60_000, 10_000),
    "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
FASHION_MNIST = Source(
    "fashion_mnist",
    "FashionMNIST/raw",
    "FashionMNIST",
    _FASHION_FILES,
    each_gz(_FASHION_FILES),
    from_mirrors,
    (60_000, 10_000),
)

# Only the archive's digest is published: it is checked even if the user put the archive there.
_EMNIST_FILES = idx_files(("emnist-letters-train", "emnist-letters-test"), (124_800, 20_800))
EMNIST = Source(
    "emnist",
    "EMNIST/raw",
    "EMNIST",
    _EMNIST_FILES,
    (Archive("gzip.zip", {f"gzip/{name}.gz": name for name in _EMNIST_FILES}, unpack_zip_of_gzips),),
    from_zip,
    (124_800, 20_800),
)

_SVHN_FILES = {
    "train_32x32.mat": File(182_040_794, "md5:e26dedcc434d2e4c54c9b2d4a06d8373"),
    "test_32x32.mat": File(64_275_384, "md5:eb5a983be6a315427106f1b164d9cef3"),
}
SVHN = Source(
    "svhn",
    ".",
    "SVHN",
    _SVHN_FILES,
    tuple(Archive(name, {name: name}, unpack=None) for name in _SVHN_FILES),
    from_splits,
    (73_257, 26_032),
)

_CIFAR10_FILES = {
    "cifar-10-batches-py/data_batch_1": File(31_035_704, "md5:c99cafc152244af753f735de768cd75f"),
    "cifar-10-batches-py/data_batch_2": File(31_035_320, "md5:d4bba439e000b95fd0a9bffe97cbabec"),
    "cifar-10-batches-py/data_batch_3": File(31_035_999, "md5:54ebc095f3ab1f0389bbae665268c751"),
    "cifar-10-batches-py/data_batch_4": File(31_035_696, "md5:634d18415352ddfa80567beed471001a"),
    "cifar-10-batches-py/data_batch_5": File(31_035_623, "md5:482c414d41f54cd18b22e5b47cb7c3cb"),
    "cifar-10-batches-py/test_batch": File(31_035_526, "md5:40351d587109b95175f43aff81a1287e"),
    "cifar-10-batches-py/batches.meta": File(158, "md5:5ff9c542aee3614f3951f8cda6e48888"),
}
CIFAR10 = Source(
    "cifar10",
    ".",
    "CIFAR10",
    _CIFAR10_FILES,
    (Archive("cifar-10-python.tar.gz", {name: name for name in _CIFAR10_FILES}, unpack_tar),),
    from_tgz,
    (50_000, 10_000),
)

_CIFAR100_FILES = {
    "cifar-100-python/train": File(digest="md5:16019d7e3df5f24257cddd939b257f8d"),
    "cifar-100-python/test": File(digest="md5:f0ef6b0ae62326f3e7ffdfab6717acfc"),
    "cifar-100-python/meta": File(digest="md5:7973b15100ade9c7d40fb424638fde48"),
}
CIFAR100 = Source(
    "cifar100",
    ".",
    "CIFAR100",
    _CIFAR100_FILES,
    (Archive("cifar-100-python.tar.gz", {name: name for name in _CIFAR100_FILES}, unpack_tar),),
    from_tgz,
    (50_000, 10_000),
)


def mnist_like(source: Source, request: DatasetRequest) -> ImageData:
    """Grey 28x28 images in torchvision's layout: ROOT/MNIST/raw/*-ubyte."""
    import torchvision

    classes = getattr(torchvision.datasets, source.torchvision_class).classes
    return _check_pixels(source, _image_data(source, _idx(source, request), {"classes": classes}), (1, 28, 28))


def emnist_letters(source: Source, request: DatasetRequest) -> ImageData:
    """Grey 28x28 images of letters; they are published transposed and with labels from 1 on, and both are undone."""
    images, labels, test_images, test_labels = _idx(source, request)
    parts = [images.mT.contiguous(), labels - 1, test_images.mT.contiguous(), test_labels - 1]
    return _check_pixels(source, _image_data(source, parts, {"classes": list(ascii_lowercase)}), (1, 28, 28), first=1)


def svhn(source: Source, request: DatasetRequest) -> ImageData:
    """32x32 house numbers (label 10 is the digit 0): ROOT/{train,test}_32x32.mat, decoded once into the cache."""
    return _cached(_decode_svhn, source, request)


def cifar(source: Source, request: DatasetRequest) -> ImageData:
    """32x32 photographs: pickles in ROOT/cifar-10-batches-py or cifar-100-python, decoded into the cache."""
    return _cached(_decode_cifar, source, request)


def refuse_settings(config: DatasetConfig) -> None:
    """Settings for a user's own images do not apply to a published data set."""
    if config.path is not None:
        raise ConfigError(f"dataset.path={config.path}: {config.kind} is no data set of your own; use dataset=folder")
    if config.image_size is not None:
        raise ConfigError(
            f"dataset.image_size={config.image_size}: {config.kind} is read in its published size; "
            "net.input_size resizes at the network's door"
        )


def _idx(source: Source, request: DatasetRequest) -> list[Tensor]:
    """Pool images, labels, test images, labels: (n, 1, 28, 28) uint8 and (n,) int64, in the order of the files.

    By torchvision's functions, not its classes: those would read an old processed/*.pt instead of the files checked.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file

    refuse_settings(request.config)
    check_files(source, request.root)
    images, labels, test_images, test_labels = (str(source.at(request.root) / name) for name in source.files)
    with _parsing(source):
        pool = [read_image_file(images).unsqueeze(1), read_label_file(labels)]
        return [*pool, read_image_file(test_images).unsqueeze(1), read_label_file(test_labels)]


_PARTS = ("images", "labels", "test_images", "test_labels")
_DECODER_VERSION = 1
"""Raised with any change of the images that a decoder makes of the same files."""


def cache_key(source: Source) -> str:
    """Of the decoded images: the published digests and the decoder's version."""
    digests = {name: file.digest for name, file in source.files.items()}
    return key_of({"data_set": source.name, "files": digests, "decoder_version": _DECODER_VERSION})


def is_decoded(source: Source, cache: Path) -> bool:
    """Whether the images are in the cache: then the files are not needed."""
    return (cache / cache_key(source)).is_dir()


def _cached(
    decode: Callable[[Source, DatasetRequest], ImageData], source: Source, request: DatasetRequest
) -> ImageData:
    """The images from the cache; if they are not there, the files are checked and decoded into it."""
    refuse_settings(request.config)

    def make(folder: Path) -> tuple[Arrays, Mapping[str, Any]]:
        check_files(source, request.root)  # before any of CIFAR's pickles is opened: they must be the published ones
        data = _check_pixels(source, decode(source, request), (3, 32, 32))
        return {part: getattr(data, part).numpy() for part in _PARTS}, data.facts

    entry = get_or_make(request.cache, cache_key(source), make)
    parts = [torch.from_numpy(entry.arrays[part]) for part in _PARTS]
    return _image_data(source, parts, entry.facts | ({"memory_mapped": True} if entry.mapped else {}))


def _decode_svhn(source: Source, request: DatasetRequest) -> ImageData:
    splits = _splits(source, request, {"split": "train"}, {"split": "test"})
    parts = [part for split in splits for part in (_tensor(split.data), _tensor(split.labels))]
    return _image_data(source, parts, {"classes": [str(digit) for digit in range(10)]})


def _decode_cifar(source: Source, request: DatasetRequest) -> ImageData:
    splits = _splits(source, request, {"train": True}, {"train": False})
    parts = [part for split in splits for part in (_tensor(split.data).permute(0, 3, 1, 2), _tensor(split.targets))]
    return _image_data(source, [part.contiguous() for part in parts], {"classes": splits[0].classes})


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _splits(source: Source, request: DatasetRequest, *settings: Mapping[str, Any]) -> list[Any]:
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


@contextmanager
def _parsing(source: Source) -> Iterator[None]:
    """Turn the errors of a parser into a DataError of one line."""
    try:
        yield
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"data set '{source.name}' cannot be read ({reason}): {_advice(source)}") from error


def _image_data(source: Source, parts: list[Tensor], facts: Mapping[str, Any]) -> ImageData:
    images, labels, test_images, test_labels = parts
    n_classes = len(facts["classes"])
    return ImageData(source.name, images, labels, test_images, test_labels, n_classes=n_classes, facts=facts)


def _check_pixels(source: Source, data: ImageData, shape: tuple[int, int, int], first: int = 0) -> ImageData:
    """Catches other content of a file with no published digest, and a wrong entry of the registry.

    ``first``: the lowest label in the files, for the message; it is 0 in ``data``.
    """
    sizes = ((data.images, data.labels), (data.test_images, data.test_labels))
    for split, (images, labels), count in zip(("pool", "test"), sizes, source.counts, strict=True):
        if tuple(images.shape) != (count, *shape) or len(labels) != count:
            size = "x".join(map(str, images.shape))
            wrong = f"a {split} split of {size} and {len(labels):,} labels, not {count:,} images of {shape}"
        elif labels.min() < 0 or labels.max() >= data.n_classes:
            span = f"{labels.min() + first} to {labels.max() + first}"
            wrong = f"labels {span} in the {split} split, not {first} to {data.n_classes - 1 + first}"
        else:
            continue
        raise DataError(f"data set '{source.name}' has {wrong}: {_advice(source)}")
    return data


def _advice(source: Source) -> str:
    files = ", ".join(source.files)
    return f"delete {files} and run `dgal-bench data {source.name}`, or put the published files there"


def missing_files(source: Source, where: Path) -> list[str]:
    """The names of the files that are not in the folder."""
    return [name for name in source.files if not os.path.isfile(where / name)]


def check_files(source: Source, root: Path) -> None:
    """Every file is there, with the published size and digest where these are known.

    Raises:
        DataError: a file is missing, truncated or another.
    """
    where = source.at(root)
    if missing_files(source, where):
        raise _missing_error(source, where)
    for name, file in source.files.items():
        if problem := _file_problem(where / name, file):
            raise DataError(
                f"{(where / name).resolve()} of data set '{source.name}' {problem}: delete it and run "
                f"`dgal-bench data {source.name}`, or put the published file there"
            )


def _file_problem(path: Path, file: File) -> str | None:
    """How it differs from the published file; None: it does not."""
    try:
        size = path.stat().st_size
        if file.size is not None and size != file.size:
            return f"has {size:,} bytes where {file.size:,} are published"
        if file.digest is None:
            return None
        algorithm, _, digest = file.digest.partition(":")
        with path.open("rb") as stream:
            actual = hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if actual == digest:
        return None
    return f"is not the published one ({size:,} bytes, {algorithm} {actual[:12]}, not {digest[:12]})"


def _missing_error(source: Source, where: Path, why: str = "") -> DataError:
    missing = missing_files(source, where)
    state = "there" if len(missing) == len(source.files) else "complete"
    archives = [archive.name for archive in _archives_of(source, missing) if archive.unpack]
    if archives == [f"{name}.gz" for name in missing]:
        archives = ["their .gz"]
    files = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    return DataError(
        f"data set '{source.name}' is not {state} at {where.resolve()}{why}: run `dgal-bench data {source.name}` where "
        f"there is a network, or put {files}{' (or ' + ', '.join(archives) + ')' if archives else ''} there, or set "
        f"DGAL_DATA (or data=DIR) to the folder that holds {source.landmark}"
    )


def _archives_of(source: Source, files: Iterable[str]) -> list[Archive]:
    """The archives that hold any of these files."""
    return [archive for archive in source.archives if set(archive.members.values()) & set(files)]


def prepare_files(source: Source, root: Path, progress: Progress, offline: bool = False) -> None:
    """The prepare step: unpack the archives that are there, download the others, check all, and write a manifest.

    One process at a time. A file gets its name only when it is whole and as published, so that a kill leaves no half
    file. A file that is there is never replaced; after the manifest is written, only the readers check files.

    Raises:
        DataError: a file cannot be downloaded or written, or one that is there is not the published one.
    """
    where = source.at(root)
    missing = missing_files(source, where)
    if offline and not all(os.path.isfile(where / archive.name) for archive in _archives_of(source, missing)):
        raise _missing_error(source, where, " and offline=true forbids to download it")
    if missing:
        with _locked(source, where, progress):
            for archive in _archives_of(source, missing_files(source, where)):
                missing = missing_files(source, where)
                _write_manifest(source, where, dict.fromkeys(missing, _fetch(source, archive, where, progress)))
            check_files(source, root)
    elif not os.path.isfile(where / manifest_name(source)):
        check_files(source, root)
        with suppress(DataError), _locked(source, where, progress):  # a read-only folder goes without a manifest
            _write_manifest(source, where, {})


def manifest_name(source: Source) -> str:
    """With the name of the data set: several share one folder, the root."""
    return f"{source.name}.manifest.json"


@contextmanager
def _locked(source: Source, where: Path, progress: Progress) -> Iterator[None]:
    """Make the folder and lock it; the end of the process releases the lock. An OSError becomes a DataError."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        with (where / f".{source.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another process that fetches it", 0, 1)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise _missing_error(source, where, f" and cannot be put there ({error.strerror})") from error


def _write_manifest(source: Source, where: Path, origins: Mapping[str, str]) -> None:
    """For people: which files are there, the time of the check, and where each file came from."""
    manifest = where / manifest_name(source)
    try:
        earlier = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, KeyError):
        earlier = {}
    files = {
        name: {
            "bytes": (where / name).stat().st_size,
            "digest": file.digest,
            "from": origins.get(name) or earlier.get(name, {}).get("from", "found there"),
        }
        for name, file in source.files.items()
        if os.path.isfile(where / name)
    }
    part = manifest.with_name(f"{manifest.name}.part")
    content = {"data_set": source.name, "checked": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "files": files}
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.rename(manifest)


def _fetch(source: Source, archive: Archive, where: Path, progress: Progress) -> str:
    """Put missing files in their places, from an archive in the folder or a downloaded one; returns its origin."""
    archive_path, origin = where / archive.name, archive.name
    by_hand = archive_path.is_file()
    if by_hand:
        _check_archive(source, archive, archive_path)
    else:
        try:
            origin = download(source.archive_addresses()[archive.name], archive_path, progress)
        except DownloadError as error:
            raise _missing_error(source, where, f" and cannot be downloaded ({error})") from error
    if archive.unpack:
        _unpack(source, archive, archive.unpack, archive_path)
        if not by_hand:
            archive_path.unlink()
    return origin


def _check_archive(source: Source, archive: Archive, archive_path: Path) -> None:
    """Of an archive that the user put there: needed only if its files have no published digest of their own."""
    if all(source.files[name].digest for name in archive.members.values()):
        return
    md5 = source.archive_addresses()[archive.name].md5
    if problem := _file_problem(archive_path, File(digest=f"md5:{md5}")):
        raise DataError(f"{archive_path.resolve()} {problem}: delete it and try again")


def _unpack(source: Source, archive: Archive, unpack: Unpack, archive_path: Path) -> None:
    """Put the missing files of an archive in their places; the others stay as they are."""
    where = archive_path.parent
    missing = missing_files(source, where)
    members = {path: name for path, name in archive.members.items() if name in missing}
    for name, chunks in groupby(unpack(archive_path, members), key=lambda content: content[0]):
        _place(where / name, source.files[name], archive_path, (chunk for _, chunk in chunks))
    for path, name in members.items():
        if not os.path.isfile(where / name):
            raise DataError(f"{archive_path.resolve()} has no {path} inside: delete it and try again")


def _place(path: Path, file: File, archive_path: Path, chunks: Iterable[bytes]) -> None:
    """Write a temporary file next to it, and rename that only if it is the published file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        if problem := _file_problem(part, file):
            raise DataError(
                f"{archive_path.resolve()} holds another file: unpacked, {path.name} {problem}; delete it and try again"
            )
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


class DownloadError(Exception):
    """No URL served the published content; the message gives each URL and its failure."""


def download(address: Address, target: Path, progress: Progress) -> str:
    """Write to ``target`` what the first URL serves with the published md5; returns that URL.

    Raises:
        DownloadError: no URL serves it.
        OSError: ``target`` cannot be written.
    """
    import pooch  # type: ignore[import-untyped]
    import requests

    pooch.get_logger().setLevel("ERROR")
    errors = []
    for url in address.urls:
        fetch = pooch.HTTPDownloader(progressbar=_DownloadProgress(f"downloading {target.name}", progress), timeout=20)
        try:
            pooch.retrieve(url, f"md5:{address.md5}", fname=target.name, path=target.parent, downloader=fetch)
            return url
        except (requests.RequestException, ValueError) as error:  # not OSError: no other mirror mends a full disk
            errors.append(f"{url}: {_reason(error)}")
    raise DownloadError("; ".join(errors))


def _reason(error: Exception) -> str:
    """Why a request failed, in a few words."""
    import requests

    if isinstance(error, requests.Timeout):
        return "no answer in 20 s"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return " ".join(str(error).split())[:100]


class _DownloadProgress:
    """pooch's interface of a progress bar; reports whole megabytes."""

    def __init__(self, what: str, progress: Progress) -> None:
        self.total = 0
        self._what, self._progress = what, progress
        self._done, self._reported = 0, -1

    def update(self, n_bytes: int) -> None:
        self._done += n_bytes
        megabytes = self._done // _MEGABYTE
        if megabytes != self._reported:
            self._reported = megabytes
            self._progress(f"{self._what} (MB)", megabytes, max(1, self.total // _MEGABYTE))

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        pass
