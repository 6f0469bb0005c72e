"""A user's own arrays in an .npz file or a folder of .npy files: what is taken, and what is refused in one line."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dgal_bench.core.errors import ConfigError, DataError
from tests.loading import load

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 5, 6), dtype=np.uint8)
COLOURED = RNG.integers(0, 256, (20, 5, 6, 3), dtype=np.uint8)
VECTORS = RNG.normal(size=(20, 7))
LABELS = np.arange(20) % 2
TEST = {"test_images": IMAGES[:4], "test_labels": LABELS[:4]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.npz"


def save_folder(path, **arrays):
    """As ``unzip`` makes it of an .npz."""
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)


def read(path, **settings):
    return load("npz", Path("unused"), path=str(path), **settings)


def refused(path, kind, *words, **settings):
    with pytest.raises(kind) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, save_folder])
@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (IMAGES, IMAGES[:, None]),
        (IMAGES[..., None], IMAGES[:, None]),
        (IMAGES[:, None], IMAGES[:, None]),
        (COLOURED, COLOURED.transpose(0, 3, 1, 2)),
        (COLOURED.transpose(0, 3, 1, 2), COLOURED.transpose(0, 3, 1, 2)),
        (np.asfortranarray(COLOURED), COLOURED.transpose(0, 3, 1, 2)),
    ],
)
def test_images_with_a_test_split(path, save, images, expected):
    save(path, images=images, labels=LABELS, test_images=images[:4], test_labels=LABELS[:4])
    data = read(path)
    assert data.images.dtype == torch.uint8
    assert data.images.is_contiguous()
    assert data.images.tolist() == expected.tolist()
    assert data.test_images.tolist() == expected[:4].tolist()
    assert data.labels.tolist() == LABELS.tolist()
    assert data.test_labels.tolist() == LABELS[:4].tolist()
    assert data.labels.dtype == data.test_labels.dtype == torch.int64
    assert (data.n_classes, data.maximum) == (2, 255)
    assert data.facts["classes"] == [0, 1]
    assert str(images.shape) in data.facts["layout"]
    assert ("memory_mapped" in data.facts) == (save is save_folder)


def test_a_folder_is_mapped_and_never_written(path):
    save_folder(path, images=IMAGES, labels=LABELS, **TEST)
    before = (path / "images.npy").read_bytes()
    data = read(path)
    data.images[0] = 0
    assert (path / "images.npy").read_bytes() == before


def test_a_seeded_split_by_class(path):
    labels = np.array([0] * 5 + [1] * 15)
    np.savez(path, images=IMAGES, labels=labels)
    data = read(path)
    assert torch.bincount(data.test_labels).tolist() == [1, 3]
    both = torch.cat([data.images, data.test_images])
    where = [int(np.flatnonzero((image.numpy() == IMAGES[:, None]).all(axis=(1, 2, 3)))[0]) for image in both]
    assert sorted(where) == list(range(20))
    assert torch.cat([data.subset.positions, data.test_subset.positions]).tolist() == where
    assert (data.one_source, data.subset.of, data.test_subset.of) == (True, 20, 20)
    assert torch.cat([data.labels, data.test_labels]).tolist() == labels[where].tolist()
    assert "4 of 20 split off" in data.facts["layout"]
    assert len(read(path, test_share=0.4).test_images) == 8
    np.savez(path, embeddings=VECTORS, labels=labels)  # split like images
    assert read(path).images.flatten(1).tolist() == VECTORS[where[:16]].astype(np.float32).tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("save", [np.savez, save_folder])
def test_embeddings(path, save, dtype):
    vectors = VECTORS.astype(dtype)
    save(path, embeddings=vectors, labels=LABELS, test_embeddings=vectors[:3], test_labels=LABELS[:3])
    data = read(path)
    assert data.images.shape == (20, 7, 1, 1)
    assert data.images.dtype == torch.float32
    assert data.images.flatten(1).numpy().tolist() == vectors.astype(np.float32).tolist()
    assert data.test_images.shape == (3, 7, 1, 1)
    assert data.maximum == 1


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.where(LABELS, "cat", "dog"), ["cat", "dog"]),
        (LABELS * 4 - 3, [-3, 1]),
        (LABELS + 1, [1, 2]),
        ((LABELS * 200).astype(np.uint8), [0, 200]),
    ],
)
def test_labels_are_numbered_in_sorted_order_and_that_is_said(path, caplog, labels, classes):
    np.savez(path, images=IMAGES, labels=labels, test_images=IMAGES[:4], test_labels=labels[:4])
    data = read(path)
    assert data.facts["classes"] == classes
    assert [classes[label] for label in data.labels] == labels.tolist()
    assert [classes[label] for label in data.test_labels] == labels[:4].tolist()
    (record,) = caplog.records
    assert f"numbered 0 to 1 in sorted order: {classes[0]!r}, {classes[1]!r}" in record.message


def test_unknown_arrays_are_not_used_and_that_is_said(path, caplog):
    np.savez(path, images=IMAGES, labels=LABELS, weights=VECTORS, names=np.array([object()]))
    assert len(read(path).images) == 16
    (record,) = caplog.records
    assert "names, weights" in record.message


def with_values(value):
    vectors = VECTORS.copy()
    vectors[[3, 17]] = value
    vectors[4, 6] = value
    return vectors


def images_of(shape):
    return {"images": np.zeros(shape, np.uint8), "labels": LABELS}


OWN_TEST = {"images": IMAGES, "labels": LABELS, "test_images": IMAGES[:4]}

REFUSALS = [
    ({"x": IMAGES, "y": LABELS}, ["neither images nor embeddings", "there are: x, y"]),
    ({"images": IMAGES, "y": LABELS}, ["no labels", "there are: images, y"]),
    ({"images": IMAGES, "embeddings": VECTORS, "labels": LABELS}, ["both images and embeddings"]),
    ({"images": IMAGES, "labels": LABELS, "test_images": IMAGES}, ["no test_labels"]),
    ({"images": IMAGES, "labels": LABELS, "test_labels": LABELS}, ["no test_images"]),
    ({"embeddings": VECTORS, "labels": LABELS, **TEST}, ["no test_embeddings"]),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, ["(0, 5, 6) is empty"]),
    ({"images": np.uint8(3), "labels": LABELS}, ["() is empty"]),
    ({"images": IMAGES, "labels": LABELS, **TEST, "test_images": IMAGES[:4, :4]}, ["(4, 4, 6)", "same shape"]),
    *((images_of(shape), [str(shape), "could be"]) for shape in [(20, 3, 9, 3), (20, 1, 1, 1), (20, 3, 3, 1)]),
    *(
        (images_of(shape), [str(shape), "1 or 3 channels"])
        for shape in [(20,), (20, 9), (20, 9, 9, 2), (20, 4, 9, 9), (20, 3, 9, 9, 9)]
    ),
    *(
        ({"images": IMAGES.astype(dtype), "labels": LABELS}, [dtype, "uint8, 0 to 255"])
        for dtype in ("int64", "uint16", "int8", "bool")
    ),
    ({"images": IMAGES / 255, "labels": LABELS}, ["float64", "255 * images"]),
    ({**OWN_TEST, "test_images": IMAGES[:4] / 255, "test_labels": LABELS[:4]}, ["test_images float64", "uint8"]),
    *(
        ({"embeddings": with_values(value), "labels": LABELS}, ["3 of 20 hold NaN or infinity"])
        for value in (np.nan, np.inf, -np.inf, 1e300)
    ),
    (
        {"embeddings": VECTORS, "labels": LABELS, "test_embeddings": with_values(np.nan), "test_labels": LABELS},
        ["test_embeddings", "3 of 20 hold NaN"],
    ),
    *(
        ({"embeddings": vectors, "labels": LABELS}, [str(vectors.dtype), str(vectors.shape), "floats of shape (N, d)"])
        for vectors in (VECTORS.astype(int), VECTORS[:, :, None], VECTORS[:, 0], VECTORS.astype(complex))
    ),
    *(
        ({"images": IMAGES, "labels": labels}, [str(labels.shape), "(20, 5, 6)", "(20,)"])
        for labels in (LABELS[:19], LABELS[:, None], np.append(LABELS, 1))
    ),
    ({**OWN_TEST, "test_labels": LABELS[:3]}, ["test_labels int64 (3,) for test_images uint8 (4, 5, 6)", "(4,)"]),
    *(
        ({"images": IMAGES, "labels": labels}, [str(labels.dtype), "integers or strings"])
        for labels in (LABELS * 0.5, LABELS.astype(bool), np.array([b"a", b"b"] * 10))
    ),
    ({**OWN_TEST, "test_labels": [0, 7, 1, 9]}, ["2 classes", "7, 9"]),
    ({**OWN_TEST, "test_labels": ["0", "1", "0", "1"]}, ["int64", "<U1", "strings both, or integers"]),
    ({"images": IMAGES, "labels": LABELS * 0}, ["all labels are 0"]),
    ({"images": IMAGES, "labels": [*LABELS[:-1], 5]}, ["class '5'", "single example"]),
]


@pytest.mark.parametrize(("arrays", "words"), REFUSALS)
def test_arrays_that_are_missing_or_do_not_fit(path, arrays, words):
    np.savez(path, **arrays)
    refused(path, DataError, *words)


def test_a_split_and_settings_that_do_not_fit(path):
    np.savez(path, images=IMAGES, labels=LABELS)
    refused(path, ConfigError, "dataset.test_share=1.0", test_share=1.0)
    refused(path, ConfigError, "dataset.test_share=0.01", "class '0'", test_share=0.01)
    refused(path, ConfigError, "dataset.image_size=8", "net.input_size", image_size=8)
    with pytest.raises(ConfigError, match=r"dataset\.path=FILE\.npz .*DATA_PATH"):
        load("npz", Path("unused"))


@pytest.mark.parametrize("save", [np.savez, save_folder])
def test_pickles_are_never_opened(path, save):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "sprung"),)

    save(path, images=IMAGES, labels=np.array([Trap()] * 20, dtype=object))
    refused(path, DataError, str(path), "cannot be read", "bject")
    assert not (path.parent / "sprung").exists()


def test_files_that_are_something_else(path):
    refused(path, DataError, str(path), "is not there")
    path.mkdir()
    refused(path, DataError, "neither images nor embeddings", "dataset=folder reads image files")
    path.rmdir()
    path.write_bytes(b"no archive at all")
    refused(path, DataError, "cannot be read", "np.savez")
    with path.open("wb") as file:
        np.save(file, IMAGES)
    refused(path, DataError, "a single array", "np.savez")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"no array")
        archive.writestr("labels.npy", b"")
    refused(path, DataError, "cannot be read (images is no array)")


def test_truncated_and_damaged_files(path):
    np.savez(path, images=IMAGES, labels=LABELS)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, DataError, "cannot be read", "is it whole?")
    damaged = bytearray(whole)
    damaged[whole.index(IMAGES.tobytes()) + 300] ^= 1
    path.write_bytes(damaged)
    refused(path, DataError, "CRC")
    path.unlink()
    save_folder(path, images=IMAGES, labels=LABELS, **TEST)
    os.truncate(path / "images.npy", 300)
    refused(path, DataError, "cannot be read", "is it whole?")
