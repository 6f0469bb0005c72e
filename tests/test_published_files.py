"""The files of data sets: what a load refuses, and the one step that fetches. Downloads come from this machine only."""

import fcntl
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torchvision

from dgal_bench.cli.main import main
from dgal_bench.core.errors import DataError
from dgal_bench.data import datasets
from dgal_bench.data.datasets import DATASETS, Dataset
from dgal_bench.data.torchvision import (
    MNIST,
    Address,
    Archive,
    File,
    Source,
    check_files,
    each_gz,
    from_mirrors,
    manifest_name,
    missing_files,
    prepare_files,
    unpack_tar,
)
from tests.loading import load

CONTENT = {"images": b"pixels" * 500_000, "labels": b"0123456789"}


def source_of(content, torchvision_class="Toy", name="toy", folder="TOY/raw"):
    files = {file: File(len(raw), f"sha256:{hashlib.sha256(raw).hexdigest()}") for file, raw in content.items()}
    return Source(name, folder, torchvision_class, files, each_gz(files), from_mirrors, (0, 0))


TOY = source_of(CONTENT)
MANIFEST = manifest_name(TOY)
LOCK = ".toy.lock"


class Heard:
    """What a server was asked for, and what progress was told."""

    def __init__(self):
        self.paths, self.progress = [], []

    def told(self, what, done, of):
        self.progress.append((what, done, of))


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def server(tmp_path, heard):
    """A mirror on this machine that serves a folder; its address and the folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            heard.paths.append(self.path)

    folder = tmp_path / "mirror"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as http_server:
        threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{http_server.server_port}/", folder=folder)
        http_server.shutdown()


NOWHERE = "http://127.0.0.1:9/"  # the discard port: refused at once


@pytest.fixture
def published(server, monkeypatch):
    """Publish files on the mirror as torchvision names them: archives, their md5, and where they are."""

    def publish(content, torchvision_class="Toy", mirrors=None, level=6):
        resources = []
        for name, raw in content.items():
            packed = gzip.compress(raw, level, mtime=0)
            (server.folder / f"{name}.gz").write_bytes(packed)
            resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
        known = SimpleNamespace(mirrors=mirrors or [server.url], resources=resources)
        original = getattr(torchvision.datasets, torchvision_class, None)
        for name in ("mirrors", "resources"):
            if original is not None:
                monkeypatch.setattr(original, name, getattr(known, name))
        if original is None:
            monkeypatch.setattr(torchvision.datasets, torchvision_class, known, raising=False)

    return publish


def lay_out(root, content=CONTENT, packed=False):
    where = TOY.at(root)
    where.mkdir(parents=True, exist_ok=True)
    for name, raw in content.items():
        (where / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(raw) if packed else raw)
    return where


def test_what_is_missing_is_downloaded_unpacked_checked_and_written_down(tmp_path, published, heard, server):
    published(CONTENT)
    prepare_files(TOY, tmp_path, heard.told)
    where = TOY.at(tmp_path)
    assert {name: (where / name).read_bytes() for name in CONTENT} == CONTENT
    check_files(TOY, tmp_path)
    manifest = json.loads((where / MANIFEST).read_text())
    assert manifest["files"]["images"]["digest"] == TOY.files["images"].digest
    assert manifest["files"]["images"]["from"] == f"{server.url}images.gz"
    assert {path.name for path in where.iterdir()} == {"images", "labels", MANIFEST, LOCK}  # no archive, no part
    whats = {what for what, _, _ in heard.progress}
    assert whats == {"downloading images.gz (MB)", "downloading labels.gz (MB)"}
    asked = len(heard.paths)
    prepare_files(TOY, tmp_path, heard.told)  # again: nothing to fetch
    assert len(heard.paths) == asked == 2


def test_progress_counts_megabytes(tmp_path, published, heard):
    big = {"images": os.urandom(5_200_000)}
    published(big)
    prepare_files(source_of(big), tmp_path, heard.told)
    done = [done for _, done, _ in heard.progress]
    assert done == sorted(done)
    assert done[-1] == 5
    assert {of for _, _, of in heard.progress} == {5}


def test_the_next_mirror_is_tried(tmp_path, published, server, heard):
    published(CONTENT, mirrors=[NOWHERE, server.url])
    prepare_files(TOY, tmp_path, heard.told)
    check_files(TOY, tmp_path)


def test_a_mirror_that_serves_something_else_is_not_believed(tmp_path, published, server, heard):
    published(CONTENT)
    (server.folder / "labels.gz").write_bytes(gzip.compress(b"a page that asks for a login"))
    with pytest.raises(DataError, match="cannot be downloaded") as caught:
        prepare_files(TOY, tmp_path, heard.told)
    assert missing_files(TOY, TOY.at(tmp_path)) == ["labels"]
    assert "\n" not in str(caught.value)


def test_no_network_is_one_line_that_says_what_to_put_where(tmp_path, published, heard):
    published(CONTENT, mirrors=[NOWHERE])
    with pytest.raises(DataError) as caught:
        prepare_files(TOY, tmp_path, heard.told)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert f"not there at {TOY.at(tmp_path)} and cannot be downloaded ({NOWHERE}images.gz: no connection)" in text
    assert "put images, labels (or their .gz) there" in text
    assert "DGAL_DATA" in text
    assert "\n" not in text


def test_offline_asks_nobody(tmp_path, published, heard):
    published(CONTENT)
    with pytest.raises(DataError, match="offline=true forbids to download it"):
        prepare_files(TOY, tmp_path, heard.told, offline=True)
    assert heard.paths == []


def test_archives_that_lie_there_are_unpacked_without_a_network(tmp_path, heard):
    where = lay_out(tmp_path, packed=True)
    prepare_files(TOY, tmp_path, heard.told, offline=True)
    check_files(TOY, tmp_path)
    assert (where / "images.gz").exists()  # the user's: left alone
    assert json.loads((where / MANIFEST).read_text())["files"]["labels"]["from"] == "labels.gz"


def test_an_archive_cut_short_is_named_and_leaves_nothing_half(tmp_path, heard):
    where = lay_out(tmp_path, packed=True)
    whole = (where / "images.gz").read_bytes()
    (where / "images.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"images.gz cannot be unpacked .*: delete it and try again"):
        prepare_files(TOY, tmp_path, heard.told, offline=True)
    assert {path.name for path in where.iterdir()} == {"images.gz", "labels.gz", LOCK}


def test_an_archive_of_another_file_is_named_and_not_taken_for_it(tmp_path, heard):
    where = lay_out(tmp_path, packed=True)
    (where / "images.gz").write_bytes(gzip.compress(b"shirts" * 500_000))
    with pytest.raises(
        DataError, match=r"images.gz holds another file: unpacked, images is not the published one"
    ) as caught:
        prepare_files(TOY, tmp_path, heard.told, offline=True)
    assert "delete it and try again" in str(caught.value)
    assert not (where / "images").exists()


def tar_of(content):
    """A .tar.gz as they are published: folders inside, and more than is wanted."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        folder = tarfile.TarInfo("toy")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, raw in {"toy/readme.html": b"<html>", **content}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return packed.getvalue()


TARRED = {f"toy/{name}": raw for name, raw in CONTENT.items()}
"""The same files a folder deeper, out of one archive beside that folder."""
TAR = replace(
    source_of(TARRED, folder="."), archives=(Archive("toy.tar.gz", {name: name for name in TARRED}, unpack_tar),)
)


def test_one_archive_of_many_files_is_read_once_and_only_what_is_missing_is_taken(tmp_path, heard):
    (tmp_path / "toy.tar.gz").write_bytes(tar_of(TARRED))
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "labels").write_bytes(TARRED["toy/labels"])
    before = (tmp_path / "toy" / "labels").stat()
    prepare_files(TAR, tmp_path, heard.told, offline=True)
    check_files(TAR, tmp_path)
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {"images", "labels"}  # no readme.html
    assert (tmp_path / "toy" / "labels").stat().st_ino == before.st_ino
    files = json.loads((tmp_path / manifest_name(TAR)).read_text())["files"]
    assert {name: file["from"] for name, file in files.items()} == {
        "toy/images": "toy.tar.gz",
        "toy/labels": "found there",
    }


def test_an_archive_that_lacks_a_file_is_named(tmp_path, heard):
    (tmp_path / "toy.tar.gz").write_bytes(tar_of({"toy/images": CONTENT["images"]}))
    with pytest.raises(DataError, match=r"toy.tar.gz has no toy/labels inside: delete it and try again"):
        prepare_files(TAR, tmp_path, heard.told, offline=True)


def test_names_inside_an_archive_lead_nowhere(tmp_path, heard):
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    (root / "toy.tar.gz").write_bytes(tar_of({"../../escaped": b"x", str(tmp_path / "escaped"): b"x", **TARRED}))
    prepare_files(TAR, root, heard.told, offline=True)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "images", "labels", "toy.tar.gz", LOCK, manifest_name(TAR),
    }  # fmt: skip


def test_what_is_published_unpacked_is_put_in_its_place(tmp_path, published, heard, server):
    """No archive to lay beside: the file itself is asked for, and nothing else is named."""
    published(CONTENT)
    md5s = {name: hashlib.md5(raw).hexdigest() for name, raw in CONTENT.items()}
    for name, raw in CONTENT.items():
        (server.folder / name).write_bytes(raw)
    plain = replace(
        TOY,
        archives=tuple(Archive(name, {name: name}, None) for name in CONTENT),
        addresses=lambda publisher: {n: Address(md5, (f"{server.url}{n}",)) for n, md5 in md5s.items()},
    )
    with pytest.raises(DataError, match=r"put images, labels there, or set DGAL_DATA"):
        prepare_files(plain, tmp_path, heard.told, offline=True)
    prepare_files(plain, tmp_path, heard.told)
    check_files(plain, tmp_path)
    assert {path.name for path in TOY.at(tmp_path).iterdir()} == {"images", "labels", MANIFEST, LOCK}


def test_offline_makes_nothing_where_nothing_is(tmp_path, heard):
    with pytest.raises(DataError, match="offline=true"):
        prepare_files(TOY, tmp_path, heard.told, offline=True)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_the_archives_fault(tmp_path, heard, monkeypatch):
    where = lay_out(tmp_path, packed=True)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dgal_bench.data.torchvision.os.fsync", full)
    with pytest.raises(DataError, match=r"cannot be put there \(No space left on device\)"):
        prepare_files(TOY, tmp_path, heard.told, offline=True)
    assert {path.name for path in where.iterdir()} == {"images.gz", "labels.gz", LOCK}


def test_the_manifest_of_a_second_try_remembers_the_first(tmp_path, published, server, heard):
    published(CONTENT)
    whole = (server.folder / "labels.gz").read_bytes()
    (server.folder / "labels.gz").unlink()
    with pytest.raises(DataError, match="404"):
        prepare_files(TOY, tmp_path, heard.told)
    (server.folder / "labels.gz").write_bytes(whole)
    prepare_files(TOY, tmp_path, heard.told)
    files = json.loads((TOY.at(tmp_path) / MANIFEST).read_text())["files"]
    assert {name: file["from"] for name, file in files.items()} == {
        "images": f"{server.url}images.gz",
        "labels": f"{server.url}labels.gz",
    }


def test_a_part_that_a_kill_left_is_no_file(tmp_path, published, heard):
    """Killed while unpacking or downloading: only whole files have their names, and the next try starts over."""
    published(CONTENT)
    where = lay_out(tmp_path, {"labels": CONTENT["labels"]})
    (where / "images.part").write_bytes(b"pix")
    prepare_files(TOY, tmp_path, heard.told)
    check_files(TOY, tmp_path)
    assert not (where / "images.part").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw[:1000], r"images of data set 'toy' has 1,000 bytes where 3,000,000 are published: delete it"),
        (
            lambda raw: b"X" + raw[1:],
            r"images of data set 'toy' is not the published one \(3,000,000 bytes, sha256 \w{12}, not \w{12}\)",
        ),
        (lambda raw: b"", r"has 0 bytes where 3,000,000"),
    ],
    ids=["truncated", "one byte changed", "empty"],
)
def test_a_damaged_file_is_refused_and_never_replaced(tmp_path, published, heard, damage, said):
    published(CONTENT)
    where = lay_out(tmp_path)
    (where / "images").write_bytes(damage(CONTENT["images"]))
    for step in (lambda: check_files(TOY, tmp_path), lambda: prepare_files(TOY, tmp_path, heard.told)):
        with pytest.raises(DataError, match=said) as caught:
            step()
        assert caught.value.exit_code == 3
    assert (where / "images").read_bytes() == damage(CONTENT["images"])
    assert heard.paths == []


def test_one_at_a_time(tmp_path, published, heard):
    """A second one waits for the lock, then finds everything there and asks nobody."""
    published(CONTENT)
    where = TOY.at(tmp_path)
    where.mkdir(parents=True)
    with (where / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=prepare_files, args=(TOY, tmp_path, heard.told))
        waiting.start()
        waiting.join(0.3)
        assert heard.progress == [("waiting for another process that fetches it", 0, 1)]
        assert waiting.is_alive()
        assert heard.paths == []
        lay_out(tmp_path)  # what the holder does meanwhile
    waiting.join(10)
    assert not waiting.is_alive()
    assert heard.paths == []
    check_files(TOY, tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path, heard):
    (tmp_path / "TOY").write_text("a file where a folder should be")
    with pytest.raises(
        DataError, match=r"not there at .* and cannot be put there \(Not a directory\): run `dgal-bench data"
    ):
        prepare_files(TOY, tmp_path, heard.told)


def test_the_verb_fetches_and_says_where(tmp_path, published, monkeypatch, capsys):
    published(CONTENT)
    monkeypatch.setitem(DATASETS, "toy", Dataset(lambda root: pytest.fail("nothing is read"), TOY))
    assert main(["data", "toy", f"data={tmp_path}", "offline=true"]) == 3
    assert "dgal-bench: data set 'toy' is not there at" in capsys.readouterr().err
    assert main(["data", "toy", f"data={tmp_path}", "offline=false"]) == 0
    out, err = capsys.readouterr()
    assert out == f"toy             2 files, 3.0 MB, as published, at {TOY.at(tmp_path)}\n"
    assert "[set-up] toy: downloading images.gz (MB)" in err
    assert main(["data", f"data={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(DATASETS)
    assert lines[0].endswith("ships inside scikit-learn")
    assert "4 of 4 files are not there, at " in lines[1]


def test_the_verb_refuses_what_it_does_not_know(capsys):
    assert main(["data", "mnits"]) == 2
    assert "unknown data set 'mnits'; did you mean 'mnist'?" in capsys.readouterr().err
    assert main(["data", "mnist", "seed=3"]) == 2
    assert "seed= means nothing here: the keys of this verb are data, offline" in capsys.readouterr().err
    assert main(["data", "offline=perhaps"]) == 2
    assert "offline=perhaps: use true or false" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif("DGAL_DATA" not in os.environ, reason="needs $DGAL_DATA")
def test_the_real_mnist_by_the_whole_way(tmp_path, published, heard):
    """Its files, packed and served by this machine, arrive as the data set whose sha256 are in the registry."""
    raw = MNIST.at(Path(os.environ["DGAL_DATA"]))
    published({name: (raw / name).read_bytes() for name in MNIST.files}, "MNIST", level=1)
    datasets.fetch("mnist", tmp_path, heard.told)
    assert load("mnist", tmp_path).images.shape == (60_000, 1, 28, 28)
    cut = MNIST.at(tmp_path) / "train-images-idx3-ubyte"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="has 47,040,015 bytes where 47,040,016 are published"):
        load("mnist", tmp_path)
    cut.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match="is not the published one"):
        load("mnist", tmp_path)
    shutil.rmtree(tmp_path / "MNIST")
