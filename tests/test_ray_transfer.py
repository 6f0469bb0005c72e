"""Cache entries that travel: whatever arrives is what was packed, or it is refused."""

import numpy as np
import pytest

from dgal_bench.core import cache
from dgal_bench.core.errors import ResultsError
from dgal_bench.engines import ray_transfer


def made(root, key="key", size=1000):
    arrays = {"latents": np.arange(size, dtype=np.float32), "graph": np.zeros(0)}
    return cache.get_or_make(root, key, lambda folder: (arrays, {"seconds": 1.5}))


def never(folder):
    raise AssertionError("the entry is there: nothing is to be made")


@pytest.mark.parametrize("size", [1, 700, 10**6])
def test_an_entry_arrives_as_it_was_packed_in_pieces_of_any_size(tmp_path, size):
    there = made(tmp_path / "there", size=50)
    sent = list(ray_transfer.pieces(tmp_path / "there", "key", size))
    assert max(len(piece) for _, piece in sent) <= size
    assert ray_transfer.missing_entries(tmp_path / "here", ["key"]) == ["key"]
    ray_transfer.unpack(tmp_path / "here", "key", sent)
    assert ray_transfer.missing_entries(tmp_path / "here", ["key"]) == []
    here = cache.get_or_make(tmp_path / "here", "key", never)
    assert (here.sha256, here.facts) == (there.sha256, there.facts)
    assert np.array_equal(here.arrays["latents"], there.arrays["latents"])


@pytest.mark.parametrize("spoil", ["flip", "cut", "lose", "manifest"])
def test_what_was_damaged_on_its_way_is_refused_and_leaves_nothing(tmp_path, spoil):
    made(tmp_path / "there")
    sent = dict(ray_transfer.pieces(tmp_path / "there", "key"))
    array = sent["latents.npy"]
    sent |= {
        "flip": {"latents.npy": array[:-1] + bytes([array[-1] ^ 1])},
        "cut": {"latents.npy": array[:-1]},
        "lose": {"latents.npy": b""},
        "manifest": {"manifest.json": sent["manifest.json"][:-2]},
    }[spoil]
    with pytest.raises(ResultsError, match=r"cache entry key arrived damaged"):
        ray_transfer.unpack(tmp_path / "here", "key", sent.items())
    assert ray_transfer.missing_entries(tmp_path / "here", ["key"]) == ["key"]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["key.lock"]


def test_an_entry_that_is_there_is_neither_fetched_nor_touched(tmp_path):
    made(tmp_path)
    before = (tmp_path / "key" / "manifest.json").stat()
    ray_transfer.unpack(tmp_path, "key", map(never, ["a piece"]))
    assert (tmp_path / "key" / "manifest.json").stat() == before


def test_a_piece_cannot_name_a_file_outside_its_entry(tmp_path):
    with pytest.raises(ResultsError, match="arrived damaged"):
        ray_transfer.unpack(tmp_path / "here", "key", [("../../stray", b"x")])
    assert not (tmp_path / "stray").exists()


def test_keys_are_noted_whether_an_entry_is_made_or_found(tmp_path):
    with cache.record_keys() as first:
        made(tmp_path, "a")
    with cache.record_keys() as second:
        made(tmp_path, "a")
        made(tmp_path, "b")
    made(tmp_path, "c")
    assert (first, second) == ({"a"}, {"a", "b"})
