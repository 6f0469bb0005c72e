"""Published data sets from small files in their true formats: fetched from this machine, checked, read, refused."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import scipy.io
import torch
import torchvision

from dgal_bench.cli.main import main
from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.core.files import lock
from dgal_bench.data import datasets
from dgal_bench.data.datasets import DATASETS
from dgal_bench.data.image_data import ImageData
from dgal_bench.data.torchvision import CIFAR10, CIFAR100, EMNIST, FASHION_MNIST, MNIST, SVHN, Source
from tests.loading import load, request

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
        meta = getattr(torchvision.datasets, source.publisher).meta | {"md5": listed[-1][1]}
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
    progress: list

    def lay(self, contents):
        for name, raw in contents.items():
            path = self.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        return path

    def path(self, name):
        return self.source.at(self.root) / name

    def load(self, **settings) -> ImageData:
        return datasets.load(request(self.name, self.root, **settings))

    def fetch(self, **settings):
        datasets.fetch(self.name, self.root, lambda *event: self.progress.append(event), **settings)

    def there(self):
        """All files under the root, by their paths from the data set's folder."""
        paths = (path for path in self.root.rglob("*") if path.is_file())
        return {os.path.relpath(path, self.source.at(self.root)) for path in paths}

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


@pytest.fixture
def server(tmp_path):
    """A mirror on this machine: its address, the folder it serves, and the paths it was asked for."""
    folder, asked = tmp_path / "mirror", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as http_server:
        threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{http_server.server_port}/"
        yield SimpleNamespace(url=url, folder=folder, asked=asked)
        http_server.shutdown()


@pytest.fixture
def publish(tmp_path, server, monkeypatch):
    def publish(name, pool=None, test=None):
        original, write, pack = FORMATS[name]
        pool, test = pool or draw(name, POOL), test or draw(name, TEST)
        files = write(original, pool, test)
        archives = pack(files)
        digests = {file: md5(raw) for file, raw in files.items()}
        parts = (torch.from_numpy(part) for split in (pool, test) for part in (split.images, split.labels))
        content = original.sha256 and ImageData(name, *parts, n_classes=CLASSES[name]).sha256
        source = replace(original, files=digests, sha256=content)
        for archive, raw in archives.items():
            (server.folder / archive).write_bytes(raw)
        for key, value in tables(source, files, archives, server.url).items():
            monkeypatch.setattr(getattr(torchvision.datasets, source.publisher), key, value)
        read = partial(DATASETS[name].read.func, source)
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], read=read, source=source))
        return Publication(name, source, pool, test, files, archives, tmp_path / "data", [])

    return publish


def refused(step, *words, exit_code=3):
    with pytest.raises(DataError) as caught:
        step()
    text = str(caught.value)
    assert caught.value.exit_code == exit_code
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


# --- fetched and read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_downloaded_unpacked_and_read(publish, server, name):
    small = publish(name)
    small.fetch()
    data = small.load()
    assert small.is_read_as(data)
    assert data.n_classes == CLASSES[name] == len(data.facts["classes"])
    assert data.name == name
    assert small.there() == {*small.files}  # no archive, no part
    assert set(server.asked) == {f"/{archive}" for archive in small.archives}
    assert small.progress == [(f"fetching {', '.join(small.archives)}", 0, 1)]
    small.fetch()
    assert len(small.progress) == 1  # nothing is missing
    size = sum(map(len, small.files.values())) / 1e6
    where = small.source.at(small.root)
    assert datasets.describe_files(name, small.root) == (
        f"{len(small.files)} files, {size:.1f} MB, as published, at {where.resolve()}"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_archives_put_there_by_hand_need_no_network(publish, server, name):
    small = publish(name)
    small.lay(small.archives)
    small.fetch(offline=True)
    assert small.is_read_as(small.load())
    assert small.there() == {*small.files, *small.archives}  # the user's archives: left alone
    assert server.asked == []


def test_data_sets_in_the_root_folder_do_not_meet(publish):
    for name in COLOUR:
        small = publish(name)
        small.fetch()
        assert small.is_read_as(small.load())
    assert {path.name for path in small.root.iterdir()} == {
        "train_32x32.mat", "test_32x32.mat", "cifar-10-batches-py", "cifar-100-python",
    }  # fmt: skip


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
    assert small.is_read_as(data)
    assert data.facts["classes"][data.labels[0]] == "l"


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100, SVHN])
def test_the_digests_of_the_table_are_those_that_torchvision_checks(source):
    publisher = getattr(torchvision.datasets, source.publisher)
    if source is SVHN:
        assert source.archives(publisher) == source.files
        return
    meta = (publisher.meta["filename"], publisher.meta["md5"])
    listed = [*map(tuple, publisher.train_list), *map(tuple, publisher.test_list), meta]
    assert {f"{publisher.base_folder}/{name}": digest for name, digest in listed} == source.files


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "emnist"])
def test_real_images_are_those_of_the_table(name):
    root = os.environ.get("DGAL_DATA")
    if not root:
        pytest.skip("needs $DGAL_DATA")
    data = load(name, Path(root))
    counts = (124_800, 20_800) if name == "emnist" else (60_000, 10_000)
    assert (len(data.images), len(data.test_images)) == counts
    assert torch.bincount(data.labels).min() > 4500
    for file, digest in FORMATS[name][0].files.items():
        path = FORMATS[name][0].at(Path(root)) / file
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_file_is_named_with_what_to_do(publish, server, name):
    small = publish(name)
    path = small.lay(small.files)
    path.unlink()
    gone = str(path.relative_to(small.source.at(small.root)))
    (landmark, *_) = small.source.landmarks.split(", ")
    packed = {"svhn": "", "mnist": " (or their .gz)", "fashion_mnist": " (or their .gz)"}.get(
        name, f" (or {next(iter(small.archives))})"
    )
    words = [f"'{name}' is not complete at", f"`dgal-bench data {name}`", f"put {gone}{packed} there, or set DGAL_DATA"]
    refused(small.load, *words, f"to the folder that holds {landmark}")
    refused(lambda: small.fetch(offline=True), *words, "offline=true forbids to download it")
    assert server.asked == []
    where = small.source.at(small.root).resolve()
    text = f"1 of {len(small.files)} files are not there, at {where}: `dgal-bench data {name}` fetches them"
    assert datasets.describe_files(name, small.root) == text


DAMAGES = {
    "truncated": lambda raw: raw[:-7],
    "empty": lambda raw: b"",
    "one byte changed": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "a page": lambda raw: b"<html>log in first</html>",
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_of_other_content_is_named_with_both_hashes_and_left_alone(publish, name, damage):
    small = publish(name)
    for file, whole in list(small.files.items())[::2]:
        other = DAMAGES[damage](whole)
        small.lay(small.files | {file: other})
        hashes = f"({len(other):,} bytes, md5 {md5(other)[:12]}, not {md5(whole)[:12]})"
        refused(small.load, str(small.path(file)), hashes, "delete it", f"`dgal-bench data {name}`")
        refused(lambda: datasets.describe_files(name, small.root), hashes)
        assert small.path(file).read_bytes() == other


def test_what_older_torchvisions_left_is_not_taken_for_the_published_images(publish):
    """torchvision prefers processed/*.pt to the files, all of which are as published."""
    small = publish("mnist")
    small.lay(small.files)
    (small.root / "MNIST" / "processed").mkdir()
    for file in ("training.pt", "test.pt"):
        content = torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
        torch.save(content, small.root / "MNIST" / "processed" / file)
    words = ["decoded content sha256 ", f"not {small.source.sha256[:12]}", f"delete {small.root.resolve() / 'MNIST'} "]
    refused(small.load, *words)


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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("key", "value"), [("path", "my/images"), ("image_size", 64)])
def test_settings_of_users_own_images_are_refused(tmp_path, name, key, value):
    with pytest.raises(ConfigError, match=rf"dataset.{key}={value}: {name} is "):
        load(name, tmp_path, **{key: value})


# --- what goes wrong while it is fetched ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_an_archive_of_other_content_is_named_and_left_alone(publish, server, name):
    small = publish(name)
    archive, raw = list(small.archives.items())[-1]
    small.lay(small.archives | {archive: raw[: len(raw) // 2]})
    if name == "svhn":
        small.path(next(iter(small.files))).unlink()
    hashes = f"md5 {md5(raw[: len(raw) // 2])[:12]}, not {md5(raw)[:12]}"
    refused(small.fetch, str(small.path(archive)), hashes, "delete it")
    assert small.path(archive).read_bytes() == raw[: len(raw) // 2]
    assert small.there() <= {*small.archives}
    assert server.asked == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_mirror_that_serves_something_else_is_not_believed(publish, server, name):
    small = publish(name)
    served = next(path for path in server.folder.iterdir() if path.is_file())
    served.write_bytes(b"<html>log in first</html>")
    refused(small.fetch, f"'{name}' is not there at", "and cannot be fetched (", "corrupted", "DGAL_DATA")
    assert small.there() == set()


@pytest.mark.parametrize("name", FORMATS)
def test_no_network_is_one_line_that_says_what_to_put_where(publish, server, monkeypatch, name):
    small = publish(name)
    for key, value in tables(small.source, small.files, small.archives, "http://127.0.0.1:9/").items():
        monkeypatch.setattr(getattr(torchvision.datasets, small.source.publisher), key, value)  # refused at once
    text = refused(small.fetch, f"'{name}' is not there at", "cannot be fetched (", "Connection refused", "DGAL_DATA")
    assert text.count("put ") == 1
    assert server.asked == []


def test_a_file_that_is_there_is_never_replaced(publish):
    small = publish("mnist")
    other = b"the user's"
    small.lay({"train-labels-idx1-ubyte": other})
    small.fetch()
    assert small.path("train-labels-idx1-ubyte").read_bytes() == other
    assert small.there() == {*small.files}
    refused(small.load, "train-labels-idx1-ubyte of data set 'mnist' is not the published file")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_what_a_kill_left_is_no_file(publish, name):
    """Killed while downloading or unpacking: the next try starts over, and cleans up."""
    small = publish(name)
    part = small.source.at(small.root / f".{name}.part")
    part.mkdir(parents=True)
    for file, raw in (small.files | small.archives).items():
        (part / file).parent.mkdir(exist_ok=True)
        (part / file).write_bytes(raw[:10])
    small.fetch()
    assert small.is_read_as(small.load())
    assert small.there() == {*small.files}


def test_one_at_a_time(publish, server, caplog):
    """A second one waits for the lock, then finds everything there and asks nobody."""
    small = publish("mnist")
    small.root.mkdir()
    waiting = threading.Thread(target=small.fetch)
    with lock(small.root / ".mnist"):
        waiting.start()
        waiting.join(0.7)
        assert waiting.is_alive()
        small.lay(small.files)  # what the holder does meanwhile
    waiting.join(10)
    assert not waiting.is_alive()
    assert "waiting: process " in caplog.text
    assert (server.asked, small.progress) == ([], [])
    assert small.is_read_as(small.load())


def test_a_folder_that_cannot_be_made_is_said(publish):
    small = publish("mnist")
    small.root.write_text("a file where a folder should be")
    refused(small.fetch, "'mnist' is not there at", "and cannot be put there (", "exists", "run `dgal-bench data")


def test_offline_makes_nothing_where_nothing_is(publish):
    small = publish("mnist")
    refused(lambda: small.fetch(offline=True), "offline=true")
    assert not small.root.exists()


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_fetches_and_says_where(publish, capsys):
    small = publish("mnist")
    assert main(["data", "mnist", f"data={small.root}", "offline=true"]) == 3
    assert "dgal-bench: data set 'mnist' is not there at" in capsys.readouterr().err
    assert main(["data", "mnist", f"data={small.root}", "offline=false"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("mnist           4 files, 0.1 MB, as published, at ")
    assert "[set-up] mnist: fetching train-images-idx3-ubyte.gz, " in err
    assert main(["data", f"data={small.root}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(DATASETS)
    assert lines[0].endswith("ships inside scikit-learn")
    assert "4 of 4 files are not there, at " in lines[2]


def test_the_verb_refuses_what_it_does_not_know(capsys):
    assert main(["data", "mnits"]) == 2
    assert "unknown data set 'mnits'; did you mean 'mnist'?" in capsys.readouterr().err
    assert main(["data", "mnist", "seed=3"]) == 2
    assert "seed= means nothing here: the keys of this verb are data, offline" in capsys.readouterr().err
    assert main(["data", "offline=perhaps"]) == 2
    assert "offline=perhaps: use true or false" in capsys.readouterr().err
