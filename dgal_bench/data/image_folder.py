"""A user's own image files, a folder for each class, become one uint8 array in the cache.

They are decoded once, by PIL in threads, and never all held in memory.
"""

import hashlib
import logging
import os
import shutil
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dgal_bench.config.schema import available_cores
from dgal_bench.core.cache import Arrays, get_or_make, key_of
from dgal_bench.core.errors import CacheError, ConfigError, DataError
from dgal_bench.core.types import Index, Labels, Progress
from dgal_bench.data.image_data import DatasetRequest, ImageData, Subset, own_path, stratified_split

log = logging.getLogger(__name__)

T = TypeVar("T")


class ImageFile(NamedTuple):
    """``name``: its path under the data set's root, with ``/`` between folders."""

    name: str
    size: int
    mtime_ns: int


class LabeledFiles(NamedTuple):
    """The files that become the pool or the test split."""

    files: list[ImageFile]
    labels: Labels


@dataclass(frozen=True, eq=False)
class ClassTree:
    """Classes in sorted order, each with its image files in sorted order; ``others``: ignored files."""

    classes: dict[str, list[ImageFile]]
    others: tuple[str, ...]

    @cached_property
    def files(self) -> list[ImageFile]:
        """Class by class."""
        return [file for files in self.classes.values() for file in files]

    @cached_property
    def labels(self) -> Labels:
        """(n,) of ``files``."""
        return torch.arange(len(self.classes)).repeat_interleave(torch.tensor([len(f) for f in self.classes.values()]))

    def part(self, positions: Index | None = None) -> LabeledFiles:
        """The files at these positions of ``files``; None: all."""
        if positions is None:
            return LabeledFiles(self.files, self.labels)
        return LabeledFiles([self.files[i] for i in positions.tolist()], self.labels[positions])


LAYOUTS = "train/CLASS/* with test/CLASS/*, or CLASS/*"
_TEST_NAMES = ("test", "val", "valid")  # the first that exists is the test split

# If all folders have such names, they are no classes but splits with unexpected names.
_SPLITS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "dev"))


def read_image_folder(request: DatasetRequest) -> ImageData:
    """PATH/train/CLASS/* with PATH/test/CLASS/* (or val, valid), or PATH/CLASS/* and a stratified split, seed 0.

    The folder of a class may have subfolders. Class names in sorted order are the labels 0..C-1. A class needs one
    image in the pool; where the split is drawn, it needs two in all.

    Raises:
        ConfigError: no path, images of several sizes without image_size, or a test_share that does not fit.
        DataError: no such folder, no classes, an empty class, or different classes in train and test.
    """
    root = own_path(request, "DIR")
    if not root.is_dir():
        what = "is a file" if root.exists() else "is not there"
        hint = ": of arrays, dataset=npz reads a file" if root.is_file() else ""
        raise DataError(f"dataset.path={root} {what}, but must be a folder of {LAYOUTS}{hint}")
    train, tests = _splits(root)
    splits = (train, *tests[:1])
    trees = [walk_classes(root, split) for split in splits]
    warn_ignored_files([name for tree in trees for name in tree.others], root)
    for split, tree in zip(splits, trees, strict=True):
        _check_classes(root, split, tree)
    pool, classes = trees[0], list(trees[0].classes)
    if tests:
        _check_same_classes(root, splits, trees)
        unused = "".join(f", {name}/ is not used" for name in tests[1:])
        layout = f"{train}/CLASS/*, test split {tests[0]}/CLASS/*{unused}"
        return decode_splits(request, root, (pool.part(), trees[1].part()), classes, {"layout": layout})
    parts = stratified_split(pool.labels, classes, request.config.test_share)
    layout = f"CLASS/*, {len(parts[1]):,} of {len(pool.labels):,} split off by class, seed 0"
    data = decode_splits(request, root, tuple(map(pool.part, parts)), classes, {"layout": layout})
    subset, test_subset = (Subset(part, of=len(pool.labels)) for part in parts)
    return replace(data, subset=subset, test_subset=test_subset, one_source=True)


def _splits(root: Path) -> tuple[str, list[str]]:
    """The folder of the pool's classes, ``""`` for CLASS/* itself, and the test folders; the first of them is used."""
    folders = {name.lower(): name for name in subfolders(root)}
    tests = [folders[name] for name in _TEST_NAMES if name in folders]
    # without subfolders, "train" may be a class of its own: pictures of trains
    if "train" in folders and (tests or subfolders(root / folders["train"])):
        train = folders["train"]
        if not tests:
            raise DataError(
                f"{root} has {train}/ but no test/: put test/CLASS/* beside it, or set dataset.path={root / train} "
                "to have dataset.test_share of it split off"
            )
        return train, tests
    if folders and folders.keys() <= _SPLITS:
        raise DataError(f"{root} has {', '.join(folders.values())}, which are no classes: expected {LAYOUTS}")
    return "", []


def _check_classes(root: Path, split: str, tree: ClassTree) -> None:
    """There are several classes, and none is empty."""
    where = root / split
    if not tree.classes:
        raise DataError(f"{where} has no folders of classes: expected {LAYOUTS}, one folder for each class")
    if empty := [name for name, files in tree.classes.items() if not files]:
        some = ", ".join(f"'{name}'" for name in empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise DataError(f"{len(empty)} class folders of {where} hold no images: {some}; fill or remove them")
    if len(tree.classes) == 1:
        raise DataError(
            f"{where} has a single class, '{next(iter(tree.classes))}': set dataset.path to the folder of {LAYOUTS}, "
            "with two classes or more"
        )


def _check_same_classes(root: Path, splits: Sequence[str], trees: Sequence[ClassTree]) -> None:
    """Train and test have the same classes."""
    train, test = (tree.classes.keys() for tree in trees)
    sides = dict(zip(splits, (train - test, test - train), strict=True))
    if any(sides.values()):
        differences = " and ".join(
            f"{', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''} only in {side}/"
            for side, names in sides.items()
            if names
        )
        raise DataError(f"the classes of {root} differ: {differences}; both need a folder for every class")


# fmt: off
SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on
"""Lower-case suffixes of the image files that PIL reads."""


def subfolders(root: Path) -> list[str]:
    """Names in sorted order, without hidden ones.

    Raises:
        DataError: the folder cannot be read.
    """
    return sorted(entry.name for entry in _entries(str(root))[0])


def walk_classes(root: Path, inside: str) -> ClassTree:
    """The classes and images of ``root/inside`` in one walk, named by their path under ``root``.

    Raises:
        DataError: a folder or file cannot be read.
    """
    folders, files = _entries(str(root / inside))
    prefix = f"{inside}/" if inside else ""
    others = [prefix + entry.name for entry in files]  # images among them are in no class
    classes: dict[str, list[ImageFile]] = {}
    for entry in sorted(folders, key=lambda entry: entry.name):
        classes[entry.name] = []
        _walk(entry.path, prefix + entry.name, classes[entry.name], others)
        classes[entry.name].sort()
    return ClassTree(classes, tuple(others))


def _walk(folder: str, name: str, images: list[ImageFile], others: list[str]) -> None:
    """Append the files of a folder and of its subfolders."""
    folders, files = _entries(folder)
    for entry in folders:
        _walk(entry.path, f"{name}/{entry.name}", images, others)
    for entry in files:
        path = f"{name}/{entry.name}"
        if os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
            others.append(path)
            continue
        try:
            stat = entry.stat()
        except OSError as error:
            raise DataError(f"{entry.path} cannot be read ({error.strerror}): replace or remove it") from error
        images.append(ImageFile(path, stat.st_size, stat.st_mtime_ns))


def _entries(folder: str) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """The folders and the files in a folder, in no order, without hidden ones."""
    folders: list[os.DirEntry[str]] = []
    files: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry)
    except OSError as error:  # also a circle of links: the system reports it
        raise DataError(f"{folder} cannot be read ({error.strerror})") from error
    return folders, files


def warn_ignored_files(others: Sequence[str], root: Path) -> None:
    if others:
        log.warning(
            "%d files under %s are passed over, no images by their names or in no class's folder: %s%s",
            len(others), root, ", ".join(sorted(others)[:3]), ", ..." if len(others) > 3 else "",
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class DecodedImages:
    images: Tensor  # (n, channels, height, width) uint8, in the order of the files
    mapped: bool
    """Whether they are too large for memory and lie in a memory-mapped file."""


def decode_splits(
    request: DatasetRequest, root: Path, parts: tuple[LabeledFiles, ...], classes: list[str], facts: Mapping[str, Any]
) -> ImageData:
    """The decoded files of pool and test split: both are slices of one array in the cache, not copies."""
    pool, test = parts
    decoded = decode(request, root, [*pool.files, *test.files])
    images, test_images = decoded.images[: len(pool.files)], decoded.images[len(pool.files) :]
    facts = {"classes": classes, **facts} | ({"memory_mapped": True} if decoded.mapped else {})
    return ImageData(request.config.name, images, pool.labels, test_images, test.labels, len(classes), facts=facts)


DECODER_VERSION = 1
"""Raised with any change of the decoded pixels: cached images are then decoded again."""

# Files a task of a thread: more of them delay progress and Ctrl-C with large images, fewer cost time with tiny ones.
_CHUNK = 32
_PATHS_SHOWN = 3  # of unreadable files


def decode(request: DatasetRequest, root: Path, files: Sequence[ImageFile]) -> DecodedImages:
    """The pixels of the files under ``root``, in their order, from the cache or decoded into it.

    One channel if all of them are grey, else three. With ``image_size`` S each is cropped around its centre to a
    square and resized to S x S (``PIL.ImageOps.fit``, bicubic); without it they must be of one size. Of 16 bits the
    upper eight count, transparent images are put on white, and photographs are turned as their EXIF data say.

    Raises:
        ConfigError: without ``image_size``, images of several sizes.
        DataError: files that cannot be read.
        CacheError: the cache cannot be written.
    """
    size = request.config.image_size
    make = partial(_make, root, files, size, request.progress)
    entry = get_or_make(request.cache, _key(root, files, size), make)
    return DecodedImages(torch.from_numpy(entry.arrays["images"]), entry.mapped)


def _key(root: Path, files: Sequence[ImageFile], image_size: int | None) -> str:
    """The cache key: name, size and time of every file, and the bytes of some; bitmaps may agree in all the rest."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(f"{file.name}\0{file.size}\0{file.mtime_ns}\n"))
    for file in files[:: max(1, len(files) // 16)]:
        with suppress(OSError):  # the decoding reports it, together with all others
            digest.update((root / file.name).read_bytes())
    return key_of({"files": digest.hexdigest(), "image_size": image_size, "decoder": DECODER_VERSION})


def _make(
    root: Path, files: Sequence[ImageFile], image_size: int | None, progress: Progress, folder: Path
) -> tuple[Arrays, dict[str, Any]]:
    start = perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # one warning a file, about its metadata
        shape = _common_shape(root, files, image_size, progress)
        images = new_array(folder, "images", (len(files), *shape), np.uint8)

        def decode_into(i: int) -> str | None:
            try:
                with Image.open(root / files[i].name) as image:
                    images[i] = pixels(image, shape[0], image_size)
            except UNREADABLE as error:
                return f"{files[i].name} ({_reason(error)})"
            return None

        with closing(_in_threads(decode_into, len(files), "decoding", progress)) as outcomes:
            failures = [failure for failure in outcomes if failure]
        if failures:
            some = ", ".join(failures[:_PATHS_SHOWN]) + (", ..." if len(failures) > _PATHS_SHOWN else "")
            raise DataError(
                f"{len(failures):,} of {len(files):,} image files under {root} cannot be read: {some}; "
                "replace or remove them"
            )
    return {"images": images}, {"images": len(files), "seconds": perf_counter() - start}


def _common_shape(
    root: Path, files: Sequence[ImageFile], image_size: int | None, progress: Progress
) -> tuple[int, int, int]:
    """(channels, height, width) that all images get, from their headers; the decoding reports unreadable files."""
    sizes: Counter[tuple[int, int]] = Counter()
    channels = 1

    def read_header(i: int) -> tuple[bool, tuple[int, int]] | None:
        try:
            with Image.open(root / files[i].name) as image:
                return is_grey(image), upright_size(image)
        except UNREADABLE:
            return None

    with closing(_in_threads(read_header, len(files), "looking at image files", progress)) as headers:
        for grey, size in filter(None, headers):
            sizes[size] += 1
            channels = channels if grey else 3
            if image_size and channels == 3:
                break
    if image_size:
        return channels, image_size, image_size
    if len(sizes) > 1:
        common = ", ".join(f"{width}x{height} ({n:,})" for (width, height), n in sizes.most_common(3))
        raise ConfigError(
            f"the {len(files):,} images under {root} are of {len(sizes):,} sizes: {common}"
            f"{', ...' if len(sizes) > 3 else ''}; set dataset.image_size=S to crop and resize them all to S x S"
        )
    width, height = next(iter(sizes), (1, 1))
    return channels, height, width


def _in_threads(work: Callable[[int], T], n: int, what: str, progress: Progress) -> Generator[T, None, None]:
    """``work(0)``, ..., ``work(n - 1)`` in order, on all cores: PIL releases the GIL to decode and to resize."""
    steps = StepProgress(what, n, progress)
    chunk = min(_CHUNK, steps.step)
    pool = ThreadPoolExecutor(available_cores())
    try:
        for results in pool.map(lambda i: [work(j) for j in range(i, min(i + chunk, n))], range(0, n, chunk)):
            yield from results
            steps(len(results))
    finally:
        pool.shutdown(cancel_futures=True)


class StepProgress:
    """Progress of n things, reported about a hundred times, and exactly at every fifth, where a line is printed."""

    def __init__(self, what: str, n: int, progress: Progress) -> None:
        self._what, self._n, self._progress = what, n, progress
        self._fifth = max(1, n // 5)
        self.step = max(1, self._fifth // 20)
        """Things from one report to the next: work in pieces no larger than this."""
        self._done = self._reported = 0

    def __call__(self, more: int) -> None:
        self._done += more
        mark = self._n if self._done == self._n else self._done - self._done % self._fifth % self.step
        if mark > self._reported:
            self._reported = mark
            self._progress(self._what, mark, self._n)


def new_array(folder: Path, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """A memory-mapped ``NAME.npy`` in the cache folder, to be written row by row.

    Raises:
        CacheError: the disk has no room for it; writing to a map on a full disk would kill the process.
    """
    n_bytes, free = int(np.prod(shape)) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    too_small = (
        f"the cache at {folder.parent} has {free / 1e9:.1f} GB free, but {name} {shape} needs {n_bytes / 1e9:.1f}: "
        "set cache=DIR or DGAL_CACHE to a larger disk"
    )
    if n_bytes > free:
        raise CacheError(too_small)
    path = folder / f"{name}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if sys.platform == "linux":
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:  # a quota below the free space, or another process that writes there
            raise CacheError(f"{too_small} ({error.strerror})") from error
    return array


RESIZE = Image.Resampling.BICUBIC
"""The filter of image_size; PIL widens it to shrink an image, which avoids aliasing."""

# What PIL raises for a damaged file: its own errors, and those of its parsers.
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


def pixels(image: Image.Image, channels: int, image_size: int | None) -> np.ndarray:
    """(channels, height, width) uint8 of an opened image, upright and opaque, of 1 or 3 channels; see ``decode``.

    Raises:
        UNREADABLE: it is truncated, damaged, or of a value range whose white is unknown.
    """
    image.load()
    turn = _TURNS.get(_orientation(image))
    flat = _opaque(_eight_bit(image)).convert("L" if channels == 1 else "RGB")
    upright = flat if turn is None else flat.transpose(turn)
    if image_size:
        upright = ImageOps.fit(upright, (image_size, image_size), RESIZE)
    values = np.asarray(upright)
    return values[None] if channels == 1 else values.transpose(2, 0, 1)


def is_grey(image: Image.Image) -> bool:
    """Whether one channel holds all of it; of an image with a palette, the whole file is read to see the colours."""
    if image.mode in ("P", "PA"):
        red, green, blue = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3).T
        return bool((red == green).all() and (green == blue).all())
    return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) once it is turned upright."""
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


# EXIF's orientations 2 to 8; the last four exchange width and height.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """1 to 8; broken metadata do not make an image unreadable. PIL turns TIFF images itself."""
    if image.format == "TIFF" or not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return 1  # most files: getexif() would make PIL read all of a PNG
    with suppress(*UNREADABLE):
        return int(image.getexif().get(0x0112, 1))
    return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """The upper eight of sixteen bits: PIL would clip them. Of more bits, the value of white is unknown."""
    if image.mode == "F":
        raise ValueError("pixels are floats: save them with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("pixels of more than 16 bits: save them with 8 or 16")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """On white: the colours of fully transparent pixels are arbitrary."""
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def _reason(error: Exception) -> str:
    """Why a file is unreadable, in a few words and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "no image format that PIL knows"
    return " ".join(str(error).split())[:100] or type(error).__name__
