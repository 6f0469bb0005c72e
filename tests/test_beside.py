"""What else runs: cells are counted by locks that death releases, processor time by hand-written readings."""

import fcntl
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dgal_bench import beside
from dgal_bench.beside import Beside, Moment, busy_elsewhere, busy_seconds, cells_at_work, counted

HOLD = """
import sys
from pathlib import Path
from dgal_bench.beside import counted
with counted(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another(tmp_path):
    """Start cells in processes of their own; whoever is left is killed."""
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "in\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_cells_of_all_processes_are_counted_and_a_killed_one_is_forgotten(tmp_path, another):
    assert cells_at_work(tmp_path) == 1  # whoever asks is one
    killed, ended = another(), another()
    assert cells_at_work(tmp_path) == 2
    with counted(tmp_path):
        assert cells_at_work(tmp_path) == 3
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.iterdir())) == 3  # death has left its file
        assert cells_at_work(tmp_path) == 2
        assert len(list(tmp_path.iterdir())) == 2  # and whoever noticed has removed it
        ended.communicate("")
        assert cells_at_work(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_cells_of_one_process_are_counted_too(tmp_path):
    with counted(tmp_path), counted(tmp_path):
        assert cells_at_work(tmp_path) == 2


def test_a_cell_whose_file_was_taken_for_a_dead_ones_enters_again(tmp_path, monkeypatch):
    """Between making the file and locking it, somebody counts: nothing holds the lock yet, so the file is removed."""
    removed = []

    def flock(file, how, flock=fcntl.flock):
        if how & fcntl.LOCK_EX and not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with counted(tmp_path):
        (file,) = tmp_path.iterdir()
        assert file != removed[0]
        assert beside._held(file)


def test_counting_while_cells_come_and_go_loses_none(tmp_path):
    def come_and_go(_):
        for _ in range(40):
            with counted(tmp_path):
                assert any(beside._held(path) for path in tmp_path.glob(f"{os.getpid()}-*.cell"))

    with counted(tmp_path), ThreadPoolExecutor(4) as pool:
        coming = pool.map(come_and_go, range(3))
        counts = [cells_at_work(tmp_path) for _ in range(200)]
        list(coming)
        assert max(counts) <= 4
        assert cells_at_work(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_had_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    with counted(tmp_path / "file"):
        assert cells_at_work(tmp_path / "file") == 1


def test_what_is_planted_in_the_shared_folder_is_no_cell(tmp_path):
    """A pipe would block whoever opens it, a link leads elsewhere, a folder is none."""
    os.mkfifo(tmp_path / "pipe.cell")
    (tmp_path / "link.cell").symlink_to("/etc/hostname")
    (tmp_path / "folder.cell").mkdir()
    assert cells_at_work(tmp_path) == 1


def test_the_folder_is_everybodys_and_files_can_be_tried_by_all(tmp_path):
    before = os.umask(0o077)
    try:
        with counted(tmp_path / "cells"):
            (file,) = (tmp_path / "cells").iterdir()
            assert file.stat().st_mode & 0o777 == 0o644
            assert (tmp_path / "cells").stat().st_mode & 0o7777 == 0o1777
    finally:
        os.umask(before)


STAT = "cpu  300 20 70 5000 40 5 6 9 100 1\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 1\n"


def test_busy_time_by_hand():
    """300 + 20 + 70 + 5 + 6 + 9 of a hundredth; idle, iowait and guests (in user already) are left out."""
    assert busy_seconds(STAT, 100) == pytest.approx(4.10)


def test_busy_elsewhere_by_hand():
    before, after = Moment(10.0, 400.0, 5.0), Moment(14.0, 407.0, 8.0)
    assert busy_elsewhere(before, after) == pytest.approx(1.0)  # 7 - 3 CPU seconds in 4
    assert busy_elsewhere(before, Moment(14.0, 402.0, 9.0)) == 0.0  # clocks of different grain
    assert busy_elsewhere(None, after) is None
    assert busy_elsewhere(before, before) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_a_busy_neighbour_is_seen_and_own_work_is_not():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            time.sleep(0.1)
            watched = Beside()
            time.sleep(0.4)
            seen = watched.facts()["busy_elsewhere"]
        finally:
            neighbour.kill()
    before = beside.moment()
    while time.perf_counter() < before.wall + 0.2:
        pass
    after = beside.moment()
    assert seen > 0.3  # of one core; tests of others may run on it too
    assert after.own - before.own > 0.05


def test_the_most_cells_seen_at_any_look_are_told(monkeypatch):
    counts = iter([1, 3, 2, 1])
    monkeypatch.setattr(beside, "cells_at_work", lambda: next(counts))
    watched = Beside(start=None)
    watched.look()
    watched.look()
    facts = watched.facts()
    assert (facts["jobs"], facts["busy_elsewhere"]) == (3, None)
    assert facts["load"] >= 0
