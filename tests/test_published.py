"""Published data sets from small files in their true formats: fetched, checked, read; pixels and labels in place."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.io
import torch
import torchvision

from dgal_bench.cli import info as surroundings
from dgal_bench.cli.info import ProbeAnswer, ProbeSite
from dgal_bench.core import cache
from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.data import datasets
from dgal_bench.data.datasets import DATASETS
from dgal_bench.data.image_data import ImageData
from dgal_bench.data.torchvision import CIFAR10, CIFAR100, EMNIST, FASHION_MNIST, MNIST, SVHN, File, Source, cache_key
from tests import test_published_files
from tests.loading import load, request

server, heard = test_published_files.server, test_published_files.heard  # the mirror on this machine

RNG = np.random.default_rng(0)
POOL, TEST = 60, 26
CLASSES = {"mnist": 10, "fashion_mnist": 10, "emnist": 26, "svhn": 10, "cifar10": 10, "cifar100": 100}
GREY, COLOUR = ("mnist", "fashion_mnist", "emnist"), ("svhn", "cifar10", "cifar100")
PACKED = ("mnist", "emnist", "cifar10", "cifar100")


@dataclass
class Split:
    """What a test expects to read: images (n, c, h, w) uint8 and labels from 0."""

    images: np.ndarray
    labels: np.ndarray


def draw(name, n):
    shape = (1, 28, 28) if name in GREY else (3, 32, 32)
    return Split(RNG.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) % CLASSES[name])


# --- the files as their publishers write them -------------------------------------------------------------------------


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_files(source, pool, test, images, labels):
    """``images`` and ``labels``: how a publisher turns them before they are written."""
    contents = [content for split in (pool, test) for content in (images(split.images[:, 0]), labels(split.labels))]
    return dict(zip(source.files, map(idx, contents), strict=True))


def mnist_files(source, pool, test):
    return idx_files(source, pool, test, images=lambda images: images, labels=lambda labels: labels)


def emnist_files(source, pool, test):
    """Every image transposed, labels from 1."""
    return idx_files(
        source, pool, test, images=lambda images: images.transpose(0, 2, 1), labels=lambda labels: labels + 1
    )


def svhn_files(source, pool, test):
    """X (height, width, channel, n); y (n, 1) where the digit 0 is 10."""
    files = {}
    for name, split in zip(source.files, (pool, test), strict=True):
        content, digits = io.BytesIO(), np.where(split.labels == 0, 10, split.labels).astype(np.uint8)
        x = np.ascontiguousarray(split.images.transpose(2, 3, 1, 0))
        scipy.io.savemat(content, {"X": x, "y": digits[:, None]}, do_compression=True)
        files[name] = content.getvalue()
    return files


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 and NumPy 1 wrote them in 2009: strings of bytes, the old names of modules."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        short = len(value) < 256
        self.write(b"U" + bytes([len(value)]) + value if short else b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes

    def reducer_override(self, value):
        if isinstance(value, np.dtype):
            return np.dtype, (value.str[1:].encode(), 0, 1), (3, b"|", None, None, None, -1, -1, 0)
        return NotImplemented


def python2_pickle(value):
    content = io.BytesIO()
    Python2Pickler(content, 2).dump(value)
    return content.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def rows(images):
    """(n, 3072): 1,024 red values row by row, then the green and the blue ones."""
    return np.concatenate([images[:, channel].reshape(len(images), 1024) for channel in range(3)], axis=1)


def named(n):
    return [f"image_{i}.png".encode() for i in range(n)]


def cifar10_files(source, pool, test):
    def batch(images, labels, title):
        content = {b"batch_label": title, b"labels": labels.tolist(), b"data": rows(images)}
        return python2_pickle(content | {b"filenames": named(len(labels))})

    *train, last, meta = source.files
    parts = zip(train, np.split(pool.images, 5), np.split(pool.labels, 5), strict=True)
    files = {name: batch(images, labels, b"training batch") for name, images, labels in parts}
    names = [f"class {i}".encode() for i in range(10)]
    about = {b"num_cases_per_batch": 10000, b"label_names": names, b"num_vis": 3072}
    return files | {last: batch(test.images, test.labels, b"testing batch"), meta: python2_pickle(about)}


def cifar100_files(source, pool, test):
    files = {}
    for name, split in zip(source.files, (pool, test), strict=False):
        fine = split.labels.tolist()
        content = {b"filenames": named(len(fine)), b"batch_label": b"batch 1 of 1", b"fine_labels": fine}
        coarse = {b"coarse_labels": [label // 5 for label in fine], b"data": rows(split.images)}
        files[name] = python2_pickle(content | coarse)
    fine, coarse = ([f"{kind} {i}".encode() for i in range(n)] for kind, n in (("class", 100), ("coarse", 20)))
    return files | {"cifar-100-python/meta": python2_pickle({b"fine_label_names": fine, b"coarse_label_names": coarse})}


def gz_archives(files):
    return {f"{name}.gz": gzip.compress(raw) for name, raw in files.items()}


def emnist_archive(files):
    """One zip of all of EMNIST's parts, each in a .gz."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("gzip/emnist-digits-mapping.txt", "0 48")
        for name, raw in {"emnist-digits-test-labels-idx1-ubyte": b"other", **files}.items():
            archive.writestr(f"gzip/{name}.gz", gzip.compress(raw))
    return {"gzip.zip": content.getvalue()}


def cifar_archive(files):
    folder = next(iter(files)).split("/")[0]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        entry = tarfile.TarInfo(folder)
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
        for name, raw in {f"{folder}/readme.html": b"<html>", **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return {f"{'cifar-10' if '10-' in folder else 'cifar-100'}-python.tar.gz": content.getvalue()}


FORMATS = {
    "mnist": (MNIST, mnist_files, gz_archives),
    "fashion_mnist": (FASHION_MNIST, mnist_files, gz_archives),
    "emnist": (EMNIST, emnist_files, emnist_archive),
    "svhn": (SVHN, svhn_files, dict),
    "cifar10": (CIFAR10, cifar10_files, cifar_archive),
    "cifar100": (CIFAR100, cifar100_files, cifar_archive),
}


def md5(raw):
    return hashlib.md5(raw).hexdigest()


def tables(source, files, archives, url):
    """What torchvision's class says of a publication, in its own words."""
    listed = [[name.split("/")[-1], md5(raw)] for name, raw in files.items()]
    if source.name == "svhn":
        splits = zip(("train", "test"), files, strict=True)
        return {"split_list": {split: [f"{url}{name}", name, md5(files[name])] for split, name in splits}}
    if source.name == "emnist":
        return {"url": f"{url}gzip.zip", "md5": md5(archives["gzip.zip"])}
    if source.name.startswith("cifar"):
        ((name, raw),) = archives.items()
        meta = getattr(torchvision.datasets, source.torchvision_class).meta | {"md5": listed[-1][1]}
        parts = {"train_list": listed[:-2], "test_list": listed[-2:-1], "meta": meta}
        return {"url": f"{url}{name}", "filename": name, "tgz_md5": md5(raw), **parts}
    return {"mirrors": [url], "resources": [(name, md5(raw)) for name, raw in archives.items()]}


@dataclass
class Publication:
    """A small data set, its files and archives, and how to lay them out by hand."""

    name: str
    source: Source
    pool: Split
    test: Split
    files: dict[str, bytes]
    archives: dict[str, bytes]
    root: Path
    cache: Path
    told: list

    def lay(self, contents):
        for name, raw in contents.items():
            path = self.source.at(self.root) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        return path

    def path(self, name):
        return self.source.at(self.root) / name

    def load(self, **settings) -> ImageData:
        return datasets.load(request(self.name, self.root, self.cache, self.on_event, **settings))

    def fetch(self, **settings):
        datasets.fetch(self.name, self.root, self.on_event, **settings)

    def on_event(self, what, done, of):
        self.told.append((what, done, of))

    def is_read_as(self, data):
        for images, labels, split in (
            (data.images, data.labels, self.pool),
            (data.test_images, data.test_labels, self.test),
        ):
            assert images.dtype == torch.uint8
            assert images.is_contiguous()
            assert labels.dtype == torch.int64
            assert np.array_equal(images, split.images)
            assert np.array_equal(labels, split.labels)
        return True


def digest_like(known: File, raw):
    """As much as is known of the published file, of this one."""
    kind = known.digest and known.digest.split(":")[0]
    return File(known.size and len(raw), kind and f"{kind}:{hashlib.new(kind, raw).hexdigest()}")


@pytest.fixture
def publish(tmp_path, server, monkeypatch):
    def publish(name, pool=None, test=None):
        original, write, pack = FORMATS[name]
        pool, test = pool or draw(name, POOL), test or draw(name, TEST)
        files = write(original, pool, test)
        archives = pack(files)
        known = {file: digest_like(original.files[file], raw) for file, raw in files.items()}
        source = replace(original, files=known, counts=(len(pool.labels), len(test.labels)))
        for archive, raw in archives.items():
            (server.folder / archive).write_bytes(raw)
        publisher = getattr(torchvision.datasets, source.torchvision_class)
        for key, value in tables(source, files, archives, server.url).items():
            monkeypatch.setattr(publisher, key, value)
        read = partial(DATASETS[name].read.func, source)
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], read=read, source=source))
        root = tmp_path / "data"
        return Publication(name, source, pool, test, files, archives, root, tmp_path / "cache", [])

    return publish


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_downloaded_unpacked_and_read(publish, heard, name):
    small = publish(name)
    small.fetch()
    data = small.load()
    assert small.is_read_as(data)
    assert data.n_classes == CLASSES[name] == len(data.facts["classes"])
    assert data.name == name
    there = {str(path.relative_to(small.source.at(small.root))) for path in small.root.rglob("*") if path.is_file()}
    assert there == {*small.files, f".{name}.lock", f"{name}.manifest.json"}  # no archive, no part
    assert sorted(heard.paths) == sorted(f"/{archive}" for archive in small.archives)


@pytest.mark.parametrize("name", FORMATS)
def test_laid_there_by_hand_it_needs_no_network(publish, heard, name):
    small = publish(name)
    small.lay(small.archives)
    small.fetch(offline=True)
    assert small.is_read_as(small.load())
    assert heard.paths == []


@pytest.mark.parametrize("name", FORMATS)
def test_the_registry_speaks_of_the_archives_that_torchvision_knows(name):
    source = FORMATS[name][0]
    addresses = source.archive_addresses()
    assert {archive.name for archive in source.archives} <= set(addresses)
    assert all(address.urls and len(address.md5) == 32 for address in addresses.values())
    assert sorted(file for archive in source.archives for file in archive.members.values()) == sorted(source.files)


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100])
def test_the_digests_of_the_registry_are_those_that_torchvision_checks(source):
    publisher = getattr(torchvision.datasets, source.torchvision_class)
    meta = (publisher.meta["filename"], publisher.meta["md5"])
    listed = [*map(tuple, publisher.train_list), *map(tuple, publisher.test_list), meta]
    assert {f"{publisher.base_folder}/{name}": f"md5:{digest}" for name, digest in listed} == {
        name: file.digest for name, file in source.files.items()
    }


def test_svhns_digests_are_those_that_torchvision_checks():
    listed = [torchvision.datasets.SVHN.split_list[split] for split in ("train", "test")]
    assert [(name, f"md5:{digest}") for _, name, digest in listed] == [
        (name, file.digest) for name, file in SVHN.files.items()
    ]


# --- what is where in the files ---------------------------------------------------------------------------------------


def test_an_l_of_emnist_is_upright(publish):
    """Published transposed: its long stroke lies, as it is in the file, in the row that is a column."""
    pool = draw("emnist", POOL)
    pool.images[0] = 0
    pool.images[0, 0, 3:25, 6] = 255  # the long stroke, down the left
    pool.images[0, 0, 24, 6:16] = 255  # the short one, at its foot
    pool.labels[0] = 11  # l
    small = publish("emnist", pool)
    raw = np.frombuffer(small.files["emnist-letters-train-images-idx3-ubyte"][16:], np.uint8).reshape(-1, 28, 28)
    assert raw[0].sum(axis=1).argmax() == 6
    assert small.files["emnist-letters-train-labels-idx1-ubyte"][8] == 12
    small.lay(small.files)
    data = small.load()
    assert (data.images[0, 0, 3:25, 6] == 255).all()
    assert (data.images[0, 0, 24, 6:16] == 255).all()
    assert int((data.images[0] > 0).sum()) == 22 + 9
    assert data.facts["classes"][data.labels[0]] == "l"


def test_svhn_is_published_height_width_channel_image(publish):
    small = publish("svhn")
    small.lay(small.files)
    data = small.load()
    raw = scipy.io.loadmat(io.BytesIO(small.files["train_32x32.mat"]))
    assert raw["X"].shape == (32, 32, 3, POOL)
    for row, column, channel, image in [(0, 31, 0, 5), (31, 0, 1, 6), (7, 19, 2, 59)]:
        assert data.images[image, channel, row, column] == raw["X"][row, column, channel, image]
    assert set(raw["y"].ravel()) == set(range(1, 11))
    assert torch.equal(data.labels == 0, torch.from_numpy(raw["y"].ravel() == 10))
    assert data.facts["classes"][0] == "0"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifars_rows_are_red_then_green_then_blue_row_by_row(publish, name):
    small = publish(name)
    small.lay(small.files)
    data = small.load()
    raw = pickle.loads(small.files[next(iter(small.files))], encoding="bytes")
    assert raw[b"data"].shape[1] == 3072
    for image, row, column in [(0, 0, 31), (3, 31, 0), (11, 7, 19)]:
        red, green, blue = (raw[b"data"][image, 1024 * channel + 32 * row + column] for channel in range(3))
        assert data.images[image, :, row, column].tolist() == [red, green, blue]
    assert data.facts["classes"][3] == "class 3"


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(step, *said):
    with pytest.raises(DataError) as caught:
        step()
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in text
    for words in said:
        assert words in text
    return text


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_file_is_named_with_what_to_do(publish, heard, name):
    small = publish(name)
    path = small.lay(small.files)
    path.unlink()
    gone = str(path.relative_to(small.source.at(small.root)))
    text = refused(small.load, f"'{name}' is not complete at", f"`dgal-bench data {name}`", "DGAL_DATA")
    packed = {
        "svhn": "",  # published as it is
        "emnist": " (or gzip.zip)",
        "cifar10": " (or cifar-10-python.tar.gz)",
        "cifar100": " (or cifar-100-python.tar.gz)",
    }.get(name, " (or their .gz)")
    assert f"put {gone}{packed} there, or set" in text
    refused(lambda: small.fetch(offline=True), gone, "offline=true forbids to download it")
    assert heard.paths == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_is_named_with_both_sizes_or_digests(publish, name):
    small = publish(name)
    file, whole = next(iter(small.files.items()))
    small.lay(small.files | {file: whole[:-7]})
    by = f"{len(whole) - 7:,} bytes"
    other = f"where {len(whole):,} are published" if small.source.files[file].size else f"not {md5(whole)[:12]}"
    refused(small.load, str(small.path(file)), by, other, "delete it", f"`dgal-bench data {name}`")
    assert small.path(file).read_bytes() == whole[:-7]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "emnist"])
def test_one_changed_byte_is_noticed(publish, name):
    small = publish(name)
    file, whole = next(iter(small.files.items()))
    small.lay(small.files | {file: whole[:-1] + bytes([whole[-1] ^ 1])})
    kind, digest = small.source.files[file].digest.split(":")
    refused(small.load, str(small.path(file)), f"is not the published one ({len(whole):,} bytes, {kind} ", digest[:12])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_pickle_that_is_not_the_published_one_is_never_opened(publish, tmp_path, name):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    small = publish(name)
    for file, raw in small.files.items():
        trap = pickle.dumps(Trap())
        small.lay(small.files | {file: trap + bytes(max(0, len(raw) - len(trap)))})
        refused(small.load, f"{small.path(file)} of data set '{name}'")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[: len(raw) // 2], lambda raw: b"<html>log in first</html>", lambda raw: raw[:5]],
    ids=["truncated", "no archive", "hardly begun"],
)
def test_a_damaged_archive_is_named_and_leaves_nothing_half(publish, name, damage):
    small = publish(name)
    archive, raw = next(iter(small.archives.items()))
    small.lay(small.archives | {archive: damage(raw)})
    text = refused(lambda: small.fetch(offline=True), str(small.path(archive)), "delete it and try again")
    assert ("cannot be unpacked (" in text) != (name == "emnist")  # EMNIST's is known by its md5 and not even opened
    there = {str(path.relative_to(small.source.at(small.root))): path for path in small.root.rglob("*.*")}
    assert there[archive].read_bytes() == damage(raw)  # the user's: left alone
    assert set(there) <= {*small.files, *small.archives, f".{name}.lock", f"{name}.manifest.json"}
    assert all(
        small.path(file).read_bytes() == whole for file, whole in small.files.items() if small.path(file).exists()
    )


@pytest.mark.parametrize("name", PACKED)
def test_an_archive_of_other_content_is_not_taken_for_the_published_one(publish, name):
    """EMNIST's by the archive's own md5, for its files have none; the others' by their files'."""
    small = publish(name)
    source, write, pack = FORMATS[name]
    others = pack(write(source, draw(name, POOL), draw(name, TEST)))  # another draw, whole and in the true format
    archive = next(iter(others))
    small.lay(small.archives | {archive: others[archive]})
    refused(lambda: small.fetch(offline=True), archive, "is not the published one", "delete it and try again")


@pytest.mark.parametrize("name", FORMATS)
def test_a_mirror_that_serves_something_else_is_not_believed(publish, server, name):
    small = publish(name)
    served = next(path for path in server.folder.iterdir() if path.is_file())
    served.write_bytes(b"<html>log in first</html>")
    refused(small.fetch, "cannot be downloaded", f"/{served.name}: MD5 hash of downloaded file", "DGAL_DATA")
    assert not small.path(served.name).exists()


@pytest.mark.parametrize(
    ("name", "label", "said"),
    [
        ("mnist", 10, "labels 0 to 10 in the pool split, not 0 to 9"),
        ("emnist", 26, "labels 1 to 27 in the pool split, not 1 to 26"),
        ("emnist", -1, "labels 0 to 26 in the pool split, not 1 to 26"),
        ("svhn", 11, "labels 0 to 11 in the pool split, not 0 to 9"),
        ("cifar10", 10, "labels 0 to 10 in the pool split, not 0 to 9"),
        ("cifar100", 100, "labels 0 to 100 in the pool split, not 0 to 99"),
    ],
)
def test_a_label_of_no_class_is_refused(publish, name, label, said):
    pool = draw(name, POOL)
    pool.labels[7] = label
    small = publish(name, pool)
    small.lay(small.files)
    refused(small.load, said, f"`dgal-bench data {name}`")


@pytest.mark.parametrize("name", FORMATS)
def test_fewer_images_than_published_are_refused(publish, monkeypatch, name):
    """Should a line of the registry ever be wrong."""
    small = publish(name)
    small.lay(small.files)
    more = replace(small.source, counts=(POOL, TEST + 1))
    dataset = DATASETS[name]
    monkeypatch.setitem(DATASETS, name, replace(dataset, read=partial(dataset.read.func, more), source=more))
    refused(small.load, f"a test split of {TEST}x", f"not {TEST + 1} images of")


@pytest.mark.parametrize("name", GREY)
def test_bytes_that_are_no_idx_file_are_refused(publish, name):
    """Of EMNIST's files only the sizes are published: what has the size must still be in the format."""
    small = publish(name)
    file, raw = next(iter(small.files.items()))
    source = replace(small.source, files=small.source.files | {file: File(len(raw))})
    DATASETS[name] = replace(DATASETS[name], read=partial(DATASETS[name].read.func, source), source=source)
    small.lay(small.files | {file: bytes(len(raw))})
    refused(small.load, f"data set '{name}' cannot be read (AssertionError)", file)


@pytest.mark.parametrize("name", COLOUR)
def test_torchvision_may_know_other_digests_than_the_registry(publish, monkeypatch, name):
    small = publish(name)
    small.lay(small.files)
    publisher = getattr(torchvision.datasets, small.source.torchvision_class)
    if name == "svhn":
        monkeypatch.setattr(
            publisher, "split_list", {k: [u, f, "0" * 32] for k, (u, f, _) in publisher.split_list.items()}
        )
    else:
        monkeypatch.setattr(publisher, "train_list", [[file, "0" * 32] for file, _ in publisher.train_list])
    refused(small.load, f"data set '{name}' cannot be read (Dataset not found or corrupted", "put the published files")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("key", "value"), [("path", "my/images"), ("image_size", 64)])
def test_settings_of_users_own_images_are_refused(publish, name, key, value):
    small = publish(name)
    small.lay(small.files)
    with pytest.raises(ConfigError, match=rf"dataset.{key}={value}: {name} is "):
        small.load(**{key: value})


def test_what_older_torchvisions_left_is_not_read_for_the_files_that_were_checked(publish):
    small = publish("mnist")
    small.lay(small.files)
    processed = small.root / "MNIST" / "processed"
    processed.mkdir()
    for file in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)), processed / file)
    assert len(torchvision.datasets.MNIST(str(small.root)).data) == 3  # the trap is real
    assert small.is_read_as(small.load())


# --- decoded once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COLOUR)
def test_decoded_once_and_then_read_without_the_files(publish, heard, name):
    small = publish(name)
    small.lay(small.files)
    first = small.load()
    assert small.told == [(f"decoding {name}", done, 2) for done in (0, 1, 2)]
    for file in small.files:
        small.path(file).unlink()
    again = small.load()
    assert small.is_read_as(again)
    assert again.sha256 == first.sha256
    assert again.facts == first.facts
    assert len(small.told) == 3
    small.fetch(offline=True, cache=small.cache)  # nothing is asked for what is decoded
    assert heard.paths == []
    refused(lambda: small.fetch(offline=True, cache=small.root), "offline=true")


@pytest.mark.parametrize("name", COLOUR)
def test_a_damaged_entry_is_made_again_of_checked_files(publish, caplog, name):
    small = publish(name)
    small.lay(small.files)
    small.load()
    array = small.cache / cache_key(small.source) / "images.npy"
    array.write_bytes(array.read_bytes()[:-1])
    assert small.is_read_as(small.load())
    assert "images.npy" in caplog.text
    array.write_bytes(array.read_bytes()[:-1])
    small.path(next(iter(small.files))).unlink()
    refused(small.load, f"data set '{name}' is not complete")


@pytest.mark.parametrize("name", COLOUR)
def test_other_files_are_another_entry(publish, name):
    small = publish(name)
    small.lay(small.files)
    small.load()
    other = publish(name)
    assert cache_key(other.source) != cache_key(small.source)
    other.lay(other.files)
    assert other.is_read_as(other.load())
    assert other.pool.images.tobytes() != small.pool.images.tobytes()


@pytest.mark.parametrize("name", COLOUR)
def test_more_than_memory_is_mapped_and_says_so(publish, monkeypatch, name):
    small = publish(name)
    small.lay(small.files)
    assert "memory_mapped" not in small.load().facts
    monkeypatch.setattr(cache, "free_memory", lambda: 0)
    data = small.load()
    assert data.facts["memory_mapped"] is True
    assert small.is_read_as(data)


@pytest.mark.parametrize("name", GREY)
def test_what_is_read_directly_needs_no_cache_and_is_checked_on_every_load(publish, name):
    small = publish(name)
    small.lay(small.files)
    small.load()
    assert not small.cache.exists()
    small.path(next(iter(small.files))).unlink()
    refused(small.load, f"data set '{name}' is not complete")


# --- where they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_whereabouts(publish, name):
    small = publish(name)
    where = small.source.at(small.root).resolve()
    n = len(small.files)
    told = f"{n} of {n} files are not there, at {where}: `dgal-bench data {name}` fetches them"
    assert datasets.describe_files(name, small.root) == told
    small.lay(small.files)
    megabytes = sum(map(len, small.files.values())) / 1e6
    vouched = "of the published sizes" if name == "emnist" else "as published"
    assert datasets.describe_files(name, small.root) == f"{n} files, {megabytes:.1f} MB, {vouched}, at {where}"


def test_root_level_sets_do_not_meet(publish):
    """SVHN and both CIFARs lie in the root folder itself: locks and manifests are of each."""
    for name in COLOUR:
        small = publish(name)
        small.fetch()
        assert small.is_read_as(small.load())
    assert {path.name for path in small.root.iterdir()} == {
        "train_32x32.mat", "test_32x32.mat", "cifar-10-batches-py", "cifar-100-python",
        *(f".{name}.lock" for name in COLOUR), *(f"{name}.manifest.json" for name in COLOUR),
    }  # fmt: skip


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_says_where_it_is(tmp_path, name):
    text = datasets.describe_files(name, tmp_path)
    assert text
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_notes_what_is_not_there(publish):
    small = publish("svhn")
    small.lay(small.files)
    cifar = publish("cifar10")
    nobody = ProbeAnswer(error="not asked")

    def states():
        site = ProbeSite(small.root, small.cache, small.root, nobody, nobody, nobody)
        return dict(zip(DATASETS, (state for state, *_ in surroundings.check_data(site)), strict=True))

    expected = dict.fromkeys(DATASETS, "note") | {"digits": "ok", "svhn": "ok", "folder": "ok", "npz": "ok"}
    assert states() == expected
    (small.root / "mini_imagenet").mkdir()
    cifar.lay(cifar.files)
    small.path("test_32x32.mat").write_bytes(b"")
    assert states() == expected | {"mini_imagenet": "ok", "cifar10": "ok", "svhn": "trouble"}


def test_missing_svhn_and_cifar_say_which_folder_to_set(tmp_path):
    for name, landmark in [("svhn", "train_32x32.mat"), ("cifar10", "cifar-10-batches-py"), ("emnist", "EMNIST/raw")]:
        with pytest.raises(DataError, match=f"to the folder that holds {landmark}"):
            load(name, tmp_path, cache=tmp_path / "cache")
