"""The Slurm engine: what is asked of Slurm, how a job is heard, and sweeps of jobs that are processes here."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from dgal_bench.cli.options import axes_of, parse_arguments, settings_of
from dgal_bench.config.schema import available_cores
from dgal_bench.conformance import EXAMPLE_SETTINGS
from dgal_bench.core.errors import ConfigError
from dgal_bench.core.files import find_files, lock_holder
from dgal_bench.engines import execute, slurm
from dgal_bench.engines.base import SynchronizedListener
from dgal_bench.engines.slurm import (
    PARALLEL,
    EventFile,
    SlurmEngine,
    SlurmQueue,
    defer_signals,
    job_parameters,
    parse_minutes,
)
from dgal_bench.results.reader import read_results
from tests.sweeping import in_progress
from tests.test_cli import alone, axes, choices_of, command, descendants, finish, here, plan_runs, settings
from tests.test_engines import Diary
from tests.test_ray import LONG, alive, started, wait_for

pytest.importorskip("submitit")
HERE = ("engine=slurm", "slurm.cluster=local")
SHORT = ("batch_size=1", "rounds=40")  # a run of three seconds


def asked(tmp_path, slurm=(), kind="run", grid=(), **changes):
    given = settings(tmp_path, **{"jobs": None, "slurm": dict(slurm), **changes})
    return job_parameters(kind, plan_runs(axes(threads=["2"], **dict(grid)), given), given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("4:00:00", 240), ("2-00:00:00", 2880), ("1-12", 2160), ("1-0:30", 1470), ("0", 1)],
)
def test_times_are_slurms(text, expected):
    assert parse_minutes(text) == expected


@pytest.mark.parametrize("text", ["", "2h", "1-", "-1", "1:2:3:4"])
def test_other_times_are_refused(text):
    with pytest.raises(ConfigError, match=r"^slurm.time=.*: use minutes, H:MM:SS or D-HH:MM:SS$"):
        parse_minutes(text)


def test_a_job_asks_for_what_a_run_needs(tmp_path):
    base = {"timeout_min": 1440, "cpus_per_task": 2, "slurm_array_parallelism": PARALLEL}
    assert asked(tmp_path, {"cluster": "local"}) == base | {"slurm_array_parallelism": max(1, available_cores() // 2)}
    base |= {"slurm_srun_args": ["--cpus-per-task=2"], "slurm_additional_parameters": {"no-requeue": True}}
    assert asked(tmp_path) == base
    assert asked(tmp_path, jobs=5)["slurm_array_parallelism"] == 5
    given = {"partition": "p", "account": "a", "qos": "q", "constraint": "c", "mem_gb": "7.5", "setup": "module load x"}
    expected = {f"slurm_{name}": given[name] for name in ("partition", "account", "qos", "constraint")}
    assert asked(tmp_path, given) == base | expected | {"mem_gb": 7.5, "slurm_setup": ["module load x"]}


@pytest.mark.parametrize(
    ("share", "each", "at_once"), [(1.0, 1, 8), (0.5, 1, 8), (2.0, 2, 4), (1.5, 2, 4), (9.0, 9, 1)]
)
def test_a_job_has_whole_gpus_and_no_more_run_than_those_that_were_given(tmp_path, share, each, at_once):
    wanted = asked(tmp_path, gpus=8, gpus_per_cell=share)
    assert (wanted["gpus_per_node"], wanted["slurm_array_parallelism"]) == (each, at_once)
    assert asked(tmp_path, gpus=8, gpus_per_cell=share, jobs=1)["slurm_array_parallelism"] == 1
    assert "gpus_per_node" not in asked(tmp_path, gpus=0, gpus_per_cell=share)


def test_a_set_up_asks_for_the_cores_and_gpus_that_it_uses(tmp_path):
    wanted = asked(tmp_path, kind="setup", grid={"representation__threads": ["8"], "trainer__devices": ["3"]}, gpus=4)
    assert (wanted["cpus_per_task"], wanted["gpus_per_node"]) == (8, 3)
    wanted = asked(tmp_path, kind="setup", gpus=4, gpus_per_cell=0.5)
    assert (wanted["cpus_per_task"], wanted["gpus_per_node"]) == (2, 1)


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        (
            {},
            "engine=slurm needs Slurm's sbatch: run it on a login node, or slurm.cluster=local to try the command out",
        ),
        ({"cluster": "local", "mem_gb": "nan"}, "slurm.mem_gb=nan: use a number of gigabytes"),
        ({"cluster": "local", "mem_gb": "0"}, "slurm.mem_gb=0: use a number of gigabytes"),
        ({"cluster": "local", "folder": "/dev/null/x"}, "slurm.folder=/dev/null/x cannot be a folder: Not a directory"),
        ({"cluster": "lokal"}, "unknown slurm.cluster 'lokal'; did you mean 'local'?"),
        ({"cluster": "local", "mem_gb": "many"}, "slurm.mem_gb=many: use a number of gigabytes"),
        ({"cluster": "local", "setup": "module load x"}, "slurm.setup= is for nodes of a cluster"),
    ],
)
def test_what_slurm_cannot_do_is_one_line(tmp_path, monkeypatch, slurm, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    given = settings(tmp_path / "results", slurm=slurm)
    with pytest.raises(ConfigError) as error:
        SlurmEngine(plan_runs(axes(), given), given, SynchronizedListener(Diary()))
    assert str(error.value).startswith(message)
    assert not (tmp_path / "results").exists()


def test_gpus_are_for_nodes(tmp_path):
    with pytest.raises(ConfigError, match=r"^gpus= is for nodes of a cluster: slurm.cluster=local starts processes"):
        asked(tmp_path, {"cluster": "local"}, gpus=1)


def test_partitions_may_be_several(tmp_path):
    given = settings_of(parse_arguments(["engine=slurm", "slurm.partition=gpu,big", "slurm.constraint=[a|b]"]), "paper")
    assert given.slurm == {"partition": "gpu,big", "constraint": "[a|b]"}
    with pytest.raises(ConfigError, match=r"^slurm.partition= is empty: leave it out$"):
        settings_of(parse_arguments(["engine=slurm", "slurm.partition="]), "paper")


def test_a_stop_that_comes_while_jobs_are_submitted_is_heard_when_they_are_known():
    known, heard = [], []

    def on_event(*_):
        heard.append(list(known))

    before = signal.signal(signal.SIGINT, on_event)
    try:
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            known.append("array")
        assert heard == [["array"]]
        assert signal.getsignal(signal.SIGINT) is on_event
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_queue_that_is_not_to_be_asked_says_that_nobody_has_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not SlurmQueue().has_left("7", submitted=-math.inf)


def test_without_submitit_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"^engine=slurm needs submitit: pip install 'dgal-bench\[slurm\]'$"):
        SlurmEngine([], settings(tmp_path), SynchronizedListener(Diary()))


def test_events_are_heard_once_each_and_whole(tmp_path):
    """Cut at every byte, with a torn line of a job that was started again in between."""
    events = [{"event": "round", "round": 0, "accuracy": 0.5}, {"event": "done", "seconds": 1.0}]
    lines = [json.dumps(event) for event in events]
    raw = ("\n" + lines[0] + "\n" + lines[1][:9] + "\n" + lines[1] + "\n").encode()
    for cut in range(len(raw) + 1):
        tail = EventFile(tmp_path / f"{cut}.events")
        assert list(tail()) == []
        tail.path.write_bytes(raw[:cut])
        heard = list(tail())
        with tail.path.open("ab") as file:
            file.write(raw[cut:])
        assert heard + list(tail()) == events
        assert list(tail()) == []


# Jobs from here on.

FAKES = {
    "sbatch": """
import json, os, re, subprocess, sys
script = open(sys.argv[1]).read()
with open(f"{HOME}/submitted", "a") as file:
    file.write(script + "\\n")
found = re.search(r"--array=0-(\\d+)", script)
elements = range(int(found[1]) + 1) if found else [None]
name = re.search(r"--job-name=(\\S+)", script)[1]
call = open(f"{HOME}/submitted").read().count("#!/bin/bash")
if os.path.exists(f"{HOME}/refuse") and open(f"{HOME}/refuse").read() == str(call):
    print("sbatch: error: QOSMaxSubmitJobPerUserLimit", file=sys.stderr)
    sys.exit(1)
number = str(1000 + call)
for element in elements:
    env = {"SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"}
    env |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "here"}
    if element is not None:
        env |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": str(element)}
    done = subprocess.run(["bash", sys.argv[1]], env=os.environ | env, stdout=subprocess.PIPE, check=True)
    words, env = json.loads(done.stdout)
    quiet = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
    job = subprocess.Popen(words, env=env, start_new_session=True, **quiet)
    with open(f"{HOME}/job-{name}", "a") as file:
        file.write(f"{number}{'' if element is None else f'_{element}'} {job.pid}\\n")
print("Submitted batch job", number)
""",
    "srun": """
import json, os, sys
print(json.dumps([sys.argv[sys.argv.index(sys.executable) :], dict(os.environ)]))
""",
    "sacct": """
import sys
sys.exit("sacct: error: Slurm accounting storage is disabled")
""",
    "squeue": """
import glob, os, sys
assert "--all" in sys.argv and "SQUEUE_STATES" not in os.environ
for path in glob.glob(f"{HOME}/job-*"):
    for number, pid in map(str.split, open(path)):
        if os.path.exists(f"/proc/{pid}"):
            print(number)
""",
    "scancel": """
import os, signal, sys
assert sys.argv[1].startswith("--name=") and sys.argv[2] == f"--user={os.getuid()}"
for _, pid in map(str.split, open(f"{HOME}/job-{sys.argv[1][7:]}")):
    try:
        os.killpg(int(pid), signal.SIGTERM)
        os.killpg(int(pid), signal.SIGKILL)
    except ProcessLookupError:
        pass
""",
}
"""Slurm as far as the command sees it: an array's elements at once, as process groups. ``sbatch`` is warm (warm.py)
and so starts what ``srun`` only prints."""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with what was submitted, one with Slurm's commands before all others."""
    home = tmp_path / "slurm"
    home.mkdir()
    for name, text in FAKES.items():
        (home / name).write_text(f"#!{sys.executable}\nHOME = {str(home)!r}\n{text}")
        (home / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setitem(slurm._LOOK_AGAIN_SECONDS, "slurm", 0.2)
    return home


@pytest.mark.slow
def test_a_sweep_is_one_job_and_arrays_of_what_may_run_at_once(experiment, tmp_path, cluster):
    root = tmp_path / "swept"
    words = command(root, tmp_path / "cache", "strategy=random", "seed=0,1,2", "rounds=6", "engine=slurm", "jobs=2")
    done = here([*words, "slurm.partition=fast", "slurm.time=2:00:00", "slurm.setup=export DGAL_OFFLINE=1"])
    assert done.returncode == 0, done.stderr
    assert choices_of(root) == alone(experiment, tmp_path / "alone", ("random",), (0, 1, 2), "rounds=6")
    scripts = (cluster / "submitted").read_text().split("#!/bin/bash")[1:]
    assert ["--array=0-1%2" in script for script in scripts] == [False, True, False]
    for line in ("--partition=fast", "--time=120", "--cpus-per-task=1", "--no-requeue", "export DGAL_OFFLINE=1"):
        assert all(line in script for script in scripts)


@pytest.mark.slow
@pytest.mark.alone
def test_a_stop_cancels_the_array(tmp_path, cache_root, cluster):
    root = tmp_path / "swept"
    process = started(command(root, cache_root, "strategy=random", "seed=0,1", *LONG, "engine=slurm", "jobs=2"))
    assert wait_for(lambda: len(find_files(root, "*.jsonl")) == 2, process)
    pids = [pid for _, pid in elements(cluster)]
    children = [child for pid in pids for child in [pid, *descendants(pid)]]
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == 130, err
    time.sleep(0.5)
    assert alive(children) == []


def quick(given, *words):
    """Runs of a second."""
    return plan_runs(
        axes_of(parse_arguments([*EXAMPLE_SETTINGS, "representation=pca", "profile=smoke", *words]), {}), given
    )


def elements(cluster):
    """Numbers of jobs, and their processes."""
    lines = [line.split() for path in cluster.glob("job-*") for line in path.read_text().splitlines()]
    return [(number, int(pid)) for number, pid in lines]


@pytest.mark.slow
def test_a_job_that_leaves_the_queue_without_a_word_is_submitted_again(
    experiment, tmp_path, cache_root, cluster, monkeypatch, capfd
):
    """A node has crashed, or a job was cancelled by hand: no accounting need know of it."""
    monkeypatch.setattr(slurm, "_ASK_SECONDS", 1.0)
    monkeypatch.setitem(slurm._GRACE_SECONDS, "slurm", 0.5)
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    given = settings(tmp_path / "swept", cache=cache_root, engine="slurm", jobs=2)
    jobs = quick(given, "strategy=random,dgmg", *SHORT)
    diary, seen = Diary(), []

    def crash():
        """Every process of the first run's job at once, when it has some rows, and long before it has all."""
        while not jobs[0].path.exists() or jobs[0].path.read_text().count("\n") < 4:
            time.sleep(0.01)
        for number, pid in elements(cluster):
            if number.endswith("_0"):
                seen.append(SlurmQueue._ask())
                for one in [pid, *descendants(pid)]:
                    os.kill(one, signal.SIGKILL)

    thread = threading.Thread(target=crash, daemon=True)
    thread.start()
    assert execute(jobs, given, diary, {}) == []
    thread.join()
    assert "it is tried again" in diary.of("warn")[0][0]
    assert "is gone" in diary.of("warn")[0][0]
    assert capfd.readouterr() == ("", "")
    assert {number.rpartition("_")[2] for number in seen[0]} == {"0", "1"}
    assert choices_of(given.results) == alone(experiment, tmp_path / "alone", ("random", "dgmg"), (0,), *SHORT)


@pytest.mark.slow
def test_a_refused_submission_is_tried_again_while_others_run(tmp_path, cache_root, cluster, monkeypatch):
    """A site's limit, or a controller that is busy, costs no job that runs; without one it is the end, in a line."""
    monkeypatch.setattr(slurm, "_SUBMIT_AGAIN_SECONDS", 0.5)
    (cluster / "refuse").write_text("3")  # of submissions: the set-up, two runs, and then the third
    given = settings(tmp_path / "swept", cache=cache_root, engine="slurm", jobs=2)
    jobs = quick(given, "strategy=random", "batch_size=1", "rounds=60,1,2")
    diary = Diary()
    assert execute(jobs, given, diary, {}) == []
    assert len(diary.of("done")) == 3
    refused = "Slurm refuses the job: sbatch: error: QOSMaxSubmitJobPerUserLimit"
    assert diary.of("warn") == [(f"{refused}; it is tried again as long as other jobs run",)]
    (cluster / "refuse").write_text("5")
    with pytest.raises(ConfigError, match=f"^{refused}$"):
        execute(quick(given, "strategy=margin"), given, diary, {})


@pytest.mark.slow
def test_jobs_of_slurm_give_the_bits_of_one_run_after_the_other(experiment, tmp_path):
    """From an empty cache; a run that fails is recorded and costs no other."""
    root = tmp_path / "swept"
    words = command(root, tmp_path / "cache", "strategy=random,dgmg", "seed=0", "training.lr=0.001,1e25", "rounds=6")
    done = finish([*words, *HERE, "jobs=2"])
    assert done.returncode == 1
    *lines, last = done.stderr.splitlines()
    assert all(line.startswith("[") for line in lines), done.stderr
    assert sum("FAILED: the training loss is nan" in line for line in lines) == 2
    assert last.startswith("2 of 4 runs failed")
    whole = alone(experiment, tmp_path / "alone", ("random", "dgmg"), (0,), "rounds=6", "training.lr=0.001")
    for strategy in ("random", "dgmg"):
        assert choices_of(root)[f"digits/{strategy}+training.lr=0.001/seed-0"] == whole[f"digits/{strategy}/seed-0"]
    failed = [log for log in read_results(root) if log.status == "failed"]
    assert ["Traceback" in log.failure["traceback"] for log in failed] == [True, True]
    assert not list((root / "slurm").glob("*.events"))


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_a_killed_job_is_submitted_again_and_goes_on(experiment, tmp_path, cache_root):
    """SIGKILL of a worker, of another run's job, and of a later attempt's keeper, without whom it may end well."""
    root = tmp_path / "swept"
    process = started(command(root, cache_root, "strategy=random", "seed=0,1", *SHORT, *HERE, "jobs=1"))
    # In between stand the worker's fork server, and the twins of job and keeper, which start their processes (warm.py).
    for seed, size, generations in ((0, 8_000, 0), (1, 8_000, 3), (0, 16_000, 5)):  # who died goes to the queue's end
        run = root / "paper" / "digits" / "random" / f"seed-{seed}.jsonl"
        assert wait_for(lambda run=run, size=size: run.exists() and run.stat().st_size > size, process)
        victim = int(lock_holder(run).split()[1])
        for _ in range(generations):
            victim = parent(victim)
        os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    for seed in (0, 1):
        assert any(f"seed-{seed}" in line and "it is tried again" in line for line in err.splitlines()), err
    assert choices_of(root) == alone(experiment, tmp_path / "alone", ("random",), (0, 1), *SHORT)


@pytest.mark.slow
@pytest.mark.alone
def test_a_stop_cancels_the_jobs_within_five_seconds_and_keeps_rows(tmp_path, cache_root):
    root = tmp_path / "swept"
    process = started(command(root, cache_root, "strategy=random", "seed=0,1", *LONG, *HERE, "jobs=2"))
    assert wait_for(lambda: in_progress(root, 2), process)
    children = descendants(process.pid)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert (process.returncode, "Traceback" in err) == (143, False)
    time.sleep(0.5)
    assert alive(children) == []
    for log in read_results(root):
        assert log.status == "partial"
        assert Counter(line["kind"] for line in log.lines)["header"] == 1
