"""Leases: one holder at a time whoever contends, death and standstill survived, nothing fresh ever taken away."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from dgal_bench.core import files as module
from dgal_bench.core.files import (
    BEAT_SECONDS,
    MISSED_BEATS,
    Lease,
    LockHeldError,
    boot_id,
    lease_holder,
    lease_path,
    live_holder,
    release_lease,
)
from dgal_bench.results.reader import read_run
from dgal_bench.results.writer import FileWriter
from tests.test_rows import HEADER, record

ROW = record(0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "seed-0.jsonl"


def forge(path, age=0.0, **facts):
    """The lease of a process of another host, whose heart last beat ``age`` seconds ago."""
    said = {"host": "far", "boot": "another", "pid": 4242, "start": 1, **facts}
    lease_path(path).mkdir()
    file = lease_path(path) / "f00d"
    file.write_text(json.dumps(said))
    grow_old(file, age)
    return file


def grow_old(file, age):
    then = time.time() - age
    os.utime(file, (then, then))


GONE = MISSED_BEATS * BEAT_SECONDS + 2


def test_a_lease_says_who_holds_it_and_goes_at_the_end(path):
    with Lease(path):
        said = lease_holder(path)
        assert (said["pid"], said["boot"]) == (os.getpid(), boot_id())
        assert live_holder(path) == said
    assert os.listdir(path.parent) == []
    assert lease_holder(path) is live_holder(path) is None


def test_a_lease_goes_after_an_exception_too(path):
    with pytest.raises(ZeroDivisionError), Lease(path):
        raise ZeroDivisionError
    assert os.listdir(path.parent) == []


def test_a_host_whose_heart_beats_is_respected_and_nothing_is_written(path):
    forge(path, age=GONE - 10)
    for attempt in (Lease, FileWriter):
        with (
            pytest.raises(LockHeldError, match=r"seed-0\.jsonl is being written by process 4242 of far: let it finish"),
            attempt(path),
        ):
            pass
    assert live_holder(path)["host"] == "far"
    assert path.read_bytes() == b""
    assert sorted(os.listdir(path.parent)) == ["seed-0.jsonl", "seed-0.jsonl.lease"]


def test_a_host_whose_heart_has_stopped_is_taken_over(path):
    forge(path, age=GONE)
    assert live_holder(path) is None
    with Lease(path):
        assert lease_holder(path)["pid"] == os.getpid()


@pytest.mark.parametrize("facts", [{"pid": 2**22 + 1, "start": 7}, {"pid": os.getpid(), "start": 1}])
def test_a_process_of_this_boot_that_is_gone_is_taken_over_at_once(path, facts):
    """Also where its number is another process's by now."""
    forge(path, boot=boot_id(), **facts)
    assert live_holder(path) is None
    with Lease(path) as lease:
        lease.check()


def test_a_killed_process_that_nobody_has_waited_for_is_gone(path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = module.process_start(child.pid)
    assert start is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
    assert module.process_start(child.pid) is None
    child.communicate()


def test_of_a_killed_worker_the_lease_is_released_and_no_other(path):
    forge(path, boot=boot_id())
    release_lease(path, 1)
    assert lease_holder(path)["pid"] == 4242
    release_lease(path, 4242)
    assert lease_holder(path) is None
    forge(path)
    release_lease(path, 4242)  # that number on another host
    assert lease_holder(path)["host"] == "far"


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"{", b"[1]", b'{"pid": "x", "boot": 3}'])
def test_garbage_in_a_lease_is_a_holder_of_unknown_name(path, garbage):
    file = forge(path)
    file.write_bytes(garbage)
    assert live_holder(path) is not None
    with pytest.raises(LockHeldError, match="being written by another process"), Lease(path):
        pass
    grow_old(file, GONE)
    with Lease(path):
        assert lease_holder(path)["pid"] == os.getpid()


def test_what_one_left_who_died_in_taking_over_is_in_nobodys_way(path):
    lease_path(path).mkdir()
    assert live_holder(path) is None
    with Lease(path):
        pass
    assert os.listdir(path.parent) == []


def test_the_heart_beats(path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    with Lease(path):
        (file,) = lease_path(path).iterdir()
        grow_old(file, 1000)
        deadline = time.monotonic() + 10
        while file.stat().st_mtime < time.time() - 500:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_a_refusal_of_the_storage_does_not_stop_the_heart(path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    tried, utime = [], os.utime

    def refuse_once(file):
        tried.append(file)
        if len(tried) == 1:
            raise OSError(5, "Input/output error")
        utime(file)

    monkeypatch.setattr(os, "utime", refuse_once)
    with Lease(path):
        deadline = time.monotonic() + 10
        while len(tried) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_a_reader_who_may_not_write_goes_by_its_own_clock(path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    file = forge(path)
    monkeypatch.setattr(Path, "touch", refuse)
    assert live_holder(path)["host"] == "far"
    grow_old(file, GONE)
    assert live_holder(path) is None


def test_who_stood_still_is_refused_at_its_next_line(path):
    """Its lease is taken over; it wakes up, writes nothing, and leaves the new holder's lease alone."""
    with FileWriter(path) as writer:
        writer.write_header(HEADER)
        before = path.read_bytes()
        (file,) = lease_path(path).iterdir()
        file.unlink()
        lease_path(path).rmdir()
        forge(path)
        with pytest.raises(LockHeldError, match="was taken over by process 4242 of far while this process stood still"):
            writer.write(ROW)
    assert path.read_bytes() == before
    assert lease_holder(path)["host"] == "far"


def test_a_lease_that_is_gone_refuses_the_next_line_too(path):
    with FileWriter(path) as writer:
        writer.write_header(HEADER)
        (file,) = lease_path(path).iterdir()
        file.unlink()
        with pytest.raises(LockHeldError, match="taken over by another process"):
            writer.write(ROW)
    assert read_run(path).records == ()


def test_a_late_contender_takes_nothing_fresh_away(path, monkeypatch):
    """Two see the same dead holder; the slower acts on what it saw when the quicker one has the lease already."""
    forge(path, age=GONE)
    late, seen = Lease(path), module._is_alive

    def alive(*args):
        verdict = seen(*args)
        monkeypatch.setattr(module, "_is_alive", seen)
        quick.enter_context(Lease(path))
        monkeypatch.setattr(module, "boot_id", lambda: "a third host")  # so that no flock would have decided
        return verdict

    with ExitStack() as quick:
        monkeypatch.setattr(module, "_is_alive", alive)
        with pytest.raises(LockHeldError, match=f"process {os.getpid()}"):
            late.__enter__()
        assert len(os.listdir(lease_path(path))) == 1
        assert lease_holder(path)["boot"] == boot_id()


def contend(host, path, start, rounds, results):
    """A host of its own: take over from whoever is gone, work alone, be gone in turn; count who else was inside."""
    module.boot_id = lambda: host
    inside, taken, doubled = Path(f"{path}.inside"), 0, 0
    start.wait()
    while taken < rounds:
        lease = Lease(path)
        try:
            lease.__enter__()
        except LockHeldError:
            continue
        taken += 1
        try:
            inside.touch(exist_ok=False)
            time.sleep(0.0002)
            lease.check()
            inside.unlink()
        except (FileExistsError, LockHeldError):
            doubled += 1
        lease._end.set()
        grow_old(lease._file, 1000)  # dead
    results.put(doubled)


def race(path, n_hosts, rounds):
    """How often two were inside at once, over all take-overs of ``n_hosts`` processes."""
    forge(path, age=GONE)
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(n_hosts), fork.Queue()
    hosts = [fork.Process(target=contend, args=(f"host {n}", path, start, rounds, results)) for n in range(n_hosts)]
    for process in hosts:
        process.start()
    doubled = sum(results.get(timeout=120) for _ in hosts)
    for process in hosts:
        process.join()
    return doubled


def test_of_many_hosts_that_take_over_exactly_one_does(path):
    assert race(path, n_hosts=4, rounds=15) == 0
    assert len(os.listdir(lease_path(path))) == 1
    assert sorted(os.listdir(path.parent)) == [lease_path(path).name]


@pytest.mark.slow
def test_of_very_many_take_overs_none_is_double(path):
    assert race(path, n_hosts=8, rounds=80) == 0


def test_of_threads_that_want_a_lease_one_gets_it(tmp_path):
    for n in range(50):
        path, won, start = tmp_path / f"seed-{n}.jsonl", [], threading.Barrier(4)

        def want(path=path, won=won, start=start):
            start.wait()
            try:
                won.append(Lease(path).__enter__())
            except LockHeldError:
                won.append(None)

        threads = [threading.Thread(target=want) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (lease,) = filter(None, won)
        lease.__exit__(None, None, None)


def begin(path, barriers, results):
    for barrier in barriers:
        barrier.wait()
        with ExitStack() as held:
            try:
                held.enter_context(FileWriter(path)).write_header(HEADER)
                results.put(1)
            except LockHeldError:
                results.put(0)
            barrier.wait()


def test_of_processes_that_begin_a_run_one_does(path):
    fork = multiprocessing.get_context("fork")
    barriers, results = [fork.Barrier(3) for _ in range(50)], fork.Queue()
    processes = [fork.Process(target=begin, args=(path, barriers, results)) for _ in range(3)]
    for process in processes:
        process.start()
    won = sum(results.get(timeout=60) for _ in range(3 * 50))
    for process in processes:
        process.join()
    assert won == 50
    assert os.listdir(path.parent) == [path.name]
