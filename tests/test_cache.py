"""A cache entry is made once, whole or not at all, and never believed without its hash."""

import threading
from pathlib import Path

import numpy as np
import pytest

from dgal_bench.core import cache
from dgal_bench.core.cache import get_or_make, key_of
from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import lock


class Maker:
    def __init__(self):
        self.calls = 0

    def __call__(self, folder):
        self.calls += 1
        return {"x": np.arange(5.0), "y": np.ones((2, 2), dtype=np.int32)}, {"seconds": 1.5, "n": self.calls}


def test_made_once_then_found(tmp_path):
    make = Maker()
    first, second = (get_or_make(tmp_path, "key", make) for _ in range(2))
    assert make.calls == 1
    assert first.facts == second.facts == {"seconds": 1.5, "n": 1}
    assert second.arrays["x"].tolist() == [0, 1, 2, 3, 4]
    assert second.arrays["y"].dtype == np.int32
    assert first.sha256 == second.sha256


@pytest.mark.parametrize(
    ("name", "how"),
    [("x.npy", "flip"), ("x.npy", "cut"), ("x.npy", "remove"), ("manifest.json", "cut"), ("manifest.json", "remove")],
)
def test_a_damaged_entry_is_made_again(tmp_path, name, how, caplog):
    make = Maker()
    whole = get_or_make(tmp_path, "key", make)
    path = tmp_path / "key" / name
    raw = bytearray(path.read_bytes())
    if how == "flip":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif how == "cut":
        path.write_bytes(raw[:-20])
    else:
        path.unlink()
    again = get_or_make(tmp_path, "key", make)
    assert make.calls == 2
    assert again.sha256 == whole.sha256
    assert "damaged" in caplog.text


def test_an_interrupted_making_leaves_nothing(tmp_path):
    def fail(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_or_make(tmp_path, "key", fail)
    assert list(tmp_path.iterdir()) == []
    assert get_or_make(tmp_path, "key", Maker()).facts["n"] == 1


@pytest.mark.parametrize("way", ["absolute", "relative", "linked"])
def test_an_array_too_large_for_memory_is_written_in_place(tmp_path, monkeypatch, way):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    root = {"absolute": tmp_path / "real", "relative": Path("real"), "linked": tmp_path / "link"}[way]

    def make(folder):
        mapped = np.lib.format.open_memmap((folder / "x.npy").resolve(), mode="w+", dtype=np.uint8, shape=(50, 4))
        mapped[:] = np.arange(200).reshape(50, 4)
        return {"x": mapped, "y": np.ones(3)}, {}

    entry = get_or_make(root, "key", make)
    assert np.array_equal(entry.arrays["x"], np.arange(200).reshape(50, 4))
    assert not entry.mapped
    monkeypatch.setattr(cache, "free_memory", lambda: 300)
    again = get_or_make(root, "key", make)
    assert again.mapped
    assert isinstance(again.arrays["x"], np.memmap)
    assert again.sha256 == entry.sha256
    again.arrays["x"][0, 0] = 99  # a private copy: the file stays as it is
    assert get_or_make(root, "key", make).arrays["x"][0, 0] == 0
    assert [path.name for path in root.iterdir()] == ["key"]


def test_two_who_want_it_make_it_once(tmp_path):
    make = Maker()
    threads = [threading.Thread(target=get_or_make, args=(tmp_path, "key", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.calls == 1


def test_keys_depend_on_every_part():
    base = {"pixels": "ab", "k": 10, "kernel": "uniform"}
    assert key_of(base) == key_of(dict(reversed(base.items())))
    assert (
        len({key_of(base), key_of({**base, "k": 11}), key_of({**base, "kernel": "max"}), key_of({"pixels": "ab"})}) == 4
    )


def test_a_folder_that_cannot_be_made_names_the_knob(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="set cache=DIR or DGAL_CACHE"):
        get_or_make(tmp_path / "file" / "cache", "key", Maker())


def test_whoever_reads_an_entry_waits_for_nobody(tmp_path):
    get_or_make(tmp_path, "key", lambda folder: ({"x": np.arange(3)}, {}))
    with lock(tmp_path / "key"):
        assert get_or_make(tmp_path, "key", no_maker).arrays["x"].tolist() == [0, 1, 2]


def no_maker(folder):
    raise AssertionError
