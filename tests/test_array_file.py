"""A user's own arrays in an .npz file: what is taken, and what is refused in one line."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dgal_bench.core import cache
from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.data import array_file as npz
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


def read(path, **settings):
    return load("npz", Path("unused"), cache=path.parent / "cache", path=str(path), **settings)


def refused(path, kind, *words, **settings):
    with pytest.raises(kind) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    folder = path.parent / "cache"
    left = [file.name for file in folder.iterdir() if file.suffix != ".lock"] if folder.is_dir() else []
    assert left == []


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
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
    assert data.images.tolist() == expected.tolist()
    assert data.test_images.tolist() == expected[:4].tolist()
    assert data.labels.tolist() == LABELS.tolist()
    assert data.test_labels.tolist() == LABELS[:4].tolist()
    assert data.labels.dtype == torch.int64
    assert (data.n_classes, data.maximum) == (2, 255)
    assert data.facts["classes"] == [0, 1]
    assert str(images.shape) in data.facts["layout"]


def test_a_seeded_split_by_class(path, monkeypatch):
    labels = np.array([0] * 5 + [1] * 15)
    np.savez(path, images=IMAGES, labels=labels)
    data = read(path)
    assert torch.bincount(data.test_labels).tolist() == [1, 3]
    both = torch.cat([data.images, data.test_images])
    where = [int(np.flatnonzero((image.numpy() == IMAGES[:, None]).all(axis=(1, 2, 3)))[0]) for image in both]
    assert sorted(where) == list(range(20))
    assert torch.cat([data.labels, data.test_labels]).tolist() == labels[where].tolist()
    assert "4 of 20 split off" in data.facts["layout"]
    assert len(read(path, test_share=0.4).test_images) == 8
    # the same whatever the size of the pieces that are read at a time
    monkeypatch.setattr(npz, "_BLOCK", 200)
    os.utime(path)
    np.savez_compressed(path, images=IMAGES, labels=labels)
    assert read(path).sha256 == data.sha256


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_embeddings(path, dtype):
    vectors = VECTORS.astype(dtype)
    np.savez(path, embeddings=vectors, labels=LABELS, test_embeddings=vectors[:3], test_labels=LABELS[:3])
    data = read(path)
    assert data.images.shape == (20, 7, 1, 1)
    assert data.images.dtype == torch.float32
    assert data.images.flatten(1).numpy().tolist() == vectors.astype(np.float32).tolist()
    assert data.test_images.shape == (3, 7, 1, 1)
    assert data.maximum == 1
    assert data.images.is_floating_point()


def test_embeddings_are_split_like_images(path):
    np.savez(path, embeddings=VECTORS, labels=LABELS)
    vectors = read(path)
    np.savez(path, images=IMAGES, labels=LABELS)
    images = read(path)
    assert vectors.labels.tolist() == images.labels.tolist()
    place = [int(np.flatnonzero((IMAGES[:, None] == image.numpy()).all(axis=(1, 2, 3)))[0]) for image in images.images]
    assert vectors.images.flatten(1).tolist() == VECTORS[place].astype(np.float32).tolist()


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


def test_labels_that_count_from_0_need_no_word(path, caplog):
    np.savez(path, images=IMAGES, labels=LABELS)
    read(path)
    assert caplog.text == ""


def test_unknown_arrays_are_not_used_and_that_is_said(path, caplog):
    np.savez(path, images=IMAGES, labels=LABELS, weights=VECTORS, names=np.array([object()]))
    assert len(read(path).images) == 16
    (record,) = caplog.records
    assert "names, weights" in record.message


def test_the_cache_knows_the_content_and_not_the_place(path, monkeypatch):
    told = []
    np.savez(path, images=IMAGES, labels=LABELS)
    settings = {"cache": path.parent / "cache", "progress": lambda *word: told.append(word)}
    first = load("npz", Path("unused"), path=str(path), **settings)
    assert told[-1] == ("reading", 20, 20)
    told.clear()
    moved = path.rename(path.with_name("moved.npz"))
    os.utime(moved, ns=(0, 0))
    assert load("npz", Path("unused"), path=str(moved), **settings).sha256 == first.sha256
    assert told == []
    monkeypatch.setattr(cache, "free_memory", lambda: 0)
    mapped = load("npz", Path("unused"), path=str(moved), **settings)
    assert mapped.facts["memory_mapped"] is True
    assert mapped.sha256 == first.sha256
    assert "memory_mapped" not in first.facts
    np.savez(moved, images=IMAGES[::-1], labels=LABELS)
    assert load("npz", Path("unused"), path=str(moved), **settings).sha256 != first.sha256


def test_an_array_is_read_piece_by_piece(path, monkeypatch):
    monkeypatch.setattr(npz, "_BLOCK", 3 * 7 * 8)
    np.savez(path, embeddings=np.repeat(VECTORS, 50, axis=0), labels=np.repeat(LABELS, 50))
    sizes = []
    honest = npz._points
    monkeypatch.setattr(npz, "_points", lambda block, shape: sizes.append(len(block)) or honest(block, shape))
    data = read(path)
    assert max(sizes) == 3
    assert sum(sizes) == 1000
    assert len(torch.cat([data.images, data.test_images]).unique(dim=0)) == 20


@pytest.mark.parametrize("shape", [(20, 3, 9, 3), (20, 1, 1, 1), (20, 1, 9, 3), (20, 3, 3, 1)])
def test_ambiguous_shapes(path, shape):
    np.savez(path, images=np.zeros(shape, np.uint8), labels=LABELS)
    refused(path, DataError, str(shape), "could be (N, channels, height, width)")


@pytest.mark.parametrize("shape", [(20,), (20, 9), (20, 9, 9, 2), (20, 9, 9, 9), (20, 4, 9, 9), (20, 3, 9, 9, 9)])
def test_shapes_of_no_images(path, shape):
    np.savez(path, images=np.zeros(shape, np.uint8), labels=LABELS)
    refused(path, DataError, str(shape), "1 or 3 channels")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16, np.int8, bool])
def test_images_of_another_type(path, dtype):
    np.savez(path, images=IMAGES.astype(dtype), labels=LABELS)
    hint = ["255 * images"] if np.dtype(dtype).kind == "f" else []
    refused(path, DataError, np.dtype(dtype).name, "uint8, 0 to 255", *hint)
    np.savez(path, images=IMAGES, labels=LABELS, test_images=IMAGES.astype(dtype), test_labels=LABELS)
    refused(path, DataError, "test_images", "uint8, 0 to 255")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_embeddings_that_are_not_finite_are_counted(path, value):
    vectors = VECTORS.copy()
    vectors[[3, 17]] = value
    vectors[4, 6] = value
    np.savez(path, embeddings=vectors, labels=LABELS)
    refused(path, DataError, "3 of 20 embeddings", "NaN or infinity")
    np.savez(path, embeddings=VECTORS, labels=LABELS, test_embeddings=vectors[:5], test_labels=LABELS[:5])
    refused(path, DataError, "2 of 5 test_embeddings", "NaN or infinity")


@pytest.mark.parametrize("vectors", [VECTORS.astype(int), VECTORS[:, :, None], VECTORS[:, 0], VECTORS.astype(complex)])
def test_embeddings_of_another_type_or_shape(path, vectors):
    np.savez(path, embeddings=vectors, labels=LABELS)
    refused(path, DataError, str(vectors.dtype), str(vectors.shape), "floats of shape (N, d)")


@pytest.mark.parametrize("labels", [LABELS[:19], LABELS[:, None], np.append(LABELS, 1), np.eye(20, dtype=int)])
def test_labels_that_are_not_one_for_each(path, labels):
    np.savez(path, images=IMAGES, labels=labels)
    refused(path, DataError, str(labels.shape), "(20, 5, 6)", "(20,)")
    np.savez(path, images=IMAGES, labels=LABELS, test_images=IMAGES[:4], test_labels=labels[:3])
    refused(path, DataError, "test_labels", "(4,)")


@pytest.mark.parametrize("labels", [LABELS * 0.5, LABELS.astype(bool), np.array([b"a", b"b"] * 10)])
def test_labels_of_another_type(path, labels):
    np.savez(path, images=IMAGES, labels=labels)
    refused(path, DataError, str(labels.dtype), "integers or strings")


def test_labels_of_the_test_that_the_pool_does_not_have(path):
    np.savez(path, images=IMAGES, labels=LABELS, test_images=IMAGES[:4], test_labels=[0, 7, 1, 9])
    refused(path, DataError, "2 classes", "7, 9")
    np.savez(path, images=IMAGES, labels=LABELS, test_images=IMAGES[:4], test_labels=["0", "1", "0", "1"])
    refused(path, DataError, "int64", "<U1", "strings both, or integers")


def test_a_single_class(path):
    np.savez(path, images=IMAGES, labels=LABELS * 0)
    refused(path, DataError, "all labels are 0")


def test_a_split_that_does_not_fit(path):
    np.savez(path, images=IMAGES, labels=LABELS)
    refused(path, ConfigError, "dataset.test_share=1.0", test_share=1.0)
    refused(path, ConfigError, "dataset.test_share=0.01", "class '0'", test_share=0.01)
    np.savez(path, images=IMAGES, labels=[*LABELS[:-1], 5])
    refused(path, DataError, "class '5'", "single example")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": IMAGES, "y": LABELS}, ["neither images nor embeddings", "there are: x, y"]),
        ({"images": IMAGES, "y": LABELS}, ["no labels", "there are: images, y"]),
        ({"images": IMAGES, "embeddings": VECTORS, "labels": LABELS}, ["both images and embeddings"]),
        ({"images": IMAGES, "labels": LABELS, "test_images": IMAGES}, ["no test_labels"]),
        ({"images": IMAGES, "labels": LABELS, "test_labels": LABELS}, ["no test_images"]),
        ({"embeddings": VECTORS, "labels": LABELS, **TEST}, ["no test_embeddings"]),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, ["(0, 5, 6) is empty"]),
        ({"images": np.uint8(3), "labels": LABELS}, ["() is empty"]),
        ({"images": IMAGES, "labels": LABELS, **TEST, "test_images": IMAGES[:4, :4]}, ["(4, 4, 6)", "same shape"]),
        ({"images": IMAGES, "labels": LABELS.astype(object)}, ["labels holds Python objects (pickles)"]),
    ],
)
def test_arrays_that_are_missing_or_do_not_fit(path, arrays, words):
    np.savez(path, **arrays)
    refused(path, DataError, str(path), *words)


def test_pickles_are_never_opened(path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "sprung"),)

    np.savez(path, images=IMAGES, labels=np.array([Trap()] * 20, dtype=object))
    refused(path, DataError, "Python objects (pickles)")
    assert not (path.parent / "sprung").exists()


def test_files_that_are_something_else(path):
    refused(path, DataError, str(path), "is not there")
    path.mkdir()
    refused(path, DataError, "is a folder", "dataset=folder")
    path.rmdir()
    path.write_bytes(b"no archive at all")
    refused(path, DataError, "no .npz file", "np.savez")
    with path.open("wb") as file:
        np.save(file, IMAGES)
    refused(path, DataError, "a single array", "np.savez")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"no array")
        archive.writestr("labels.npy", b"")
    refused(path, DataError, "cannot be read")


def test_truncated_and_damaged_files(path):
    np.savez(path, images=IMAGES, labels=LABELS)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, DataError, "truncated")
    damaged = bytearray(whole)
    damaged[whole.index(IMAGES.tobytes()) + 300] ^= 1
    path.write_bytes(damaged)
    refused(path, DataError, "CRC")
    with zipfile.ZipFile(path, "w") as archive, archive.open("labels.npy", "w") as file:
        np.save(file, LABELS)
    with zipfile.ZipFile(path, "a") as archive, archive.open("images.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (20, 5, 6)})
        file.write(IMAGES.tobytes()[:-100])
    refused(path, DataError, "images ends within row 16")


def test_no_path_and_settings_that_mean_nothing(path):
    with pytest.raises(ConfigError, match=r"dataset\.path=FILE\.npz .*DATA_PATH"):
        load("npz", Path("unused"))
    np.savez(path, images=IMAGES, labels=LABELS)
    refused(path, ConfigError, "dataset.image_size=8", "net.input_size", image_size=8)
