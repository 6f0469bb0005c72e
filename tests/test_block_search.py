"""A search in blocks: the bits of the search in memory, whoever answers, and however often it is killed."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.machine import return_free_memory
from dgal_bench.conformance import example_config
from dgal_bench.core import cache
from dgal_bench.core.errors import CacheError, ConfigError
from dgal_bench.core.system import on_threads
from dgal_bench.engines import progress
from dgal_bench.graph import block_search as module
from dgal_bench.graph import knn as knn_module
from dgal_bench.graph.block_search import cut_blocks, search_block, search_in_blocks
from dgal_bench.graph.ivf import InvertedLists
from dgal_bench.graph.knn import knn

K = 6


def quiet(what, done, of):
    pass


def points(size=3000, width=5, seed=0):
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(size, width)) + 4 * rng.normal(size=(20, width))[rng.integers(20, size=size)]
    found[: size // 50] = found[0]  # duplicates
    return torch.from_numpy(found).float()


@pytest.fixture(scope="module")
def features():
    return points()


@pytest.fixture(scope="module")
def truth(features):
    """In memory, all lists at once."""
    found = knn(features, K, exact_limit=0, recall_target=0.9)
    assert found.method.startswith("lists ")
    return found


def same(found, truth):
    equal = torch.equal(found.ids, truth.ids) and torch.equal(found.distances, truth.distances)
    return equal and (found.method, found.recall) == (truth.method, truth.recall)


class Counting:
    """Answers blocks, and stops after so many."""

    def __init__(self, most=None):
        self.most, self.asked = most, []

    def __call__(self, plan, features, block, k):
        if len(self.asked) == self.most:
            raise KeyboardInterrupt
        self.asked.append(block)
        return search_block(plan, features, block, k)


def count(monkeypatch, most=None):
    counting = Counting(most)
    monkeypatch.setattr(module, "search_block", counting)
    return counting


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("fewest", "size"), [(1, 2**40), (1, 20_000), (3, 2**40), (10_000, 2**40)])
def test_blocks_are_the_search_in_memory(tmp_path, monkeypatch, features, truth, threads, fewest, size):
    monkeypatch.setattr(module, "_FEWEST", fewest)
    monkeypatch.setattr(module, "_BLOCK_BYTES", size)
    monkeypatch.setattr(module, "_ROW_FLOATS", 700)
    told = []
    with on_threads(threads):
        found, facts = search_in_blocks(features, K, 0.9, tmp_path, lambda *how: told.append(how))
    assert same(found, truth)
    assert facts["blocks"] >= min(fewest, facts["lists"] // 2)
    assert told == [("neighbours", n, facts["blocks"]) for n in range(facts["blocks"] + 1)]


@pytest.mark.parametrize("n_blocks", [1, 2, 7, 40, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_cuts_cover_every_list_once_and_bound_every_block(monkeypatch, n_blocks, seed):
    monkeypatch.setattr(module, "_FEWEST", 1)
    rng = np.random.default_rng(seed)
    sizes = torch.from_numpy(rng.integers(0, 60, size=50) ** 2)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    probed = torch.from_numpy(rng.integers(0, 50, size=(50, 4)))
    found = cut_blocks(
        InvertedLists(torch.arange(int(offsets[-1])), offsets, probed, torch.zeros(50, 1), 1.0), n_blocks
    )
    assert [number for first, last in found for number in range(first, last)] == list(range(50))
    assert len(found) <= n_blocks
    for first, last in found:
        assert int(sizes[first:last].sum()) <= 2 * int(offsets[-1]) / n_blocks + int(sizes[first:last].max())


def test_a_search_that_was_stopped_goes_on_from_its_last_block(tmp_path, monkeypatch, features, truth):
    first = count(monkeypatch, most=5)
    with pytest.raises(KeyboardInterrupt):
        search_in_blocks(features, K, 0.9, tmp_path, quiet)
    second, told = count(monkeypatch), []
    found, facts = search_in_blocks(features, K, 0.9, tmp_path, lambda *how: told.append(how))
    assert same(found, truth)
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) + len(second.asked) == facts["blocks"]
    assert told[0] == ("neighbours", 5, facts["blocks"])


def test_time_left_is_reckoned_from_what_this_try_has_done(monkeypatch):
    now, out = [0.0], StringIO()
    monkeypatch.setattr(progress, "perf_counter", lambda: now[0])
    lines = progress.LineProgress({}, out)
    for seconds, done in ((0, 50), (10, 55), (20, 60), (60, 80), (100, 100)):
        now[0] = seconds
        lines.setting_up("set", "neighbours", done, 100)
    assert out.getvalue().splitlines() == [
        "[set-up] set: neighbours 50/100",
        "[set-up] set: neighbours 60/100, about 1:20 left",
        "[set-up] set: neighbours 80/100, about 40 s left",
        "[set-up] set: neighbours 100/100",
    ]


def test_the_lists_are_planned_once(tmp_path, monkeypatch, features, truth):
    count(monkeypatch, most=1)
    with pytest.raises(KeyboardInterrupt):
        search_in_blocks(features, K, 0.9, tmp_path, quiet)
    count(monkeypatch)
    monkeypatch.setattr(module, "plan_lists", None)
    assert same(search_in_blocks(features, K, 0.9, tmp_path, quiet)[0], truth)


def die_at_the_fourth_block(folder):
    def killed(what, done, of):
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    search_in_blocks(points(), K, 0.9, folder, killed)


@pytest.mark.slow
def test_a_killed_process_costs_no_block_and_no_bit(tmp_path, monkeypatch, features, truth):
    process = multiprocessing.get_context("fork").Process(target=die_at_the_fourth_block, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    again = count(monkeypatch)
    found, facts = search_in_blocks(features, K, 0.9, tmp_path, quiet)
    assert same(found, truth)
    assert len(again.asked) == facts["blocks"] - 3


@pytest.mark.parametrize("name", ["ids.npy", "distances.npy", "manifest.json"])
def test_a_damaged_block_is_made_again(tmp_path, monkeypatch, features, truth, name):
    search_in_blocks(features, K, 0.9, tmp_path, quiet)
    some = sorted(path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith("lists"))[3:5]
    for folder in some:
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (folder / name).write_bytes(raw)
    again = count(monkeypatch)
    assert same(search_in_blocks(features, K, 0.9, tmp_path, quiet)[0], truth)
    assert len(again.asked) == 2
    assert all(cache._damaged(folder) is None for folder in some)


@pytest.mark.parametrize("fewest", [1, 16, 60])
def test_where_lists_save_little_all_points_are_compared_in_blocks(tmp_path, monkeypatch, fewest):
    monkeypatch.setattr(module, "_FEWEST", fewest)
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 40))).float()  # no list is far from another
    points[200:206] = points[0]
    truth = knn(points, K, exact_limit=0)
    assert truth.method == "tiles"
    found, facts = search_in_blocks(points, K, 0.99, tmp_path, quiet)
    assert torch.equal(found.ids, truth.ids)
    assert torch.equal(found.distances, truth.distances)
    assert (found.method, found.recall) == (f"lists {fewest}/{fewest}", 1.0)
    assert fewest - 1 <= facts["blocks"] <= fewest


def test_a_large_search_plans_once(tmp_path, monkeypatch):
    """Where lists save little, too: the plan and the pass that it takes are not made a second time."""
    made, plan = [], module.plan_lists
    monkeypatch.setattr(module, "plan_lists", lambda *how: made.append(how) or plan(*how))
    monkeypatch.setattr(module, "knn", None)
    spec = replace(example_config("random").graph, graph_k=K, exact_limit=100)
    for n, some in enumerate([points(), torch.from_numpy(np.random.default_rng(0).normal(size=(300, 40))).float()]):
        module.find_neighbors(some, spec, torch.device("cpu"), tmp_path / str(n), quiet)
    assert len(made) == 2


def test_another_search_in_the_same_folder_makes_its_own_lists(tmp_path, features):
    for k, target in ((K, 0.9), (K + 1, 0.9), (K, 0.999)):
        found, facts = search_in_blocks(features, k, target, tmp_path, quiet)
        assert same(found, knn(features, k, exact_limit=0, recall_target=target))
    assert facts["probes"] > search_in_blocks(features, K, 0.9, tmp_path, quiet)[1]["probes"]


def test_features_that_are_no_numbers_are_refused_with_their_count(tmp_path):
    broken = points()
    broken[[3, 700]] = torch.nan
    with pytest.raises(ConfigError, match=r"^2 of 3000 feature rows hold NaN"):
        search_in_blocks(broken, K, 0.9, tmp_path, quiet)


def test_a_full_disk_is_one_line_with_the_knob(tmp_path, monkeypatch, features):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(CacheError, match=r"^the cache at .* cannot be used: .*No space left.*; set cache=DIR or DGAL_"):
        search_in_blocks(features, K, 0.9, tmp_path, quiet)


def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) * 1024


def search_and_watch(folder, found):
    """In a process of its own: the bytes that it has more at any time than before."""

    def plan(features, *_):
        order = (torch.arange(len(features)) % 500).argsort(stable=True)
        offsets = torch.arange(501) * (len(features) // 500)
        return InvertedLists(order, offsets, torch.arange(500)[:, None], torch.zeros(500, features.shape[1]), 1.0)

    def watch():
        while True:
            seen.append(anonymous())
            time.sleep(0.01)

    module.plan_lists, module._ROW_FLOATS = plan, 2**20
    knn_module._BLOCK, knn_module._RECALL_SAMPLE = 2**20, 20
    features = torch.from_numpy(np.load(folder / "features.npy", mmap_mode="c"))
    search_in_blocks(features[:20_000], 2, 1.0, folder / "a", quiet)  # what is loaded on the way
    return_free_memory()
    seen = [before := anonymous()]
    threading.Thread(target=watch, daemon=True).start()
    search_in_blocks(features, 2, 1.0, folder / "b", quiet)
    found.put(max(seen) - before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what memory is a process's own")
def test_mapped_features_are_never_copied_as_a_whole(tmp_path):
    whole = np.lib.format.open_memmap(tmp_path / "features.npy", "w+", "float32", (240_000, 128))
    for start in range(0, len(whole), 10_000):
        whole[start : start + 10_000] = np.random.default_rng(start).random((10_000, 128), dtype=np.float32)
    whole.flush()
    fork = multiprocessing.get_context("fork")
    found = fork.Queue()
    process = fork.Process(target=search_and_watch, args=(tmp_path, found))
    process.start()
    more = found.get(timeout=240)
    process.join()
    assert 0 < more < 0.9 * whole.nbytes, (more, whole.nbytes)
