"""Mini-ImageNet in the layouts that people have, with one split of every class for all of them."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.core.seeding import rng_for
from dgal_bench.data import datasets, image_folder, mini_imagenet
from dgal_bench.data.mini_imagenet import SPLIT_FILE, SPLIT_SHA256, draw_split, read_split_file
from tests.loading import load

CLASSES = [f"n{number:08}" for number in (7, 21, 100, 1000, 20_000)]  # in sorted order
PER_CLASS = 6


def shrink(monkeypatch, tmp_path, n_classes, per_class, n_pool, n_test):
    """Fewer files, the split of every class drawn like the published one."""
    sizes = {"N_CLASSES": n_classes, "PER_CLASS": per_class, "N_POOL": n_pool, "N_TEST": n_test}
    for name, value in sizes.items():
        monkeypatch.setattr(mini_imagenet, name, value)
    raw = draw_split()
    (tmp_path / "split.txt").write_bytes(raw)
    monkeypatch.setattr(mini_imagenet, "SPLIT_FILE", tmp_path / "split.txt")
    monkeypatch.setattr(mini_imagenet, "SPLIT_SHA256", hashlib.sha256(raw).hexdigest())


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Five classes of six images, of which 3 are pool and 2 are test."""
    shrink(monkeypatch, tmp_path, n_classes=5, per_class=PER_CLASS, n_pool=3, n_test=2)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "mini_imagenet").mkdir()
    return tmp_path / "mini_imagenet"


def put(path, level):
    """A grey image of 2x2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P5 2 2 255\n" + bytes([level] * 4))


def level_of(label, place):
    return 10 * label + place


def name_of(label, place):
    return f"{CLASSES[label]}{place:04}.pgm"


def put_folders(root, inside=("", "", "", "", "")):
    for label, name in enumerate(CLASSES):
        for place in range(PER_CLASS):
            put(root / inside[label] / name / name_of(label, place), level_of(label, place))


def put_csv(root):
    for part, labels in (("train", [3, 1, 0]), ("val", [4]), ("test", [2])):
        lines = ["filename,label"]
        for place in reversed(range(PER_CLASS)):
            for label in labels:
                lines.append(f"{name_of(label, place)},{CLASSES[label]}")
                put(root / "images" / name_of(label, place), level_of(label, place))
        (root / f"{part}.csv").write_text("\n".join(lines) + "\n")


def read(root, **settings):
    return load("mini_imagenet", root.parent, cache=root.parent / "cache", **settings)


def refused(root, kind, *words, **settings):
    with pytest.raises(kind) as caught:
        read(root, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


LAYOUTS = {
    "CLASS/*": put_folders,
    "train/CLASS/*, val/CLASS/*, test/CLASS/*": lambda root: put_folders(
        root, ("val", "train", "test", "train", "train")
    ),
    "train.csv, val.csv and test.csv with images/*": put_csv,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_are_the_same_data(small, root, layout):
    LAYOUTS[layout](root)
    data = read(root)
    lines = read_split_file()
    for mark, images, labels in (("p", data.images, data.labels), ("t", data.test_images, data.test_labels)):
        expected = [(level_of(i, j), i) for i, line in enumerate(lines) for j, m in enumerate(line) if m == mark]
        assert list(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)) == expected
    assert (len(data.images), len(data.test_images), data.n_classes) == (15, 10, 5)
    assert data.facts == {
        "classes": CLASSES,
        "layout": layout,
        "split_sha256": hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest(),
    }


def test_a_class_that_lies_in_two_parts_is_taken_together(small, root):
    put_folders(root, ("train", "train", "train", "train", "val"))
    whole = read(root)
    (root / "test" / CLASSES[0]).mkdir(parents=True)
    for place in (0, 3):
        name = Path(CLASSES[0]) / name_of(0, place)
        (root / "train" / name).rename(root / "test" / name)
    assert read(root).sha256 == whole.sha256


def test_images_are_resized(small, root):
    put_folders(root)
    assert read(root, image_size=5).images.shape == (15, 1, 5, 5)


def test_the_published_split_is_what_the_seed_draws():
    assert SPLIT_FILE.read_bytes() == draw_split()
    lines = read_split_file()
    assert len(lines) == 100
    for place, line in enumerate(lines):
        assert {mark: line.count(mark) for mark in "pt-"} == {"p": 480, "t": 100, "-": 20}
        marks = np.repeat(list("pt-"), [480, 100, 20])
        assert line == "".join(rng_for(0, "mini_imagenet split", place).permutation(marks))
    assert hashlib.sha256(SPLIT_FILE.read_bytes()).hexdigest() == SPLIT_SHA256


@pytest.mark.parametrize("how", ["change", "remove"])
def test_another_split_is_refused(small, root, how):
    put_folders(root)
    path = mini_imagenet.SPLIT_FILE
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"p", b"t", 1))
    if how == "remove":
        path.unlink()
    refused(root, DataError, str(path), "install dgal-bench again")


def test_a_missing_set_says_what_to_put_where(tmp_path):
    refused(
        tmp_path / "mini_imagenet", DataError, str(tmp_path / "mini_imagenet"), "train.csv", "images/*", "DGAL_DATA"
    )
    assert "no download" in datasets.describe_files("mini_imagenet", tmp_path)
    (tmp_path / "mini_imagenet").mkdir()
    assert str(tmp_path / "mini_imagenet") in datasets.describe_files("mini_imagenet", tmp_path)


def test_the_number_of_classes(small, root):
    refused(root, DataError, "has 0 classes, not 5 (none)")
    put_folders(root, ("train", "train", "train", "val", "val"))
    (root / "train" / CLASSES[1]).rename(root / CLASSES[1])
    refused(root, DataError, "has 4 classes, not 5", CLASSES[0], "train, val and test are needed")


def test_the_number_of_images(small, root):
    put_folders(root)
    (root / CLASSES[1] / name_of(1, 4)).unlink()
    put(root / CLASSES[3] / "more.pgm", 1)
    refused(root, DataError, "2 classes", "do not have 6 images", f"{CLASSES[1]} (5), {CLASSES[3]} (7)")


def test_csv_files_that_do_not_fit_the_images(small, root):
    put_csv(root)
    (root / "images" / name_of(0, 0)).unlink()
    (root / "images" / name_of(4, 1)).unlink()
    refused(root, DataError, "2 images named in the csv files are not in", name_of(0, 0), name_of(4, 1))
    put_csv(root)
    with (root / "val.csv").open("a") as file:
        file.write(f"{name_of(4, 0)},{CLASSES[4]}\n")
    refused(root, DataError, "1 images are in the csv files", "more than once", name_of(4, 0))
    put_csv(root)
    (root / "val.csv").write_text("\n".join((root / "val.csv").read_text().splitlines()[:-1]))
    refused(root, DataError, f"{CLASSES[4]} (5)")


def test_csv_files_that_cannot_be_read(small, root):
    put_csv(root)
    (root / "test.csv").unlink()
    refused(root, DataError, "test.csv cannot be read")
    (root / "test.csv").write_text("file,label\na.jpg,b\n")
    refused(root, DataError, "test.csv has no column 'filename'", "filename,label")
    (root / "test.csv").write_text("filename,label\na.jpg,b\nc.jpg\n")
    refused(root, DataError, "test.csv: line 3 has no filename and label")
    (root / "test.csv").write_bytes(b"filename,label\n\xff\xfe,b\n")
    refused(root, DataError, "test.csv cannot be read")


def test_images_that_no_csv_file_names_are_said(small, root, caplog):
    put_csv(root)
    put(root / "images" / "more.pgm", 1)
    assert len(read(root).images) == 15
    assert "images/more.pgm" in caplog.text


def test_a_path_of_ones_own_is_refused(small, root):
    put_folders(root)
    refused(root, ConfigError, "dataset.path=/elsewhere", "data=ROOT", path="/elsewhere")


@pytest.mark.slow
def test_a_hundred_classes_of_six_hundred(root, monkeypatch):
    """The true numbers, by links to one image, which is not decoded 58,000 times."""

    def decode(request, root, files):
        return torch.full((len(files), 1, 2, 2), 7, dtype=torch.uint8), False

    monkeypatch.setattr(image_folder, "decode", decode)
    put(dark := root.parent / "dark.pgm", 7)
    for number in range(100):
        folder = root / ("train", "val", "test")[number % 3] / f"n{number:08}"
        folder.mkdir(parents=True)
        for place in range(600):
            os.link(dark, f"{folder}/{place}.pgm")
    data = read(root)
    assert (len(data.images), len(data.test_images)) == (48_000, 10_000)
    assert torch.bincount(data.labels).tolist() == [480] * 100
    assert torch.bincount(data.test_labels).tolist() == [100] * 100
    assert data.facts["split_sha256"] == SPLIT_SHA256
