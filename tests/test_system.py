"""What else runs: runs are counted by locks that death releases, processor time by hand-written readings."""

import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dgal_bench.core import system as beside
from dgal_bench.core.system import CpuReading, LoadMonitor, busy_elsewhere, count_workers, read_cpu, register_worker


def hold(folder, parent):
    with register_worker(folder):
        parent.send("in")
        parent.recv()


def another(folder):
    """A run in a process of its own, and what ends it."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(folder, theirs), daemon=True)
    process.start()
    assert ours.recv() == "in"
    return process, ours


def test_runs_of_all_processes_are_counted_and_a_killed_one_is_forgotten(tmp_path):
    assert count_workers(tmp_path) == 1  # whoever asks is one
    (killed, _), (ended, end) = another(tmp_path), another(tmp_path)
    assert count_workers(tmp_path) == 2
    with register_worker(tmp_path):
        assert count_workers(tmp_path) == 3
        killed.kill()
        killed.join()
        assert len(list(tmp_path.iterdir())) == 3  # death has left its file
        assert count_workers(tmp_path) == 2
        assert len(list(tmp_path.iterdir())) == 2  # and whoever noticed has removed it
        end.send("")
        ended.join()
        assert count_workers(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_runs_of_one_process_are_counted_too(tmp_path):
    with register_worker(tmp_path), register_worker(tmp_path):
        assert count_workers(tmp_path) == 2


def test_counting_while_runs_come_and_go_loses_none(tmp_path):
    def come_and_go(_):
        for _ in range(40):
            with register_worker(tmp_path):
                assert count_workers(tmp_path) >= 2

    with register_worker(tmp_path), ThreadPoolExecutor(4) as pool:
        coming = pool.map(come_and_go, range(3))
        counts = [count_workers(tmp_path) for _ in range(200)]
        list(coming)
        assert max(counts) <= 4
        assert count_workers(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_had_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    with register_worker(tmp_path / "file"):
        assert count_workers(tmp_path / "file") == 1


def test_what_is_planted_in_the_shared_folder_is_no_run(tmp_path):
    """A pipe would block whoever opens it, a link leads elsewhere, a folder is none."""
    os.mkfifo(tmp_path / "pipe.lock")
    (tmp_path / "link.lock").symlink_to("/etc/hostname")
    (tmp_path / "folder.lock").mkdir()
    assert count_workers(tmp_path) == 1


def test_the_folder_is_everybodys_and_files_can_be_tried_by_all(tmp_path):
    before = os.umask(0o077)
    try:
        with register_worker(tmp_path / "cells"):
            (file,) = (tmp_path / "cells").iterdir()
            assert file.stat().st_mode & 0o777 == 0o644
            assert (tmp_path / "cells").stat().st_mode & 0o7777 == 0o1777
    finally:
        os.umask(before)


def test_busy_elsewhere_by_hand():
    before, after = CpuReading(10.0, 400.0, 5.0), CpuReading(14.0, 407.0, 8.0)
    assert busy_elsewhere(before, after) == pytest.approx(1.0)  # 7 - 3 CPU seconds in 4
    assert busy_elsewhere(before, CpuReading(14.0, 402.0, 9.0)) == 0.0  # clocks of different grain


def test_a_busy_neighbour_is_seen_and_own_work_is_not():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            time.sleep(0.1)
            watched = LoadMonitor()
            time.sleep(0.4)
            seen = watched.facts()["busy_elsewhere"]
        finally:
            neighbour.kill()
    before = read_cpu()
    start = time.process_time()
    while time.process_time() < start + 0.05:
        pass
    after = read_cpu()
    assert seen > 0.3  # of one core; tests of others may run on it too
    assert after.own - before.own >= 0.05


def test_the_most_runs_seen_at_any_look_are_told(monkeypatch):
    counts = iter([1, 3, 2, 1])
    monkeypatch.setattr(beside, "count_workers", lambda: next(counts))
    watched = LoadMonitor()
    watched.sample()
    watched.sample()
    facts = watched.facts()
    assert facts["jobs"] == 3
    assert facts["load"] >= 0
