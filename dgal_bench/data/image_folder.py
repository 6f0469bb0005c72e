"""A user's own image files, a folder for each class, become one uint8 array in the cache.

They are decoded once, by PIL in threads, and never all held in memory.
"""

import errno
import hashlib
import logging
import os
import shutil
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
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
from PIL.ImageFile import ImageFile as OpenImage
from torch import Tensor

from dgal_bench.config.schema import available_cores
from dgal_bench.core.cache import Arrays, get_or_make, key_of
from dgal_bench.core.errors import CacheError, ConfigError, DataError, error_text
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
    others: list[str]

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
    trees = {split: walk_classes(root, split) for split in (train, *tests[:1])}
    warn_ignored_files([name for tree in trees.values() for name in tree.others], root)
    _check_classes(root, trees)
    pool, classes = trees[train], list(trees[train].classes)
    if tests:
        unused = "".join(f", {name}/ is not used" for name in tests[1:])
        layout = f"{train}/CLASS/*, test split {tests[0]}/CLASS/*{unused}"
        return decode_splits(request, root, (pool.part(), trees[tests[0]].part()), classes, {"layout": layout})
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


def _check_classes(root: Path, trees: Mapping[str, ClassTree]) -> None:
    """In each split there are several classes and none is empty, and all splits have the same."""
    for split, tree in trees.items():
        where = root / split
        if not tree.classes:
            raise DataError(f"{where} has no folders of classes: expected {LAYOUTS}, one folder for each class")
        if empty := [repr(name) for name, files in tree.classes.items() if not files]:
            raise DataError(f"{len(empty)} class folders of {where} hold no images: {name_some(empty)}; remove them")
        if len(tree.classes) == 1:
            raise DataError(
                f"{where} has a single class, '{next(iter(tree.classes))}': set dataset.path to the folder of "
                f"{LAYOUTS}, with two classes or more"
            )
    everywhere = set.intersection(*(set(tree.classes) for tree in trees.values()))
    extra = {split: sorted(tree.classes.keys() - everywhere) for split, tree in trees.items()}
    if any(extra.values()):
        differences = " and ".join(f"{name_some(names)} only in {split}/" for split, names in extra.items() if names)
        raise DataError(f"the classes of {root} differ: {differences}; both need a folder for every class")


def name_some(names: Sequence[str]) -> str:
    """The first five."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"


# fmt: off
SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on
"""Lower-case suffixes of the image files that PIL reads."""


def subfolders(root: Path) -> list[str]:
    """Names in sorted order, without hidden ones; DataError: the folder cannot be read."""
    return sorted(entry.name for entry, is_folder in _entries(str(root)) if is_folder)


def walk_classes(root: Path, inside: str) -> ClassTree:
    """The classes and images of ``root/inside``, named by their path under ``root``.

    Raises:
        DataError: a folder or file cannot be read.
    """
    tree = ClassTree({name: [] for name in subfolders(root / inside)}, [])
    start = len(os.path.join(root, ""))
    for entry in _walk(str(root / inside)):
        name = entry.path[start:]
        label, *below = name.removeprefix(f"{inside}/").split("/", 1)
        if not below or os.path.splitext(name)[1].lower() not in SUFFIXES:
            tree.others.append(name)  # an image beside the folders is in no class
            continue
        try:
            stat = entry.stat()
        except OSError as error:
            raise DataError(f"{entry.path} cannot be read ({error.strerror}): replace or remove it") from error
        tree.classes[label].append(ImageFile(name, stat.st_size, stat.st_mtime_ns))
    for files in tree.classes.values():
        files.sort()
    return tree


def _walk(folder: str) -> Iterator[os.DirEntry[str]]:
    """The files in a folder and in its subfolders."""
    for entry, is_folder in _entries(folder):
        if is_folder:
            yield from _walk(entry.path)
        else:
            yield entry


def _entries(folder: str) -> list[tuple[os.DirEntry[str], bool]]:
    """What is in a folder, in no order, without hidden entries, and whether it is a folder."""
    try:
        with os.scandir(folder) as entries:
            return [(entry, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:  # also a circle of links: the system reports it
        raise DataError(f"{folder} cannot be read ({error.strerror})") from error


def warn_ignored_files(others: Sequence[str], root: Path) -> None:
    if others:
        log.warning(
            "%d files under %s are passed over, no images by their names or in no class's folder: %s%s",
            len(others), root, ", ".join(sorted(others)[:3]), ", ..." if len(others) > 3 else "",
        )  # fmt: skip


def decode_splits(
    request: DatasetRequest, root: Path, parts: tuple[LabeledFiles, ...], classes: list[str], facts: Mapping[str, Any]
) -> ImageData:
    """The decoded files of pool and test split: both are slices of one array in the cache, not copies."""
    pool, test = parts
    decoded, mapped = decode(request, root, [*pool.files, *test.files])
    images, test_images = decoded[: len(pool.files)], decoded[len(pool.files) :]
    facts = {"classes": classes, **facts} | ({"memory_mapped": True} if mapped else {})
    return ImageData(request.config.name, images, pool.labels, test_images, test.labels, len(classes), facts=facts)


DECODER_VERSION = 1
"""Raised with any change of the decoded pixels: cached images are then decoded again."""

# Files a task of a thread: more of them delay progress and Ctrl-C with large images, fewer cost time with tiny ones.
_CHUNK = 32


def decode(request: DatasetRequest, root: Path, files: Sequence[ImageFile]) -> tuple[Tensor, bool]:
    """The pixels of the files under ``root``, in their order, from the cache or decoded into it; whether mapped.

    (n, channels, height, width) uint8, memory-mapped where they are too large for memory.

    One channel if all of them are grey, else three. With ``image_size`` S each is cropped around its centre to a
    square and resized to S x S (``PIL.ImageOps.fit``, bicubic); without it they must be of one size. Images
    of more than 8 bits are refused, transparent ones are put on white, photographs are turned as their EXIF data say.

    Raises:
        ConfigError: without ``image_size``, images of several sizes.
        DataError: files that cannot be read.
        CacheError: the cache cannot be written.
    """
    size = request.config.image_size
    make = partial(_make, root, files, size, request.progress)
    entry = get_or_make(request.cache, _key(root, files, size), make)
    return torch.from_numpy(entry.arrays["images"]), entry.mapped


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
        images = _new_array(folder, (len(files), *shape))

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
            raise DataError(
                f"{len(failures):,} of {len(files):,} image files under {root} cannot be read: {name_some(failures)}; "
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
    pool, done = ThreadPoolExecutor(available_cores()), 0
    try:
        for results in pool.map(lambda i: [work(j) for j in range(i, min(i + _CHUNK, n))], range(0, n, _CHUNK)):
            yield from results
            percent, done = 100 * done // n, done + len(results)
            if 100 * done // n > percent:
                progress(f"{what} (%)", 100 * done // n, 100)
    finally:
        pool.shutdown(cancel_futures=True)


def _new_array(folder: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped ``images.npy`` of uint8 in the cache folder, to be written row by row.

    Raises:
        CacheError: the disk has no room for it; writing to a map on a full disk would kill the process.
    """
    path = folder / "images.npy"
    n_bytes, free = int(np.prod(shape)), shutil.disk_usage(folder).free
    try:
        if n_bytes > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        if sys.platform == "linux":
            with path.open("r+b") as file:  # a quota below the free space, or another process that writes there
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise CacheError(
            f"the cache at {folder.parent} has {free / 1e9:.1f} GB free, but images {shape} needs {n_bytes / 1e9:.1f} "
            f"({error.strerror}): set cache=DIR or DGAL_CACHE to a larger disk"
        ) from error
    return array


RESIZE = Image.Resampling.BICUBIC
"""The filter of image_size; PIL widens it to shrink an image, which avoids aliasing."""

# What PIL raises for a damaged file: its own errors, and those of its parsers.
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


def pixels(file: OpenImage, channels: int, image_size: int | None) -> np.ndarray:
    """(channels, height, width) uint8 of an opened file, upright and opaque, of 1 or 3 channels; see ``decode``.

    Raises:
        UNREADABLE: it is truncated or damaged, or has more than 8 bits a channel.
    """
    if file.mode == "F" or file.mode.startswith("I") or ";16" in str(file.tile):  # of 16-bit colours PIL keeps 8
        raise ValueError("pixels of more than 8 bits: save them with 8, from black to white")
    file.load()
    image = file if _orientation(file) == 1 else ImageOps.exif_transpose(file)
    if image.has_transparency_data:  # put on white: the colours of fully transparent pixels are arbitrary
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("L" if channels == 1 else "RGB")
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), RESIZE)
    values = np.asarray(image)
    return values[None] if channels == 1 else values.transpose(2, 0, 1)


def is_grey(image: Image.Image) -> bool:
    """Whether one channel holds all of it; of an image with a palette, the whole file is read to see the colours."""
    if image.mode in ("P", "PA"):
        red, green, blue = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3).T
        return bool((red == green).all() and (green == blue).all())
    return image.mode in ("1", "L", "LA")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) once it is turned upright."""
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _orientation(image: Image.Image) -> int:
    """1 to 8; broken metadata do not make an image unreadable. PIL turns TIFF images itself."""
    if image.format == "TIFF" or not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return 1  # most files: getexif() would make PIL read all of a PNG
    with suppress(*UNREADABLE):
        return int(image.getexif().get(0x0112, 1))
    return 1


def _reason(error: Exception) -> str:
    """Why a file is unreadable, in a few words and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "no image format that PIL knows"
    return error_text(error, 100)
