"""The Ray engine: the rows of a run left alone, whatever happens to its workers and its driver."""

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from dgal_bench.core.errors import ConfigError
from dgal_bench.core.files import find_files, lock_holder
from dgal_bench.engines import ray as ray_engine
from dgal_bench.engines import worker
from dgal_bench.engines.base import SynchronizedListener
from dgal_bench.engines.ray import RayEngine, check_shared, connect, mark_folder
from dgal_bench.results.reader import read_results, read_run
from tests.sweeping import in_progress
from tests.test_cli import HERE, alone, axes, choices_of, command, descendants, finish, plan_runs, settings
from tests.test_engines import Diary

pytest.importorskip("ray")
LONG = ("batch_size=1", "rounds=180")  # so that the first run is in its middle when a slow start of the second ends
"""A run of some seconds."""


def title(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def workers_at(words, pid):
    """Ray's processes that are busy with a run now: Ray names them after their task."""
    return [child for child in descendants(pid) if title(child).startswith("ray::" + words)]


def wait_for(what, process, seconds=240):
    """Who has waited in vain ends the process: the tests after this one would have it beside them."""
    deadline = time.monotonic() + seconds
    while not (found := what()) and process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            process.communicate()
        time.sleep(0.05)
    return found


def alive(pids):
    return [(pid, title(pid)) for pid in pids if title(pid)]


def started(words):
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(3), KeyboardInterrupt()])
def test_a_job_ends_its_stream_whatever_ends_it(monkeypatch, error):
    """A thread that died without a word would leave the driver listening for ever."""

    def end(*_):
        raise error

    monkeypatch.setattr(worker, "handle", end)
    (event,) = worker.stream_events({"job": "run", "folder": "/nowhere"}, lambda: None)
    assert (event["event"], event["stop"]) == ("failed", False)


def test_without_ray_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"^engine=ray needs Ray: pip install 'dgal-bench\[ray\]'$"):
        connect(None, 1, 0)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "head", "head:port", ":6379"])
def test_a_wrong_address_is_one_line_at_once(address):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"^ray\.address={address}: (no answer|use auto, or HOST:PORT).*$"):
        connect(address, 1, 0)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("gpus", "share", "message"),
    [
        (2, 1.5, r"^gpus_per_cell=1.5: Ray gives a part of one GPU, or whole ones$"),
        (1, 2.0, r"^gpus=1 is less than the gpus_per_cell=2 of one run$"),
    ],
)
def test_gpus_that_ray_cannot_give_are_refused_before_it_starts(tmp_path, gpus, share, message):
    given = settings(tmp_path, gpus=gpus, gpus_per_cell=share)
    with pytest.raises(ConfigError, match=message):
        RayEngine(plan_runs(axes(), given), given, SynchronizedListener(Diary()))


SHARED = "results= and cache= must be on storage that all nodes of a Ray cluster share"


def test_a_folder_is_the_commands_where_its_file_is_seen(tmp_path):
    markers = [mark_folder(tmp_path / name) for name in ("results", "cache")]
    check_shared(markers)
    Path(markers[1]).unlink()
    with pytest.raises(
        ConfigError, match=f"^{platform.node()} does not see the {tmp_path}/cache of this machine: {SHARED}$"
    ):
        check_shared(markers)


class Cluster:
    """Ray as far as the engine asks it what there is: a dict of resources for each node."""

    def __init__(self, *nodes):
        self.there, self.exported = nodes, []

    def nodes(self):
        return [{"Alive": True, "Resources": node} for node in self.there]

    def cluster_resources(self):
        return {name: sum(node.get(name, 0) for node in self.there) for node in self.there for name in node}

    def remote(self, *work, **options):
        self.exported.append(options)
        return (lambda _: self) if options else self

    def options(self, **_):
        return self

    def shutdown(self):
        pass


def engine_on(cluster, monkeypatch, tmp_path, here=(), grid=(), **changes):
    monkeypatch.setattr(ray_engine, "connect", lambda *_: cluster)
    monkeypatch.setattr(ray_engine, "check_nodes", lambda *_: None)
    monkeypatch.setattr(ray_engine, "visible_gpus", lambda: list(here))
    monkeypatch.setattr(ray_engine, "_COUNT_AGAIN_SECONDS", 0)
    given = settings(tmp_path, **{"jobs": None, "engine": "ray", "ray_address": "auto", **changes})
    return RayEngine(plan_runs(axes(**dict(grid)), given), given, SynchronizedListener(Diary()))


HEAD, BIG = {"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "grid", "changes", "message"),
    [
        ([HEAD], {}, {"gpus": 8}, "gpus=8, but no machine of this Ray has a GPU: leave it out"),
        ([HEAD, BIG], {}, {"gpus_per_cell": 4.0}, "gpus_per_cell=4, but no machine of this Ray has more than 2 GPUs"),
        (
            [HEAD, BIG],
            {"trainer__devices": ["3"]},
            {},
            "trainer.devices=3, but no machine of this Ray has more than 2 GPUs",
        ),
        ([HEAD, BIG], {"threads": ["32"]}, {}, "threads=32, but no machine of this Ray has more than 16 CPUs"),
    ],
)
def test_what_no_machine_of_a_cluster_has_is_one_line(tmp_path, monkeypatch, nodes, grid, changes, message):
    """Ray would wait for such a machine for ever."""
    with pytest.raises(ConfigError) as error:
        engine_on(Cluster(*nodes), monkeypatch, tmp_path, grid=grid, **changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("here", "changes"),
    [([], {"gpus_per_cell": 2.0}), (["0"], {"gpus_per_cell": 2.0}), ([], {"gpus": 2, "gpus_per_cell": 2.0})],
)
def test_a_cluster_is_judged_by_its_own_gpus(tmp_path, monkeypatch, here, changes):
    engine = engine_on(Cluster(HEAD, BIG), monkeypatch, tmp_path, here=here, **changes)
    assert engine._capacity.task_options(engine_job(engine))["num_gpus"] == 2


def engine_job(engine):
    return plan_runs(axes(), engine._settings)[0]


def test_runs_of_a_cluster_whose_gpus_have_gone_wait_for_others(tmp_path, monkeypatch):
    """On a CPU they would be other runs: rows of both would be compared."""
    cluster = Cluster(HEAD, BIG)
    engine = engine_on(cluster, monkeypatch, tmp_path)
    cluster.there = [HEAD]
    assert engine._capacity.task_options(engine_job(engine))["num_gpus"] == 1
    assert engine._capacity.runs() == 2
    assert engine._notify._listener.of("warn") == [("no machine of this Ray has a GPU any more: runs wait for one",)]


def test_a_cluster_that_has_found_a_gpu_later_goes_on_without(tmp_path, monkeypatch):
    cluster = Cluster(HEAD)
    engine = engine_on(cluster, monkeypatch, tmp_path)
    cluster.there = [HEAD, BIG]
    assert engine._capacity.task_options(engine_job(engine))["num_gpus"] == 0


def test_a_set_up_asks_for_the_gpus_that_it_uses(tmp_path, monkeypatch):
    engine = engine_on(Cluster(HEAD, BIG), monkeypatch, tmp_path, gpus_per_cell=0.5)
    (two,) = plan_runs(axes(trainer__devices=["2"]), engine._settings)
    assert engine._capacity.task_options(engine_job(engine), "setup")["num_gpus"] == engine._settings.gpus_per_cell
    assert engine._capacity.task_options(two, "setup")["num_gpus"] == 2
    assert engine._capacity.task_options(engine_job(engine))["num_gpus"] == 0.5


@pytest.mark.parametrize(("address", "here", "own"), [("auto", [], True), (None, ["0", "1"], True), (None, [], False)])
def test_tasks_of_real_gpus_have_a_process_of_their_own(tmp_path, monkeypatch, address, here, own):
    """Ray's own default for GPU tasks is lost where the GPUs are said in options."""
    cluster = Cluster(HEAD, BIG)
    engine_on(cluster, monkeypatch, tmp_path, here=here, ray_address=address)
    assert ({"max_calls": 1} in cluster.exported) == own


def test_a_ray_of_our_own_has_no_more_gpus_than_the_machine(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^gpus=4, but this machine has 2: leave it out, or add --dry-run$"):
        engine_on(Cluster(BIG), monkeypatch, tmp_path, here=["0", "1"], ray_address=None, gpus=4)


# Ray itself from here on.


PICKY = """
from dataclasses import dataclass
from dgal_bench.core.errors import NotApplicableError

@dataclass(frozen=True)
class Picky:
    def __call__(self, query, candidates, batch_size):
        raise NotApplicableError("no strategy for digits")

ACQUISITIONS = {"picky": Picky}
STRATEGIES = {"picky": {"restrict": {"kind": "everything"}, "acquire": {"kind": "picky"}}}
"""


@pytest.mark.slow
def test_halves_of_a_gpu_of_ray_give_the_bits_of_one_run_after_the_other(experiment, tmp_path):
    """Two at once on a logical GPU, which Ray gives whether or not it exists; from an empty cache.

    Runs that fail or are skipped are recorded, and cost no other.
    """
    root, gpu, rounds = tmp_path / "swept", ("engine=ray", "gpus=1", "gpus_per_cell=0.5"), "rounds=30"
    (tmp_path / "picky.py").write_text(PICKY)
    rates, plugin = "training.lr=0.001,1e25", f"plugins={tmp_path}/picky.py"
    words = command(root, tmp_path / "cache", "strategy=random,picky,dgmg", "seed=0", rates, plugin, rounds, *gpu)
    process, most = started(words), 0
    while process.poll() is None:
        most = max(most, len(workers_at("digits/", process.pid)))
        time.sleep(0.05)
    *lines, last = process.communicate()[1].splitlines()
    assert process.returncode == 1
    assert most == 2
    assert all(line.startswith("[") for line in lines), lines
    assert last.startswith("2 of 6 runs failed")
    whole = alone(experiment, tmp_path / "alone", ("random", "dgmg"), (0,), rounds)
    for strategy in ("random", "dgmg"):
        assert choices_of(root)[f"digits/{strategy}+training.lr=0.001/seed-0"] == whole[f"digits/{strategy}/seed-0"]
    ended = {log.header["cell"].split("/")[1]: log for log in read_results(root)}
    assert {ended[f"picky+{rate}"].skipped["why"] for rate in ("training.lr=0.001", "training.lr=1e25")} == {
        "no strategy for digits"
    }
    failed = [log for log in ended.values() if log.status == "failed"]
    assert ["Traceback" in log.failure["traceback"] for log in failed] == [True, True]
    assert ["lower training.lr" in log.failure["error"] for log in failed] == [True, True]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(("sent", "code", "when"), [(signal.SIGINT, 130, "starting"), (signal.SIGTERM, 143, "running")])
def test_a_stop_ends_ray_within_five_seconds_and_keeps_rows(experiment, tmp_path, cache_root, sent, code, when):
    root = tmp_path / "swept"
    words = command(root, cache_root, "strategy=random", "seed=0,1", *LONG, "engine=ray", "jobs=2")
    process = started(words)
    if when == "running":
        assert wait_for(lambda: in_progress(root, 2), process)
    else:
        assert wait_for(lambda: [p for p in descendants(process.pid) if "gcs_server" in title(p)], process)
    children = descendants(process.pid)
    began = time.monotonic()
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == code, err
    assert "Traceback" not in err
    time.sleep(0.5)
    assert alive(children) == []
    assert not any(map(lock_holder, find_files(root, "seed-*.jsonl")))
    files = find_files(root, "seed-*.jsonl")
    assert [read_run(path).status for path in files] == (["partial"] * 2 if when == "running" else [])
    if when == "running":
        whole = alone(experiment, tmp_path / "alone", ("random",), (0, 1), LONG[0], "rounds=30")
        for run, rows in choices_of(root).items():  # up to where a run propagates labels, in its middle
            assert rows[:15] == whole[run][: min(15, len(rows))]


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_driver_leaves_no_worker_and_no_ray(tmp_path, cache_root):
    """But for two agents of Ray's, which do nothing, and end minutes later."""
    root = tmp_path / "swept"
    process = started(command(root, cache_root, "strategy=random", "seed=0", *LONG, "engine=ray", "jobs=1"))
    assert wait_for(lambda: in_progress(root, 1), process)
    children = [pid for pid in descendants(process.pid) if not title(pid).endswith("Agent")]
    assert any("raylet" in title(pid) for pid in children)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while alive(children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(children) == []


@pytest.mark.slow
@pytest.mark.alone
def test_a_cluster_that_nobody_has_started_is_one_line(tmp_path, cache_root):
    began = time.monotonic()
    done = finish(command(tmp_path, cache_root, "strategy=random", "engine=ray", "ray.address=127.0.0.1:1"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dgal-bench: ray.address=127.0.0.1:1: no answer")
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_two_runners_of_two_engines_share_the_runs(experiment, tmp_path, cache_root):
    root = tmp_path / "swept"
    words = command(root, cache_root, "strategy=random,dgmg", "seed=0,1", "rounds=10")
    runners = [started([*words, "engine=ray", "jobs=1"]), started([*words, "jobs=1"])]
    said = [process.communicate(timeout=240)[1] for process in runners]
    assert [process.returncode for process in runners] == [0, 0], said
    assert choices_of(root) == alone(experiment, tmp_path / "alone", ("random", "dgmg"), (0, 1), "rounds=10")
    for log in read_results(root):
        assert Counter(line["kind"] for line in log.lines) == {"header": 1, "round": 11}


@pytest.mark.slow
def test_jobs_of_a_clusters_gpu_each_have_a_process_of_their_own(tmp_path, monkeypatch):
    """CUDA, once open, sees the GPUs of that moment: a process that goes on to the next run may use another's."""

    def execute_job(*_):
        yield {"event": "ready", "process": os.getpid()}

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray_engine, "execute_job", execute_job)
    port = free_port()
    given = settings(tmp_path, jobs=None, engine="ray", ray_address=f"127.0.0.1:{port}")
    (job,) = plan_runs(axes(), given)
    with (
        head_node(port, "--num-cpus=2 --num-gpus=1"),
        closing(RayEngine([job], given, SynchronizedListener(Diary()))) as engine,
    ):
        processes = [event["process"] for _ in range(3) for event in engine.ask("run", job)]
    assert len(set(processes)) == 3


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


RAY = f"{Path(sys.executable).parent}/ray"


@contextmanager
def node(words, before=()):
    """A node of a cluster, when it has joined; ``before``: what its command is started by."""
    start = [*before, *f"{RAY} start --disable-usage-stats --block {words}".split()]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert any("Ray runtime started" in line for line in process.stdout)
            yield
        finally:
            process.terminate()


def head_node(port, has):
    return node(f"--head --port={port} --include-dashboard=false {has}")


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a second node needs a mount of its own"
)
def test_a_node_that_does_not_share_the_folders_is_one_line_before_the_first_run(tmp_path, monkeypatch):
    """Two nodes of a cluster, the second of which sees other folders under these names."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    port, results, cache, other = free_port(), tmp_path / "swept", tmp_path / "cache", tmp_path / "other"
    for folder in (results, cache, other):
        folder.mkdir()
    mounts = f'mount --bind {other} {cache} && mount --bind {other} {results} && exec "$@"'
    elsewhere = ["unshare", "-m", "sh", "-c", mounts, "sh"]
    with head_node(port, "--num-cpus=1"), node(f"--num-cpus=1 --address=127.0.0.1:{port}", elsewhere):
        words = command(results, cache, "strategy=random", "engine=ray", f"ray.address=127.0.0.1:{port}")
        done = finish(words, limit=600)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert (
        done.stderr
        == f"dgal-bench: {platform.node()} does not see the {results} and {cache} of this machine: {SHARED}\n"
    )
    assert [*results.iterdir(), *cache.iterdir(), *other.iterdir()] == []
