"""Locks: one holder at a time whoever contends, freed by death, named to whoever asks; a disk without any is said."""

import errno
import fcntl
import multiprocessing
import multiprocessing.pool
import os
import stat
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from dgal_bench.core.files import LockHeldError, lock, lock_holder, lock_path
from dgal_bench.results.writer import FileWriter
from tests.test_rows import HEADER

HOLD = """
import pathlib, sys
from dgal_bench.core.files import lock
with lock(pathlib.Path(sys.argv[1])):
    print("in", flush=True)
    input()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "seed-0.jsonl"


@pytest.fixture
def other(path):
    """Another process, which holds the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        yield process
        process.kill()


def test_a_lock_names_its_holder_and_leaves_nothing(path):
    with lock(path):
        assert lock_holder(path) == f"process {os.getpid()} of {os.uname().nodename}"
    assert lock_holder(path) is None
    with pytest.raises(ZeroDivisionError), lock(path):
        raise ZeroDivisionError
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("attempt", [lock, FileWriter])
def test_another_process_is_named_and_nothing_is_written(path, other, attempt):
    with pytest.raises(LockHeldError) as refused, attempt(path):
        pass
    assert str(refused.value) == f"{path} is being written by {lock_holder(path)}: let it finish"
    assert lock_holder(path).startswith(f"process {other.pid} of ")
    assert os.listdir(path.parent) == [lock_path(path).name]


def test_death_frees_a_lock_at_once(path, other):
    other.kill()
    other.wait()
    assert lock_path(path).exists()  # the file, but not the lock
    assert lock_holder(path) is None
    with lock(path):
        assert lock_holder(path).startswith(f"process {os.getpid()} of ")
    assert os.listdir(path.parent) == []


def test_one_who_waits_says_for_whom(path, other, caplog):
    holder = lock_holder(path)
    began = time.monotonic()
    with multiprocessing.pool.ThreadPool(1) as pool:
        pool.apply_async(lambda: (time.sleep(0.8), other.communicate(b"\n")))
        with lock(path, wait=True):
            assert time.monotonic() - began > 0.5
    assert [record.message for record in caplog.records] == [f"waiting: {holder} makes seed-0.jsonl"]


def test_a_file_system_without_locks_is_one_warning(path, monkeypatch, caplog):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with FileWriter(path) as writer:
        writer.write_header(HEADER)
    assert [record.message for record in caplog.records] == [
        f"{path.parent} is on a file system without locks: run one command at a time"
    ]
    assert os.listdir(path.parent) == [path.name]


def test_a_reader_needs_no_right_to_write_and_no_lock(path, other):
    """Other users read the holder's name, whatever its umask."""
    assert stat.S_IMODE(lock_path(path).stat().st_mode) == 0o644
    for _ in range(50):
        assert lock_holder(path).startswith(f"process {other.pid}")


def contend(path, barrier, rounds, results):
    """Work alone for many turns; count who else was inside."""
    inside, doubled = path.with_name("inside"), 0
    barrier.wait()
    for _ in range(rounds):
        with lock(path, wait=True):
            try:
                inside.touch(exist_ok=False)
                inside.unlink()
            except FileExistsError:
                doubled += 1
    results.put(doubled)


def test_of_many_processes_one_is_inside_at_a_time(path):
    """The file of a lock is removed with each release: no contender may take the removed one for the new one."""
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(4), fork.Queue()
    processes = [fork.Process(target=contend, args=(path, barrier, 40, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [0, 0, 0, 0]
    for process in processes:
        process.join()
    assert os.listdir(path.parent) == []


def begin(path, barriers, results):
    for barrier in barriers:
        barrier.wait()
        with ExitStack() as held:
            try:
                held.enter_context(FileWriter(path)).write_header(HEADER)
                results.put(1)
                barrier.wait()
            except LockHeldError:
                results.put(0)
                barrier.wait()


def test_of_processes_that_begin_a_run_one_does(path):
    fork = multiprocessing.get_context("fork")
    barriers, results = [fork.Barrier(3) for _ in range(4)], fork.Queue()
    processes = [fork.Process(target=begin, args=(path, barriers, results)) for _ in range(3)]
    for process in processes:
        process.start()
    won = sum(results.get(timeout=60) for _ in range(3 * 4))
    for process in processes:
        process.join()
    assert won == 4
    assert os.listdir(path.parent) == [path.name]
