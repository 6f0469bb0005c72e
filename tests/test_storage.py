"""Broken storage: full, read-only, damaged or newer than we are, two runners at once. A line each, and nothing lost."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from dgal_bench.cli.main import main
from dgal_bench.conformance import example_config, example_experiment, run_in_process
from dgal_bench.core.cache import get_or_make
from dgal_bench.core.errors import ResultsError
from dgal_bench.experiment import Run
from dgal_bench.loop import run_loop
from dgal_bench.results.reader import read_run
from dgal_bench.results.rows import choice
from dgal_bench.results.schema import SCHEMA_VERSION
from dgal_bench.results.writer import FileWriter, UnwritableError
from tests.sweeping import HERE, alone, command, finish, here, listing, texts_of

FULL = "No space left on device"
TOO_LARGE = "File too large"


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system in memory on a folder; without the right to, the test is skipped."""
    folders = []

    def mount(folder, options):
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.decode().strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def files_of_at_most(n_bytes):
    """As `ulimit -f`: the unprivileged way to storage that takes no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def said(words, capsys):
    """The exit code of a command, and the one line that it said."""
    code = main(words[3:])
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def reference(experiment, tmp_path, *overrides):
    """The rows and the bytes of an undisturbed run."""
    path = tmp_path / "undisturbed" / "seed-0.jsonl"
    rows = run_in_process(experiment, path, example_config("margin", *overrides))
    return rows, path.read_bytes()


def check_goes_on(experiment, path, rows, *overrides):
    before = path.read_bytes()
    assert [choice(row) for row in run_in_process(experiment, path, example_config("margin", *overrides))] == [
        choice(r) for r in rows
    ]
    assert path.read_bytes().startswith(before)


def check_stopped_whole(path, rows):
    """Whole lines, and rows that are those of the undisturbed run, but not all."""
    assert path.read_bytes().endswith(b"\n")
    kept = read_run(path).records
    assert 0 < len(kept) < len(rows)
    assert [choice(row) for row in kept] == [choice(row) for row in rows[: len(kept)]]


def test_a_file_that_may_not_grow_loses_nothing_and_goes_on(experiment, tmp_path):
    rows, content = reference(experiment, tmp_path)
    path = tmp_path / "seed-0.jsonl"
    with (
        files_of_at_most(len(content) - 100),
        pytest.raises(UnwritableError, match=f"{path} cannot .*: {TOO_LARGE}"),
    ):
        run_in_process(experiment, path, example_config("margin"))
    check_stopped_whole(path, rows)
    check_goes_on(experiment, path, rows)


def test_a_full_disk_loses_nothing_and_goes_on(experiment, tmp_path, mounted):
    """It fills up while the run is at work."""
    config = example_config("margin", "rounds=6")
    disk = mounted(tmp_path / "disk", "size=64k")
    path, ballast = disk / "seed-0.jsonl", disk / "ballast"

    def fill(row):
        with suppress(OSError), ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with FileWriter(path) as writer, pytest.raises(UnwritableError, match=f"{path} cannot .*: {FULL}"):
        run_loop(Run.of(config, experiment), writer, fill)
    rows = run_in_process(experiment, tmp_path / "undisturbed" / "seed-0.jsonl", config)
    check_stopped_whole(path, rows)
    assert sorted(os.listdir(disk)) == ["ballast", "seed-0.jsonl"]
    ballast.unlink()
    check_goes_on(experiment, path, rows, "rounds=6")


def test_an_old_file_that_cannot_be_renewed_stays_as_it_was(experiment, tmp_path):
    """Of schema 1, begun and not over: it is written anew before a row is added, and that does not fit."""
    rows, content = reference(experiment, tmp_path)
    now, before = (f'"schema_version": {version}'.encode() for version in (SCHEMA_VERSION, 1))
    path = tmp_path / "seed-0.jsonl"
    path.write_bytes(b"".join(content.replace(now, before, 1).splitlines(keepends=True)[:-1]))
    old = path.read_bytes()
    with files_of_at_most(len(old) - 100), pytest.raises(UnwritableError, match=TOO_LARGE):
        run_in_process(experiment, path, example_config("margin"))
    assert path.read_bytes() == old
    assert not list(tmp_path.glob(".*"))
    assert [choice(r) for r in run_in_process(experiment, path, example_config("margin"))] == [choice(r) for r in rows]
    assert json.loads(path.read_text().splitlines()[0])["schema_version"] == SCHEMA_VERSION


def test_a_cache_on_a_full_disk_is_a_line_and_leaves_no_part(tmp_path, mounted):
    disk = mounted(tmp_path / "disk", "size=64k")
    arrays = {"x": np.arange(3.0), "y": np.zeros(100_000)}
    with pytest.raises(
        ResultsError, match=f"the cache at {disk} cannot be used: .*set cache=DIR or DGAL_CACHE"
    ) as full:
        get_or_make(disk, "key", lambda folder: (arrays, {}))
    assert len(str(full.value).splitlines()) == 1
    assert os.listdir(disk) == []


def test_a_cache_whose_files_may_not_grow_is_a_line_and_leaves_no_part(tmp_path):
    arrays = {"x": np.arange(3.0), "y": np.zeros(100_000)}
    with files_of_at_most(10_000), pytest.raises(ResultsError, match=f"the cache at {tmp_path} cannot be used: "):
        get_or_make(tmp_path, "key", lambda folder: (arrays, {}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("way", ["mounted", "mode"])
def test_a_read_only_results_folder_is_said_before_anything_runs(tmp_path, capsys, mounted, way):
    root = tmp_path / "results"
    if way == "mounted":
        mounted(root, "size=64k,ro")
    else:
        root.mkdir(mode=0o555)
        if os.access(root, os.W_OK):
            pytest.skip("root may write into any folder")
    words = command(root, tmp_path / "cache", "strategy=random")
    assert said(words, capsys) == (2, f"dgal-bench: results={root} cannot be written: set results=DIR")
    assert not (tmp_path / "cache").exists()
    words = command(root / "below", tmp_path / "cache", "strategy=random")
    code, line = said(words, capsys)
    assert code == 2
    assert line.startswith(f"dgal-bench: results={root}/below cannot be written: ")


def prepared(experiment, tmp_path, change):
    """A folder with a run that was changed; the other run of the command has not begun."""
    root = tmp_path / "results"
    path = root / "paper" / "digits" / "random" / "seed-0.jsonl"
    run_in_process(experiment, path, example_config("random"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))
    return root, path


def newer(lines):
    header = json.loads(lines[0]) | {"schema_version": SCHEMA_VERSION + 1}
    return [json.dumps(header).encode() + b"\n", *lines[1:]]


def damaged(lines):
    return [lines[0], lines[1][: len(lines[1]) // 2] + b"\n", *lines[2:]]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (newer, f", line 1: schema {SCHEMA_VERSION + 1}, where this version reads 1 to {SCHEMA_VERSION}: update dgal-"),
        (damaged, ", line 2: not JSON ("),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_before_any_run_starts(experiment, tmp_path, capsys, change, line):
    root, path = prepared(experiment, tmp_path, change)
    before = listing(root)
    code, text = said(command(root, tmp_path / "cache", "strategy=random,margin"), capsys)
    assert code == 2
    assert text.startswith(f"dgal-bench: {path}{line}")
    assert listing(root) == before
    assert not (tmp_path / "cache").exists()


def flip(raw):
    return raw[:-1] + bytes([raw[-1] ^ 1])


def cut(raw):
    return raw[: len(raw) // 2]


@pytest.mark.parametrize(("name", "change"), [("latents.npy", flip), ("latents.npy", cut), ("manifest.json", cut)])
def test_a_damaged_cache_is_made_again_said_and_no_pick_is_another(experiment, tmp_path, caplog, name, change):
    cache = tmp_path / "cache"
    setup = example_experiment(cache).prepared
    for path in cache.glob(f"*/{name}"):
        path.write_bytes(change(path.read_bytes()))
    again = example_experiment(cache)
    for path in cache.glob(f"*/{name}"):
        assert f"cache entry {path.parent} is damaged ({name}): made again" in caplog.text
    assert (again.prepared.features_sha256, again.prepared.graph_sha256) == (setup.features_sha256, setup.graph_sha256)
    rows, _ = reference(experiment, tmp_path)
    picked = run_in_process(again, tmp_path / "seed-0.jsonl", example_config("margin"))
    assert [choice(row) for row in picked] == [choice(row) for row in rows]


# Real processes from here on.

FOUR = ("strategy=random,dgmg", "seed=0,1", "rounds=10")  # 12 KB each


@pytest.fixture(scope="module")
def undisturbed(experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    alone(experiment, folder, ("random", "dgmg"), (0, 1), FOUR[-1])
    return texts_of(folder)


def check_all_done_once(root, expected):
    assert texts_of(root) == expected
    for path in root.rglob("seed-*.jsonl"):
        kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
        assert kinds == ["header", *["round"] * (len(kinds) - 1)]
    assert not list(root.rglob("*.lock"))
    assert not list(root.rglob(".*"))


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # less than a run
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "limited"])
def test_a_sweep_stops_at_storage_that_takes_no_more_and_goes_on_elsewhere(
    undisturbed, tmp_path, cache_root, mounted, way
):
    root = tmp_path / "results"
    if way == "full":
        mounted(root, "size=32k")
    words = command(root, cache_root, *FOUR, "jobs=2")
    if way == "limited":
        words = [sys.executable, "-c", LIMITED, *words[1:]]
    sweep = finish(words)
    told = sweep.stderr
    assert sweep.returncode == 2, told
    (line,) = [line for line in told.splitlines() if not line.startswith("[")]
    assert line.startswith(f"dgal-bench: {root}/paper/digits/")
    assert f"cannot be written: {FULL if way == 'full' else TOO_LARGE}" in line
    before = {name: content for name, content in listing(root).items() if name.suffix == ".jsonl"}
    assert before
    for content in before.values():
        assert content.endswith(b"\n") or not content
    better = tmp_path / "better"
    shutil.copytree(root, better)
    done = here(command(better, cache_root, *FOUR, "jobs=2"))
    assert done.returncode == 0, done.stderr
    after = listing(better)
    assert all(after[name].startswith(content) for name, content in before.items() if content.count(b"\n") > 1)
    check_all_done_once(better, undisturbed)


@pytest.mark.slow
def test_a_full_cache_stops_a_sweep_in_a_line(tmp_path, mounted):
    cache = mounted(tmp_path / "cache", "size=64k")
    (cache / "ballast").write_bytes(bytes(40 * 1024))
    done = here(command(tmp_path / "results", cache, "strategy=random"))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("[set-up]")]
    assert line.startswith(f"dgal-bench: the cache at {cache} cannot be used: [Errno 28] {FULL}")
    assert os.listdir(cache) == ["ballast"]


@pytest.mark.slow
def test_two_runners_at_once_do_every_run_once(undisturbed, tmp_path):
    root, cache = tmp_path / "results", tmp_path / "cache"
    words = command(root, cache, *FOUR, "jobs=1")
    runners = [
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=HERE)
        for _ in range(2)
    ]
    errors = [runner.communicate(timeout=240)[1] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], errors
    assert not any(
        line.startswith("dgal-bench") or "Traceback" in line for said in errors for line in said.splitlines()
    )
    check_all_done_once(root, undisturbed)
    assert not list(cache.glob("*.part")) + list(cache.glob("*.lock"))


def hold(path, ready):
    with FileWriter(path):
        ready.set()
        time.sleep(600)


@pytest.mark.slow
def test_a_run_held_by_another_runner_is_waited_for_and_taken_over_when_that_dies(experiment, tmp_path, cache_root):
    root = tmp_path / "results"
    path = root / "paper" / "digits" / "margin" / "seed-0.jsonl"
    run_in_process(experiment, path, example_config("margin"))
    whole = texts_of(root)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    holder = fork.Process(target=hold, args=(path, ready))
    holder.start()
    assert ready.wait(20)
    words = command(root, cache_root, "strategy=margin", "seed=0")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=HERE) as runner:
        for line in runner.stderr:
            if "waiting" in line:
                break
        assert line == f"warning: waiting for runs that process {holder.pid} of {os.uname().nodename} works on\n"
        assert len(read_run(path).records) == 1
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        rest = runner.stderr.read()
    assert runner.returncode == 0, rest
    check_all_done_once(root, whole)
