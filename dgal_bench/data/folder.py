"""A user's own images: a folder for each class, with a test split of their own or a seeded one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgal_bench.data.decode import decode
from dgal_bench.data.images import ImageData, Request, Subset
from dgal_bench.data.own import own_path, stratified_split
from dgal_bench.data.tree import Part, Tree, subfolders, tree, warn_of
from dgal_bench.errors import DataError

LAYOUTS = "train/CLASS/* with test/CLASS/*, or CLASS/*"
_TESTS = ("test", "val", "valid")  # the first that is there is the test split
# Folders of these names and no others are no classes, but splits that are not named as they should be.
_SPLITS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "dev"))


def read(request: Request) -> ImageData:
    """PATH/train/CLASS/* with PATH/test/CLASS/* (or val, valid), or PATH/CLASS/* and a stratified split, seed 0.

    Images may lie in folders inside a class's. Class names in sorted order are the labels 0..C-1. With a test split of
    their own a class may have a single image in the pool; where a split must be made it may not.

    Raises:
        ConfigError: no path, images of several sizes without image_size, or a test_share that does not fit.
        DataError: no such folder, no classes, an empty one, or train and test do not have the same.
    """
    root = own_path(request, "DIR")
    if not root.is_dir():
        what = "is a file" if root.exists() else "is not there"
        hint = ": of arrays, dataset=npz reads a file" if root.is_file() else ""
        raise DataError(f"dataset.path={root} {what}, but must be a folder of {LAYOUTS}{hint}")
    train, tests = _splits(root)
    splits = (train, *tests[:1])
    trees = [tree(root, split) for split in splits]
    warn_of([name for found in trees for name in found.others], root)
    for split, found in zip(splits, trees, strict=True):
        _check_classes(root, split, found)
    pool, classes = trees[0], list(trees[0].classes)
    if tests:
        _check_same(root, splits, trees)
        unused = "".join(f", {name}/ is not used" for name in tests[1:])
        layout = f"{train}/CLASS/*, test split {tests[0]}/CLASS/*{unused}"
        return image_data(request, root, (pool.part(), trees[1].part()), classes, {"layout": layout})
    places = stratified_split(pool.labels, classes, request.config.test_share)
    layout = f"CLASS/*, {len(places[1]):,} of {len(pool.labels):,} split off by class, seed 0"
    data = image_data(request, root, tuple(map(pool.part, places)), classes, {"layout": layout})
    kept, test_kept = (Subset(part, of=len(pool.labels)) for part in places)
    return replace(data, kept=kept, test_kept=test_kept, one_source=True)


def image_data(
    request: Request, root: Path, parts: tuple[Part, ...], classes: list[str], facts: Mapping[str, Any]
) -> ImageData:
    """The decoded files of the pool and the test: one array in the cache, of which each split is a slice, no copy."""
    pool, test = parts
    decoded = decode(request, root, [*pool.files, *test.files])
    images, test_images = decoded.images[: len(pool.files)], decoded.images[len(pool.files) :]
    known = {"classes": classes, **facts} | ({"memory_mapped": True} if decoded.mapped else {})
    return ImageData(request.config.name, images, pool.labels, test_images, test.labels, len(classes), facts=known)


def _splits(root: Path) -> tuple[str, list[str]]:
    """The folder of the pool's classes, ``""`` for CLASS/* itself, and those of test splits, of which one is used."""
    folders = {name.lower(): name for name in subfolders(root)}
    tests = [folders[name] for name in _TESTS if name in folders]
    # a folder of images alone may be a class of trains
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


def _check_classes(root: Path, split: str, found: Tree) -> None:
    """There are several classes, and none is empty."""
    where = root / split
    if not found.classes:
        raise DataError(f"{where} has no folders of classes: expected {LAYOUTS}, one folder for each class")
    if empty := [name for name, files in found.classes.items() if not files]:
        named = ", ".join(f"'{name}'" for name in empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise DataError(f"{len(empty)} class folders of {where} hold no images: {named}; fill or remove them")
    if len(found.classes) == 1:
        raise DataError(
            f"{where} has a single class, '{next(iter(found.classes))}': set dataset.path to the folder of {LAYOUTS}, "
            "with two classes or more"
        )


def _check_same(root: Path, splits: Sequence[str], trees: Sequence[Tree]) -> None:
    """Train and test have the same classes."""
    train, test = (found.classes.keys() for found in trees)
    sides = dict(zip(splits, (train - test, test - train), strict=True))
    if any(sides.values()):
        named = " and ".join(
            f"{', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''} only in {side}/"
            for side, names in sides.items()
            if names
        )
        raise DataError(f"the classes of {root} differ: {named}; both need a folder for every class")
