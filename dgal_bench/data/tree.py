"""One walk over a folder of classes: which image files there are, of which size and time."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from dgal_bench.arrays import Index, Labels
from dgal_bench.data.decode import SUFFIXES, ImageFile
from dgal_bench.errors import DataError

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """What becomes the pool or the test split."""

    files: list[ImageFile]
    labels: Labels


@dataclass(frozen=True, eq=False)
class Tree:
    """Classes in sorted order, each with its image files in sorted order; ``others``: files that are no images."""

    classes: dict[str, list[ImageFile]]
    others: tuple[str, ...]

    @cached_property
    def files(self) -> list[ImageFile]:
        """All images, class by class."""
        return [file for files in self.classes.values() for file in files]

    @cached_property
    def labels(self) -> Labels:
        """(n,) of ``files``."""
        return torch.arange(len(self.classes)).repeat_interleave(torch.tensor([len(f) for f in self.classes.values()]))

    def part(self, places: Index | None = None) -> Part:
        """Those at ``places`` in ``files``, or all."""
        if places is None:
            return Part(self.files, self.labels)
        return Part([self.files[place] for place in places.tolist()], self.labels[places])


def subfolders(root: Path) -> list[str]:
    """Names in sorted order; hidden ones are passed over.

    Raises:
        DataError: the folder cannot be read.
    """
    return sorted(entry.name for entry in _entries(str(root))[0])


def tree(root: Path, inside: str) -> Tree:
    """The classes and images of ``root/inside`` in one walk, named by their path under ``root``.

    Raises:
        DataError: a folder or file cannot be read.
    """
    folders, loose = _entries(str(root / inside))
    prefix = f"{inside}/" if inside else ""
    others = [prefix + entry.name for entry in loose]  # images among them are in no class
    found: dict[str, list[ImageFile]] = {}
    for entry in sorted(folders, key=lambda entry: entry.name):
        found[entry.name] = []
        _walk(entry.path, prefix + entry.name, found[entry.name], others)
        found[entry.name].sort()
    return Tree(found, tuple(others))


def _walk(folder: str, name: str, images: list[ImageFile], others: list[str]) -> None:
    """Collect the files of a folder and of those in it, with their sizes and times."""
    folders, files = _entries(folder)
    for entry in folders:
        _walk(entry.path, f"{name}/{entry.name}", images, others)
    for entry in files:
        inner = f"{name}/{entry.name}"
        if os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
            others.append(inner)
            continue
        try:
            stat = entry.stat()
        except OSError as error:
            raise DataError(f"{entry.path} cannot be read ({error.strerror}): replace or remove it") from error
        images.append(ImageFile(inner, stat.st_size, stat.st_mtime_ns))


def _entries(folder: str) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """The folders and the files in a folder, in no order; hidden ones are passed over."""
    folders: list[os.DirEntry[str]] = []
    files: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry)
    except OSError as error:  # also a circle of links, which the system ends
        raise DataError(f"{folder} cannot be read ({error.strerror})") from error
    return folders, files


def warn_of(others: Sequence[str], root: Path) -> None:
    """Say once that there are files which are not taken."""
    if others:
        log.warning(
            "%d files under %s are passed over, no images by their names or in no class's folder: %s%s",
            len(others), root, ", ".join(sorted(others)[:3]), ", ..." if len(others) > 3 else "",
        )  # fmt: skip
