"""Image files -> one uint8 array in the cache: decoded once, by PIL in threads, never all of them in memory."""

import hashlib
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dgal_bench.arrays import Progress
from dgal_bench.cache import Arrays, get_or_make, key_of
from dgal_bench.config import available_cores
from dgal_bench.data.images import Request
from dgal_bench.data.pixels import UNREADABLE, is_grey, pixels, reason, upright_size
from dgal_bench.errors import CacheError, ConfigError, DataError

T = TypeVar("T")

DECODER_VERSION = 1
"""Raised with any change of the pixels that a file becomes: what was decoded before is decoded again."""

# fmt: off
SUFFIXES = frozenset((
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on
"""Of file names, in lower case: images that PIL reads."""

# Larger chunks make progress and Ctrl-C wait where images are large; smaller ones cost where they are tiny.
_CHUNK = 32
_NAMED = 3  # of the files that cannot be read


class ImageFile(NamedTuple):
    """A file by its path under the data set's root, with ``/`` between folders."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, eq=False)
class Decoded:
    images: Tensor  # (n, channels, height, width) uint8, in the order of the files
    mapped: bool
    """Whether they are too many for memory and lie in a memory-mapped file."""


def decode(request: Request, root: Path, files: Sequence[ImageFile]) -> Decoded:
    """The pixels of the files under ``root``, in their order, from the cache or decoded and put there.

    One channel where all of them are grey, else three. With ``image_size`` S each is cropped around its centre to a
    square and resized to S x S (``PIL.ImageOps.fit``, bicubic); without it they must be of one size. Sixteen bits
    keep their upper eight, what is transparent lies on white, and photographs are turned as their EXIF data say.

    Raises:
        ConfigError: without ``image_size``, images of several sizes.
        DataError: files that cannot be read.
        CacheError: the cache cannot be written.
    """
    size = request.config.image_size
    make = partial(_make, root, files, size, request.progress)
    entry = get_or_make(request.cache, _key(root, files, size), make)
    return Decoded(torch.from_numpy(entry.arrays["images"]), entry.mapped)


def _key(root: Path, files: Sequence[ImageFile], image_size: int | None) -> str:
    """Of names, sizes and times, and of the bytes of some files: bitmaps out of two archives may share all the rest."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(f"{file.name}\0{file.size}\0{file.mtime_ns}\n"))
    for file in files[:: max(1, len(files) // 16)]:
        with suppress(OSError):  # said in one line with all others, when it is decoded
            digest.update((root / file.name).read_bytes())
    return key_of({"files": digest.hexdigest(), "image_size": image_size, "decoder": DECODER_VERSION})


def _make(
    root: Path, files: Sequence[ImageFile], image_size: int | None, progress: Progress, folder: Path
) -> tuple[Arrays, dict[str, Any]]:
    start = perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, one for each file
        shape = _common_shape(root, files, image_size, progress)
        images = new_array(folder, "images", (len(files), *shape), np.uint8)

        def decode_into(i: int) -> str | None:
            try:
                with Image.open(root / files[i].name) as image:
                    images[i] = pixels(image, shape[0], image_size)
            except UNREADABLE as error:
                return f"{files[i].name} ({reason(error)})"
            return None

        with closing(_in_threads(decode_into, len(files), "decoding", progress)) as outcomes:
            failures = [failure for failure in outcomes if failure]
        if failures:
            named = ", ".join(failures[:_NAMED]) + (", ..." if len(failures) > _NAMED else "")
            raise DataError(
                f"{len(failures):,} of {len(files):,} image files under {root} cannot be read: {named}; "
                "replace or remove them"
            )
    return {"images": images}, {"images": len(files), "seconds": perf_counter() - start}


def new_array(folder: Path, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """A memory-mapped ``NAME.npy`` in the cache folder, to be written row by row.

    Raises:
        CacheError: the disk has no room for it; a full disk would kill the process in the midst of writing.
    """
    wanted, free = int(np.prod(shape)) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    too_small = (
        f"the cache at {folder.parent} has {free / 1e9:.1f} GB free, but {name} {shape} needs {wanted / 1e9:.1f}: "
        "set cache=DIR or DGAL_CACHE to a larger disk"
    )
    if wanted > free:
        raise CacheError(too_small)
    path = folder / f"{name}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if sys.platform == "linux":
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:  # another quota than the disk's, or others that write there too
            raise CacheError(f"{too_small} ({error.strerror})") from error
    return array


def _common_shape(
    root: Path, files: Sequence[ImageFile], image_size: int | None, progress: Progress
) -> tuple[int, int, int]:
    """(channels, height, width) that all images get, from their headers; unreadable ones are left to the decoding."""
    sizes: Counter[tuple[int, int]] = Counter()
    channels = 1

    def head(i: int) -> tuple[bool, tuple[int, int]] | None:
        try:
            with Image.open(root / files[i].name) as image:
                return is_grey(image), upright_size(image)
        except UNREADABLE:
            return None

    with closing(_in_threads(head, len(files), "looking at image files", progress)) as heads:
        for grey, size in filter(None, heads):
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
    """``work(0)``, ..., ``work(n - 1)`` in order, on all cores: PIL frees Python's lock to decode and to resize."""
    tell = Steps(what, n, progress)
    chunk = min(_CHUNK, tell.step)
    pool = ThreadPoolExecutor(available_cores())
    try:
        for results in pool.map(lambda i: [work(j) for j in range(i, min(i + chunk, n))], range(0, n, chunk)):
            yield from results
            tell(len(results))
    finally:
        pool.shutdown(cancel_futures=True)


class Steps:
    """Progress of n things, told some hundred times in all and at every fifth exactly: there, lines are written."""

    def __init__(self, what: str, n: int, progress: Progress) -> None:
        self._what, self._n, self._progress = what, n, progress
        self._fifth = max(1, n // 5)
        self.step = max(1, self._fifth // 20)
        """From one time to the next: work in pieces no larger than this."""
        self._done = self._told = 0

    def __call__(self, more: int) -> None:
        self._done += more
        mark = self._n if self._done == self._n else self._done - self._done % self._fifth % self.step
        if mark > self._told:
            self._told = mark
            self._progress(self._what, mark, self._n)
