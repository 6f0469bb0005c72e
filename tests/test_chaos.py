"""Sweeps whose processes are killed at the worst moments end with the bits of one that was left alone."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dgal_bench.core.files import find_files, lock_holder
from dgal_bench.results.reader import read_results
from dgal_bench.results.schema import SCHEMA_VERSION
from dgal_bench.results.validate import validate
from tests.sweeping import HERE, alone, command, descendants, finish, in_progress, is_alive, texts_of, written

STRATEGIES, SEEDS = ("random", "margin", "dgmg"), (0, 1, 2)

OFTEN = ("training", "query", "half", "whole")
"""Moments that come in every round."""


def chaos(folder, chance, kinds=()):
    """An environment in which the processes of a sweep kill themselves; a token for each of ``kinds``."""
    folder.mkdir(exist_ok=True)
    for number, kind in enumerate(kinds):
        (folder / f"{number:02}-{kind}").touch()
    return {"PYTHONPATH": str(HERE / "tests" / "chaos"), "CHAOS_TOKENS": str(folder), "CHAOS_CHANCE": str(chance)}


def until_done(words, environment, tries=40):
    """Start it again until it ends well. Killed or with runs that failed, it never says more than a line."""
    said = ""
    for attempt in range(tries):
        done = finish([*words, "retry=failed"], **environment, CHAOS_SEED=str(attempt))
        assert done.returncode in (0, 1, -signal.SIGKILL), done.stderr
        said += done.stderr
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in said
    assert "raylet" not in said
    assert "the worker process was killed" in said
    assert "it is tried again" in said
    assert os.listdir(environment["CHAOS_TOKENS"]) == []  # as many kills as were asked for


def check_no_run_lost_or_doubled(root, n_runs, rounds):
    paths = sorted(root.rglob("seed-*.jsonl"))
    assert len(paths) == n_runs
    for path in paths:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [n for n, line in enumerate(lines) if line["kind"] == "header"] == [0]
        assert [line["round"] for line in lines if line["kind"] == "round"] == list(range(rounds + 1))
        assert lines[-1]["kind"] == "round"
        assert lock_holder(path) is None
    assert validate(root).problems == []


N_KILLS = {engine: int(os.environ.get("DGAL_KILLS", n)) for engine, n in {"local": 8, "ray": 5}.items()}
"""Of the whole sweep and of its processes. By hand, as before a release: DGAL_KILLS=21, or more."""

SELDOM = ("cache", "upgrade")
"""The other moments, once each: in the worker's code, which is the same under every engine."""


@pytest.mark.slow
@pytest.mark.alone  # it also asks that the clocks of its rows are sound, which they are not beside other tests
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_kills_and_the_bits_of_a_sweep_left_alone(experiment, tmp_path, engine):
    """SIGKILLs of the whole sweep, then others from within, at moments of every kind; Slurm's are in test_slurm."""
    words = ["jobs=2"]
    if engine == "ray":
        pytest.importorskip("ray")
        pytest.importorskip("dgal_bench.engines.ray")
        words += ["engine=ray", "gpus=2"]
    root, cache = tmp_path / "swept", tmp_path / "cache"
    words = command(root, cache, f"strategy={','.join(STRATEGIES)}", "seed=0,1,2", "rounds=6", *words)
    rng = random.Random(0)
    n_outside = max(1, N_KILLS[engine] // 10)
    kinds = list(SELDOM if N_KILLS[engine] > len(OFTEN + SELDOM) else ())
    kinds += itertools.islice(itertools.cycle(OFTEN), N_KILLS[engine] - n_outside - len(kinds))
    for _ in range(n_outside):
        kill_from_outside(words, root, rng)
    make_older(root)
    shutil.rmtree(cache)
    environment = chaos(tmp_path / "tokens", 0.4, kinds)
    until_done(words, environment)
    alone(experiment, tmp_path / "alone", STRATEGIES, SEEDS, "rounds=6")
    assert texts_of(root) == texts_of(tmp_path / "alone")
    check_no_run_lost_or_doubled(root, 9, rounds=6)
    assert not list(root.rglob(".*"))
    assert not list(cache.rglob("*.part"))


def kill_from_outside(words, root, rng):
    """SIGKILL of the command itself, at a moment when runs are in their middle."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE) as process:
        enough = written(root) + 10_000
        wait_until(lambda: process.poll() is not None or (written(root) > enough and in_the_middle(root)))
        time.sleep(rng.uniform(0, 0.02))
        below = descendants(process.pid)
        process.kill()
    wait_until(lambda: not any(map(works, below)), 20)  # who works for a command that is gone ends by itself
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # agents of Ray, which do not


def in_the_middle(root):
    """Whether a run has some rows: a header, and two to four of seven."""
    return any(3 <= path.read_bytes().count(b"\n") <= 5 for path in find_files(root, "seed-*.jsonl"))


def works(pid):
    """Whether it is a worker that is still there."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return any(name in Path(f"/proc/{pid}/cmdline").read_text() for name in ("dgal_bench.engines.worker", "/seed-"))
    return False


def make_older(root):
    """A run that is in its middle looks as if the version before had begun it, so that going on renews its file."""
    path = max(find_files(root, "seed-*.jsonl"), key=lambda path: path.stat().st_size)
    header, *rows = path.read_bytes().splitlines(keepends=True)
    now, before = (f'"schema_version": {version}'.encode() for version in (SCHEMA_VERSION, 1))
    path.write_bytes(b"".join([header.replace(now, before), *rows[:3]]))


SLOW_SETUP = ("dataset.pool_size=1400", "representation.max_epochs=5000", "representation.patience=5000")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", ["set-up", "cells"])
def test_a_stop_takes_under_five_seconds_and_keeps_what_was_finished(tmp_path, cache_root, moment, signal_):
    """Nobody goes on at work, no lock is held, and any number of Ctrl-C while it stops does no harm."""
    root, cache = tmp_path / "results", tmp_path / "cache" if moment == "set-up" else cache_root
    words = command(root, cache, "strategy=random,margin", "seed=0,1", "jobs=2", "rounds=30")
    if moment == "set-up":
        words = [word for word in words if not word.startswith(("representation=", "dataset.pool_size="))]
        words += ["representation=vae", *SLOW_SETUP]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=HERE) as process:
        wait_until(lambda: any(cache.glob("*.part")) if moment == "set-up" else in_progress(root, 1))
        time.sleep(0.5)
        below = descendants(process.pid)
        began = time.monotonic()
        while process.poll() is None and time.monotonic() < began + 30:
            process.send_signal(signal_)
            time.sleep(0.02)
        rest = process.stderr.read()
        took = time.monotonic() - began
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[signal_], rest
    assert took < 5, took
    assert rest.splitlines()[-1].startswith("dgal-bench: stopped; what was finished is kept")
    assert "Traceback" not in rest
    assert below
    wait_until(lambda: not any(map(is_alive, below)), 2)  # a fork server ends with the command
    held = [lock for folder in (root, cache) for lock in folder.rglob("*.lock") if lock_holder(lock.with_suffix(""))]
    assert held == []
    if moment == "cells":
        logs = read_results(root)
        assert sum(len(log.records) for log in logs) > 0
        assert all(log.failure is None for log in logs)


def wait_until(true, limit=120):
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
