"""Mini-ImageNet: 100 classes of 600 images, as people have it, and a published split of every class.

The splits of Vinyals et al. and of Ravi and Larochelle have disjoint classes, for learning from few examples. Here all
classes are pooled, and 480 / 100 / 20 images of each are pool, test and unused: so the paper's 48,000 and 10,000.
"""

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.core.seeding import rng_for
from dgal_bench.data.image_data import DatasetRequest, ImageData
from dgal_bench.data.image_folder import ClassTree, ImageFile, image_data, subfolders, walk_classes, warn_ignored_files

N_CLASSES, PER_CLASS = 100, 600
N_POOL, N_TEST = 480, 100  # of each class

SPLIT_FILE = Path(__file__).with_name("mini_imagenet_split.txt")
"""A line for each class, in sorted order of their names; in it a character for each image, in sorted order of the file
names in the class: ``p`` pool, ``t`` test, ``-`` unused."""

SPLIT_SHA256 = "74a86e5aa2ed0424550404a269851330f7f255308481a796f860a5b7d8583798"

_PARTS = ("train", "val", "test")
_LAYOUTS = (
    "train.csv, val.csv and test.csv (filename,label) with images/*, or a folder of images for each of the 100 "
    "classes, all in one place or under train/, val/ and test/"
)


def draw_split() -> bytes:
    """The split file as it was drawn, once: seed 0, each class by its place."""
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
    if (found := hashlib.sha256(raw).hexdigest()) != SPLIT_SHA256:
        raise DataError(
            f"{SPLIT_FILE} is not the published split (sha256 {found[:12]}, not {SPLIT_SHA256[:12]}): "
            "install dgal-bench again"
        )
    return raw.decode().splitlines()


def describe_mini_imagenet(root: Path) -> str:
    """One line on what lies in ROOT/mini_imagenet, without a look at the images."""
    where = (root / "mini_imagenet").resolve()
    return f"a folder at {where}" if where.is_dir() else f"not there: no download has it; put {_LAYOUTS} in {where}"


def read_mini_imagenet(request: DatasetRequest) -> ImageData:
    """ROOT/mini_imagenet, in the layout of csv files or of class folders.

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
    found, layout = _from_csv(root) if by_csv else _from_folders(root)
    _check_counts(root, found)
    warn_ignored_files(found.others, root)
    marks = np.array(list("".join(read_split_file())))
    pool, test = (found.part(torch.from_numpy(np.flatnonzero(marks == mark))) for mark in "pt")
    facts = {"layout": layout, "split_sha256": SPLIT_SHA256}
    return image_data(request, root, (pool, test), list(found.classes), facts)


def _from_csv(root: Path) -> tuple[ClassTree, str]:
    """Of every line of the three files, the image of that name in images/."""
    images = {file.name.removeprefix("images/"): file for file in walk_classes(root, "").classes["images"]}
    rows = [row for part in _PARTS for row in _rows(root / f"{part}.csv")]
    named = Counter(name for name, _ in rows)
    if absent := [name for name in named if name not in images]:
        raise DataError(
            f"{len(absent):,} images named in the csv files are not in {root / 'images'}: {_name_some(absent)}"
        )
    if twice := [name for name, n in named.items() if n > 1]:
        raise DataError(f"{len(twice):,} images are in the csv files of {root} more than once: {_name_some(twice)}")
    classes: dict[str, list[ImageFile]] = {}
    for name, label in rows:
        classes.setdefault(label, []).append(images[name])
    others = tuple(file.name for name, file in images.items() if name not in named)
    return _ordered(classes, others), "train.csv, val.csv and test.csv with images/*"


def _rows(path: Path) -> list[tuple[str, str]]:
    """(filename, label) of every line."""
    try:
        with path.open(newline="") as file:
            rows = [(row["filename"], row["label"]) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    except KeyError as error:
        raise DataError(f"{path} has no column {error}: its first line must be filename,label") from error
    if cut := [number for number, row in enumerate(rows, 2) if not all(row)]:
        raise DataError(f"{path}: line {cut[0]} has no filename and label")
    return rows


def _from_folders(root: Path) -> tuple[ClassTree, str]:
    """A folder for each class, or those under train, val and test together."""
    there = subfolders(root)
    parts = [name for name in ("train", "val", "valid", "test") if name in there]
    trees = [walk_classes(root, part) for part in parts] or [walk_classes(root, "")]
    classes: dict[str, list[ImageFile]] = {}
    for part in trees:
        for name, files in part.classes.items():
            classes.setdefault(name, []).extend(files)
    layout = "CLASS/*" if not parts else ", ".join(f"{part}/CLASS/*" for part in parts)
    return _ordered(classes, tuple(name for part in trees for name in part.others)), layout


def _ordered(classes: Mapping[str, list[ImageFile]], others: tuple[str, ...]) -> ClassTree:
    """Classes by name, and their images by file name: the same order in whichever layout they lie."""
    return ClassTree({name: sorted(classes[name], key=_place) for name in sorted(classes)}, others)


def _place(file: ImageFile) -> tuple[str, str]:
    return os.path.basename(file.name), file.name


def _check_counts(root: Path, found: ClassTree) -> None:
    if len(found.classes) != N_CLASSES:
        raise DataError(
            f"{root} has {len(found.classes)} classes, not {N_CLASSES} ({_name_some(list(found.classes))}): "
            f"all of train, val and test are needed, as {_LAYOUTS}"
        )
    if wrong := [f"{name} ({len(files)})" for name, files in found.classes.items() if len(files) != PER_CLASS]:
        raise DataError(f"{len(wrong)} classes of {root} do not have {PER_CLASS} images: {_name_some(wrong)}")


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
