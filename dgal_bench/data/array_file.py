"""A user's own arrays: images or embeddings and their labels, in an .npz file or a folder of .npy files."""

import logging
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from dgal_bench.core.errors import ConfigError, DataError, error_text
from dgal_bench.data.image_data import DatasetRequest, ImageData, Subset, own_path, stratified_split

log = logging.getLogger(__name__)


def read_array_file(request: DatasetRequest) -> ImageData:
    """``images`` uint8 (N, h, w), (N, h, w, c) or (N, c, h, w), or ``embeddings`` (N, d) of floats, at PATH.

    And ``labels`` (N,), integers or strings, which are numbered in sorted order; ``test_images`` (or
    ``test_embeddings``) and ``test_labels``, or a stratified split, seed 0. Other arrays are ignored, with a warning.
    PATH.npz is read into memory. The .npy files of a folder are memory-mapped: what needs no conversion, and no split
    drawn, may be larger than memory.

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
    request.progress(f"reading {path.name}", 0, 1)
    arrays = _read(path)
    described = [f"{name} {array.dtype} {array.shape}" for name, array in arrays.items()]
    points = [_points(path, name, array) for name, array in arrays.items() if not name.endswith("labels")]
    if len({split.shape[1:] for split in points}) > 1:
        raise DataError(f"{path} has {described[0]} but {described[2]}: both splits must be of the same shape")
    for i, split in enumerate(points):
        _check_labels(path, described[2 * i : 2 * i + 2], list(arrays.values())[2 * i + 1], len(split))
    names, numbers = np.unique(arrays["labels"], return_inverse=True)
    classes, labels, images = names.tolist(), torch.from_numpy(numbers), torch.from_numpy(points[0])
    if len(classes) == 1:
        raise DataError(f"{path}: all labels are {classes[0]!r}, but two classes or more are needed")
    if classes != list(range(len(classes))):
        some = ", ".join(map(repr, classes[:3])) + (", ..." if len(classes) > 3 else "")
        log.warning("labels of %s are numbered 0 to %d in sorted order: %s", path, len(classes) - 1, some)
    facts = {"classes": classes} | ({"memory_mapped": True} if path.is_dir() else {})
    maximum = 1 if images.is_floating_point() else 255
    if len(points) == 2:
        facts |= {"layout": f"{described[0]}, {described[2]}"}
        test_images, test_labels = torch.from_numpy(points[1]), _number(path, arrays["test_labels"], names)
        return ImageData(config.name, images, labels, test_images, test_labels, len(classes), maximum, facts)
    pool, test = stratified_split(labels, [str(name) for name in classes], config.test_share)
    facts |= {"layout": f"{described[0]}, {len(test):,} of {len(labels):,} split off by class, seed 0"}
    parts = images[pool], labels[pool], images[test], labels[test]
    subsets = Subset(pool, len(labels)), Subset(test, len(labels))
    return ImageData(config.name, *parts, len(classes), maximum, facts, *subsets, one_source=True)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays to use: points, labels, and those of the test split if there is one."""
    if path.is_dir():
        files = {file.stem: file for file in path.glob("*.npy")}
        with _reading_errors(path):  # copy-on-write: torch takes only writable arrays
            return {name: np.load(files[name], mmap_mode="c", allow_pickle=False) for name in _choose(path, files)}
    if not path.is_file():
        raise DataError(f"dataset.path={path} is not there, but must be an .npz file with images and labels")
    with _reading_errors(path), path.open("rb") as file:  # np.load would leave that of a damaged archive open
        contents = np.load(file, allow_pickle=False)
        if isinstance(contents, np.ndarray):
            raise DataError(f"{path} is a single array: save it by np.savez(path, images=..., labels=...)")
        arrays = {name: contents[name] for name in _choose(path, contents.files)}
        if strays := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{strays[0]} is no array")  # NumPy gives the bytes of any other file
        return arrays


def _choose(path: Path, names: Collection[str]) -> list[str]:
    """The names of the arrays to use."""
    there = f"there are: {', '.join(sorted(names)) or 'no arrays; dataset=folder reads image files'}"
    kinds = [kind for kind in ("images", "embeddings") if kind in names]
    if len(kinds) != 1:
        what = "both images and embeddings: keep one of them" if kinds else "neither images nor embeddings"
        raise DataError(f"{path} has {what}; {there}")
    required, tests = [kinds[0], "labels"], [f"test_{kinds[0]}", "test_labels"]
    if not set(tests).isdisjoint(names):
        required += tests
    if absent := [name for name in required if name not in names]:
        raise DataError(f"{path} has no {' and no '.join(absent)}; {there}")
    if unknown := sorted(set(names) - set(required)):
        log.warning("%s of %s are not used: known are %s", ", ".join(unknown), path, ", ".join([*required[:2], *tests]))
    return required


def _points(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """(N, channels, h, w) uint8 of images as they are stored, (N, d, 1, 1) float32 of embeddings."""
    what, shape = f"{path}: {name} {array.dtype} {array.shape}", array.shape
    if array.size == 0 or not shape:
        raise DataError(f"{what} is empty")
    if name.endswith("embeddings"):
        if array.dtype.kind != "f" or len(shape) != 2:
            raise DataError(f"{what} must be floats of shape (N, d)")
        with np.errstate(over="ignore"):  # too large for float32: infinity
            vectors = array.astype(np.float32, order="C", copy=False)
        if bad := int((~np.isfinite(vectors)).any(axis=1).sum()):
            raise DataError(f"{what}: {bad:,} of {len(array):,} hold NaN or infinity (as float32): repair or drop them")
        return vectors[:, :, None, None]
    if array.dtype != np.uint8:
        hint = ": for floats in [0, 1], (255 * images).round().astype(np.uint8)" if array.dtype.kind == "f" else ""
        raise DataError(f"{what} must be uint8, 0 to 255{hint}")
    first, last = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (1, 3))
    if first and last:
        raise DataError(
            f"{what} could be (N, channels, height, width) or (N, height, width, channels): save grey images as "
            "(N, height, width), and others of more than 3 pixels a side"
        )
    if not (first or last or len(shape) == 3):
        raise DataError(
            f"{what} must be (N, height, width), (N, height, width, channels) or (N, channels, height, width), with "
            "1 or 3 channels"
        )
    return np.ascontiguousarray(array if first else array.transpose(0, 3, 1, 2) if last else array[:, None])


def _check_labels(path: Path, described: list[str], labels: np.ndarray, n: int) -> None:
    if labels.dtype.kind not in "iuU":
        raise DataError(f"{path}: {described[1]} must be integers or strings (labels.astype(int) or astype(str))")
    if labels.shape != (n,):
        raise DataError(f"{path} has {described[1]} for {described[0]}: one label each, ({n},), please")


def _number(path: Path, labels: np.ndarray, classes: np.ndarray) -> torch.Tensor:
    """The positions of the test split's labels in the classes of the pool."""
    if (labels.dtype.kind == "U") != (classes.dtype.kind == "U"):
        raise DataError(f"{path}: labels are {classes.dtype}, test_labels {labels.dtype}: strings both, or integers")
    if len(unknown := np.setdiff1d(labels, classes)):
        some = ", ".join(map(repr, unknown[:3].tolist())) + (", ..." if len(unknown) > 3 else "")
        raise DataError(f"{path}: test_labels have {len(unknown)} classes that labels do not have: {some}")
    return torch.from_numpy(np.searchsorted(classes, labels))


@contextmanager
def _reading_errors(path: Path) -> Iterator[None]:
    """Turn the errors of NumPy, the archive or the disk into a DataError of one line."""
    try:
        yield
    except MemoryError as error:
        raise DataError(
            f"{path} does not fit in memory: unzip it into a folder, and set dataset.path to that ({error})"
        ) from error
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"{path} cannot be read ({error_text(error)}): is it whole? np.savez writes such a file"
        ) from error
