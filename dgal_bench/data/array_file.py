"""A user's own arrays: images or embeddings and their labels in one .npz file, streamed into the cache.

Arrays are known from their headers, read piece by piece, and never unpickled.
"""

import logging
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from dgal_bench.core.cache import Arrays, file_sha256, get_or_make, key_of
from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.core.types import Progress
from dgal_bench.data.image_data import DatasetRequest, ImageData, Subset, own_path, stratified_split
from dgal_bench.data.image_folder import StepProgress, new_array

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ArrayMember:
    """An array of the file, as its header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    def read(self) -> np.ndarray:
        """All of it, in memory."""
        with _stream(self.path, self.name) as stream:
            array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
            stream.read(1)  # zipfile compares the checksum at the end of the stream
        return array

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """So many rows at a time; in Fortran's order no row is complete before the last byte, so that all are read."""
        if self.fortran:
            array = self.read()
            yield from (array[start : start + rows] for start in range(0, len(array), rows))
            return
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with _stream(self.path, self.name) as stream:
            _header(stream)
            for start in range(0, self.shape[0], rows):
                n = min(rows, self.shape[0] - start)
                if len(content := stream.read(n * row)) < n * row:
                    raise EOFError(f"{self.name} ends within row {start + len(content) // row}")
                yield np.frombuffer(content, self.dtype).reshape(n, *self.shape[1:])
            stream.read(1)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.shape}"


@dataclass(frozen=True, eq=False)
class ArrayContents:
    """The arrays used: points and their labels, and those of a test split if the file has one."""

    points: ArrayMember
    labels: ArrayMember
    test: tuple[ArrayMember, ArrayMember] | None

    @property
    def kind(self) -> str:
        """Images or embeddings."""
        return self.points.name


READER_VERSION = 2
"""Raised with any change of the arrays that are made of the same file."""

_PARTS = ("points", "labels", "test_points", "test_labels")
_BLOCK = 64 * 2**20  # bytes in memory at a time


def read_array_file(request: DatasetRequest) -> ImageData:
    """PATH.npz with ``images`` uint8 (N, h, w), (N, h, w, c) or (N, c, h, w), or ``embeddings`` (N, d) of floats.

    And ``labels`` (N,), integers or strings, which are numbered in sorted order; ``test_images`` (or
    ``test_embeddings``) and ``test_labels``, or a stratified split, seed 0. Other arrays are ignored, with a warning.

    Raises:
        ConfigError: no path, a setting for image files, or a test_share that does not fit.
        DataError: no such file, or arrays of other names, types or shapes.
    """
    path, config = own_path(request, "FILE.npz"), request.config
    if config.image_size is not None:
        raise ConfigError(
            f"dataset.image_size={config.image_size} is for image files: arrays are taken as they are; "
            "net.input_size resizes at the network's door"
        )
    contents = _contents(path, read_members(path))
    with reading_errors(path):
        digest = file_sha256(path)
    share = None if contents.test else config.test_share
    key = key_of({"npz": digest, "test_share": share, "reader": READER_VERSION})
    entry = get_or_make(request.cache, key, partial(_make, contents, share, request.progress))
    classes = entry.facts["classes"]
    if classes != list(range(len(classes))):
        some = ", ".join(map(repr, classes[:3])) + (", ..." if len(classes) > 3 else "")
        log.warning("labels of %s are numbered 0 to %d in sorted order: %s", path, len(classes) - 1, some)
    facts = {**entry.facts} | ({"memory_mapped": True} if entry.mapped else {})
    images, labels, test_images, test_labels = (torch.from_numpy(entry.arrays[name]) for name in _PARTS)
    maximum = 1 if contents.kind == "embeddings" else 255
    data = ImageData(
        config.name, images, labels, test_images, test_labels, n_classes=len(classes), maximum=maximum, facts=facts
    )
    if contents.test:
        return data
    n_source = len(labels) + len(test_labels)
    subset, test_subset = (Subset(torch.from_numpy(entry.arrays[name]), n_source) for name in ("places", "test_places"))
    return replace(data, subset=subset, test_subset=test_subset, one_source=True)


def read_members(path: Path) -> dict[str, ArrayMember]:
    """The arrays of the file by name, from their headers alone.

    Raises:
        DataError: there is no such file, or it is something else.
    """
    if path.is_dir():
        raise DataError(f"dataset.path={path} is a folder, but must be an .npz file: dataset=folder reads image files")
    if not path.is_file():
        raise DataError(f"dataset.path={path} is not there, but must be an .npz file with images and labels")
    if not zipfile.is_zipfile(path):
        with reading_errors(path), path.open("rb") as file:
            single = file.read(6) == np.lib.format.MAGIC_PREFIX
        what = "a single array" if single else "no .npz file, or a truncated one"
        raise DataError(f"dataset.path={path} is {what}: save it by np.savez(path, images=..., labels=...)")
    with reading_errors(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    members = {}
    for name in names:
        with _stream(path, name) as stream:
            shape, fortran, dtype = _header(stream)
        members[name] = ArrayMember(path, name, shape, dtype, fortran)
    return members


def _contents(path: Path, members: Mapping[str, ArrayMember]) -> ArrayContents:
    """The arrays to use, by their names; checks that their types and shapes fit each other."""
    names = ", ".join(sorted(members)) or "nothing"
    kinds = [kind for kind in ("images", "embeddings") if kind in members]
    if len(kinds) != 1:
        what = "both images and embeddings: keep one of them" if kinds else "neither images nor embeddings"
        raise DataError(f"{path} has {what}; there are: {names}")
    required = [kinds[0], "labels"]
    tests = [f"test_{name}" for name in required]
    if members.keys() & {*tests, "test_labels"}:
        required += tests
    if absent := [name for name in required if name not in members]:
        raise DataError(f"{path} has no {' and no '.join(absent)}; there are: {names}")
    if unknown := sorted(members.keys() - set(required)):
        choices = ", ".join(dict.fromkeys(required + tests))
        log.warning("%s of %s are not used: known are %s", ", ".join(unknown), path, choices)
    arrays = [members[name] for name in required]
    for array in arrays:
        _check_type(array)
    for points, labels in (arrays[:2], arrays[2:])[: len(arrays) // 2]:
        if labels.shape != points.shape[:1]:
            raise DataError(f"{path} has {labels} for {points}: one label each, ({points.shape[0]},), please")
    if len(arrays) == 4 and point_shape(arrays[0]) != point_shape(arrays[2]):
        raise DataError(f"{path} has {arrays[0]} but {arrays[2]}: both splits must be of the same shape")
    return ArrayContents(arrays[0], arrays[1], (arrays[2], arrays[3]) if len(arrays) == 4 else None)


def _check_type(member: ArrayMember) -> None:
    """Refuse types and shapes that cannot be read."""
    kind = member.name.removeprefix("test_")
    if member.dtype.hasobject:
        raise DataError(f"{member.path}: {member.name} holds Python objects (pickles), which are not read: save arrays")
    if 0 in member.shape or not member.shape:
        raise DataError(f"{member.path}: {member} is empty")
    if kind == "images" and member.dtype != np.uint8:
        hint = ": for floats in [0, 1], (255 * images).round().astype(np.uint8)" if member.dtype.kind == "f" else ""
        raise DataError(f"{member.path}: {member} must be uint8, 0 to 255{hint}")
    if kind == "embeddings" and (member.dtype.kind != "f" or len(member.shape) != 2):
        raise DataError(f"{member.path}: {member} must be floats of shape (N, d)")
    if kind == "labels" and member.dtype.kind not in "iuU":
        raise DataError(f"{member.path}: {member} must be integers or strings (labels.astype(int) or astype(str))")
    point_shape(member)


def point_shape(member: ArrayMember) -> tuple[int, ...]:
    """(channels, height, width) of images, (d, 1, 1) of embeddings, () of labels.

    Raises:
        DataError: images of which no axis, or either of two, may be the channels.
    """
    shape = member.shape[1:]
    if not member.name.endswith("images"):
        return (*shape, 1, 1) if shape else ()
    if len(shape) == 2:
        return 1, *shape
    if len(shape) == 3:
        first, last = shape[0] in (1, 3), shape[2] in (1, 3)
        if first and last:
            raise DataError(
                f"{member.path}: {member} could be (N, channels, height, width) or (N, height, width, channels): "
                "save grey images as (N, height, width), and others of more than 3 pixels a side"
            )
        if first or last:
            return shape if first else (shape[2], shape[0], shape[1])
    raise DataError(
        f"{member.path}: {member} must be (N, height, width), (N, height, width, channels) or "
        "(N, channels, height, width), with 1 or 3 channels"
    )


def _make(
    contents: ArrayContents, share: float | None, progress: Progress, folder: Path
) -> tuple[Arrays, Mapping[str, Any]]:
    raw = contents.labels.read()
    classes, labels = np.unique(raw, return_inverse=True)
    if len(classes) == 1:
        only = classes[0].item()
        raise DataError(f"{contents.labels.path}: all labels are {only!r}, but two classes or more are needed")
    if contents.test:
        test_points, test_labels = contents.test[0], _number_labels(contents.test[1], classes)
        copies = [
            (contents.points, {"points": np.arange(len(labels))}),
            (test_points, {"test_points": np.arange(len(test_labels))}),
        ]
        layout = f"{contents.points}, {test_points}"
    else:
        assert share is not None
        parts = stratified_split(torch.from_numpy(labels), [str(name) for name in classes], share)
        pool, test = (part.numpy() for part in parts)
        labels, test_labels = labels[pool], labels[test]
        copies = [(contents.points, {"points": pool, "test_points": test})]
        layout = f"{contents.points}, {len(test):,} of {len(raw):,} split off by class, seed 0"
    arrays = {"labels": labels, "test_labels": test_labels}
    if not contents.test:
        arrays |= {"places": pool, "test_places": test}
    steps = StepProgress("reading", sum(source.shape[0] for source, _ in copies), progress)
    for source, targets in copies:
        arrays |= _copy(source, targets, folder, steps)
    return arrays, {"classes": classes.tolist(), "layout": layout}


def _number_labels(labels: ArrayMember, classes: np.ndarray) -> np.ndarray:
    """The positions of the labels in the classes of the pool."""
    raw = labels.read()
    if (raw.dtype.kind == "U") != (classes.dtype.kind == "U"):
        raise DataError(f"{labels.path}: labels are {classes.dtype}, but {labels}: strings both, or integers")
    if len(unknown := np.setdiff1d(raw, classes)):
        some = ", ".join(map(repr, unknown[:3].tolist())) + (", ..." if len(unknown) > 3 else "")
        raise DataError(f"{labels.path}: {labels.name} have {len(unknown)} classes that labels do not have: {some}")
    return np.searchsorted(classes, raw)


def _copy(
    source: ArrayMember, targets: Mapping[str, np.ndarray], folder: Path, steps: StepProgress
) -> dict[str, np.ndarray]:
    """New arrays in the cache folder, each with the source's rows at its positions (ascending) in ``targets``."""
    embeddings, shape = source.name.endswith("embeddings"), point_shape(source)
    dtype = np.float32 if embeddings else np.uint8
    arrays = {name: new_array(folder, name, (len(rows), *shape), dtype) for name, rows in targets.items()}
    row = int(np.prod(shape)) * max(source.dtype.itemsize, 4)
    start = bad = 0
    for block in source.blocks(max(1, min(steps.step, _BLOCK // row))):
        points = _points(block, shape)
        bad += int((~np.isfinite(points)).any(axis=(1, 2, 3)).sum()) if embeddings else 0
        for name, rows in targets.items():
            low, high = np.searchsorted(rows, (start, start + len(block)))
            arrays[name][low:high] = points[rows[low:high] - start]
        start += len(block)
        steps(len(block))
    if bad:
        raise DataError(
            f"{source.path}: {bad:,} of {source.shape[0]:,} {source.name} hold NaN or infinity (as float32): "
            "repair or drop them"
        )
    return arrays


def _points(block: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(n, channels, height, width) uint8 of images as they are stored, (n, d, 1, 1) float32 of embeddings."""
    if block.dtype.kind == "f":
        with np.errstate(over="ignore"):  # too large for float32: infinity, which _copy counts
            return block.astype(np.float32).reshape(-1, *shape)
    last = block.ndim == 4 and block.shape[1:] != shape
    return block.transpose(0, 3, 1, 2) if last else block.reshape(-1, *shape)


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn the errors of NumPy, the archive or the disk into a DataError of one line."""
    try:
        yield
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}): is it whole? np.savez writes such a file") from error


@contextmanager
def _stream(path: Path, name: str) -> Iterator[IO[bytes]]:
    with reading_errors(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        yield stream


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the order is Fortran's, and type."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)
