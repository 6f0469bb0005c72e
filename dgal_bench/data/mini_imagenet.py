"""Mini-ImageNet: 100 classes of 600 images, in the usual layouts, and a published split of every class.

The splits of Vinyals et al. and of Ravi and Larochelle have disjoint classes, for few-shot learning. Here 480 / 100 /
20 images of every class are pool, test and unused, which gives the paper's 48,000 and 10,000.
"""

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.core.seeding import rng_for
from dgal_bench.data.image_data import DatasetRequest, ImageData
from dgal_bench.data.image_folder import (
    ClassTree,
    ImageFile,
    decode_splits,
    name_some,
    subfolders,
    walk_classes,
    warn_ignored_files,
)

N_CLASSES, PER_CLASS = 100, 600
N_POOL, N_TEST = 480, 100  # of each class

SPLIT_FILE = Path(__file__).with_name("mini_imagenet_split.txt")
"""A line for each class, by name, with a character for each of its images, by file name: ``p`` pool, ``t`` test, ``-``
unused."""

SPLIT_SHA256 = "74a86e5aa2ed0424550404a269851330f7f255308481a796f860a5b7d8583798"

_PARTS = ("train", "val", "test")
_LAYOUTS = (
    "train.csv, val.csv and test.csv (filename,label) with images/*, or a folder of images for each of the 100 "
    "classes, all in one place or under train/, val/ and test/"
)


def draw_split() -> bytes:
    """The content of the split file: seed 0, each class drawn by its position."""
    marks = np.array(list("p" * N_POOL + "t" * N_TEST + "-" * (PER_CLASS - N_POOL - N_TEST)))
    lines = ("".join(rng_for(0, "mini_imagenet split", place).permutation(marks)) for place in range(N_CLASSES))
    return "".join(f"{line}\n" for line in lines).encode()


def read_split_file() -> list[str]:
    """The lines of the split file.

    Raises:
        DataError: it is not the published one.
    """
    try:
        raw = SPLIT_FILE.read_bytes()
    except OSError as error:
        raise DataError(f"{SPLIT_FILE} cannot be read ({error.strerror}): install dgal-bench again") from error
    if (actual := hashlib.sha256(raw).hexdigest()) != SPLIT_SHA256:
        raise DataError(
            f"{SPLIT_FILE} is not the published split (sha256 {actual[:12]}, not {SPLIT_SHA256[:12]}): "
            "install dgal-bench again"
        )
    return raw.decode().splitlines()


def describe_mini_imagenet(root: Path) -> str:
    """One line on ROOT/mini_imagenet, without reading the images."""
    where = (root / "mini_imagenet").resolve()
    return f"a folder at {where}" if where.is_dir() else f"not there: no download has it; put {_LAYOUTS} in {where}"


def read_mini_imagenet(request: DatasetRequest) -> ImageData:
    """ROOT/mini_imagenet, as csv files or class folders.

    Raises:
        ConfigError: a path was given, or images are of several sizes and image_size is not set.
        DataError: the images are not there, or not 600 in each of 100 classes.
    """
    if request.config.path is not None:
        raise ConfigError(
            f"dataset.path={request.config.path}: mini_imagenet is read from ROOT/mini_imagenet; "
            "set data=ROOT (or DGAL_DATA), or use dataset=folder"
        )
    root = request.root / "mini_imagenet"
    if not root.is_dir():
        raise DataError(
            f"data set 'mini_imagenet' is not there at {root.resolve()}, and no download has it: put {_LAYOUTS} there, "
            "or set DGAL_DATA (or data=DIR) to the folder that holds mini_imagenet"
        )
    by_csv = (root / "train.csv").is_file() and (root / "images").is_dir()
    tree, layout = _from_csv(root) if by_csv else _from_folders(root)
    _check_counts(root, tree)
    warn_ignored_files(tree.others, root)
    marks = np.array(list("".join(read_split_file())))
    pool, test = (tree.part(torch.from_numpy(np.flatnonzero(marks == mark))) for mark in "pt")
    facts = {"layout": layout, "split_sha256": SPLIT_SHA256}
    return decode_splits(request, root, (pool, test), list(tree.classes), facts)


def _from_csv(root: Path) -> tuple[ClassTree, str]:
    """The images named in the three files, from images/."""
    images = {file.name.removeprefix("images/"): file for file in walk_classes(root, "").classes["images"]}
    rows = [row for part in _PARTS for row in _rows(root / f"{part}.csv")]
    counts = Counter(name for name, _ in rows)
    if absent := [name for name in counts if name not in images]:
        raise DataError(
            f"{len(absent):,} images named in the csv files are not in {root / 'images'}: {name_some(absent)}"
        )
    if twice := [name for name, n in counts.items() if n > 1]:
        raise DataError(f"{len(twice):,} images are in the csv files of {root} more than once: {name_some(twice)}")
    others = [file.name for name, file in images.items() if name not in counts]
    tree = _sorted_tree(((label, images[name]) for name, label in rows), others)
    return tree, "train.csv, val.csv and test.csv with images/*"


def _rows(path: Path) -> list[tuple[str, str]]:
    """(filename, label) of every line."""
    try:
        with path.open(newline="") as file:
            rows = [(row["filename"], row["label"]) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    except KeyError as error:
        raise DataError(f"{path} has no column {error}: its first line must be filename,label") from error
    if short := [number for number, row in enumerate(rows, 2) if not all(row)]:
        raise DataError(f"{path}: line {short[0]} has no filename and label")
    return rows


def _from_folders(root: Path) -> tuple[ClassTree, str]:
    """A folder for each class, or those under train, val and test together."""
    folders = subfolders(root)
    parts: list[str] = [name for name in ("train", "val", "valid", "test") if name in folders]
    trees = [walk_classes(root, part) for part in parts or [""]]
    labeled = ((name, file) for tree in trees for name, files in tree.classes.items() for file in files)
    layout = ", ".join(f"{part}/CLASS/*" for part in parts) or "CLASS/*"
    return _sorted_tree(labeled, [name for tree in trees for name in tree.others]), layout


def _sorted_tree(labeled: Iterable[tuple[str, ImageFile]], others: list[str]) -> ClassTree:
    """Classes by name, and their images by file name: the same order in every layout."""
    classes: dict[str, list[ImageFile]] = {}
    for label, file in sorted(labeled, key=lambda pair: (pair[0], os.path.basename(pair[1].name), pair[1].name)):
        classes.setdefault(label, []).append(file)
    return ClassTree(classes, others)


def _check_counts(root: Path, tree: ClassTree) -> None:
    if len(tree.classes) != N_CLASSES:
        raise DataError(
            f"{root} has {len(tree.classes)} classes, not {N_CLASSES} ({name_some(list(tree.classes))}): "
            f"all of train, val and test are needed, as {_LAYOUTS}"
        )
    if wrong := [f"{name} ({len(files)})" for name, files in tree.classes.items() if len(files) != PER_CLASS]:
        raise DataError(f"{len(wrong)} classes of {root} do not have {PER_CLASS} images: {name_some(wrong)}")
