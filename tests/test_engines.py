"""What every engine owes a sweep: the run queue of its runs, and the lanes that they run on."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dgal_bench.config.schema import available_cores
from dgal_bench.conformance import example_config, run_in_process
from dgal_bench.core.errors import CacheError, ConfigError, DataError, ResultsError, UserError
from dgal_bench.core.fork_server import ForkServer
from dgal_bench.engines import ENGINES, local
from dgal_bench.engines import ENGINES as ENGINES_TO_ASK_FOR
from dgal_bench.engines import queue as run_queue_room
from dgal_bench.engines.base import SynchronizedListener
from dgal_bench.engines.process import ForkServers, worker_environment
from dgal_bench.engines.queue import MAX_DEATHS, MAX_START_FAILURES, RunQueue, record_failure
from dgal_bench.engines.setup import set_up
from dgal_bench.engines.sweep import PlannedRun, plan_runs, read_logs, runs_to_do
from dgal_bench.engines.worker import final_event
from dgal_bench.models.trainer import spawning
from dgal_bench.results.reader import read_run
from dgal_bench.results.resume import header_outline
from dgal_bench.results.rows import choice
from dgal_bench.results.writer import FileWriter
from tests.test_cli import axes, settings


class Diary:
    """A listener that remembers."""

    def __init__(self):
        self.entries = []

    def __getattr__(self, what):
        return lambda *facts: self.entries.append((what, *(getattr(fact, "name", fact) for fact in facts)))

    def of(self, what):
        return [entry[1:] for entry in self.entries if entry[0] == what]


@pytest.fixture
def diary():
    return Diary()


def jobs_of(tmp_path, *strategies):
    return plan_runs(axes(strategy=list(strategies)), settings(tmp_path))


def unbegun():
    return {"event": "failed", "error": "digits is missing", "exit_code": 3, "stop": False, "node": "node7"}


def died():
    return {"event": "failed", "error": "killed by signal 9", "exit_code": 1, "stop": False, "died": True}


ROUND = {"event": "round", "round": 0, "accuracy": 0.5}
DONE = {"event": "done", "seconds": 1.0}


def test_runs_come_in_order_and_each_once(tmp_path, diary):
    jobs = jobs_of(tmp_path, "random", "dgmg")
    run_queue = RunQueue(jobs, SynchronizedListener(diary))
    assert [run_queue.take(), run_queue.take(), run_queue.take()] == [*jobs, None]
    assert not run_queue.over
    for job in jobs:
        run_queue.on_event(job, DONE)
    assert run_queue.over
    assert diary.of("begun") == [(job.name,) for job in jobs]


def test_a_killed_worker_sends_its_run_to_the_end_of_the_queue(tmp_path, diary):
    first, second = jobs_of(tmp_path, "random", "dgmg")
    run_queue = RunQueue([first, second], SynchronizedListener(diary))
    run_queue.on_event(run_queue.take(), died())
    assert [run_queue.take(), run_queue.take()] == [second, first]
    assert run_queue.failed == []
    assert diary.of("warn") == [(f"{first.name}: killed by signal 9; it is tried again",)]


@pytest.mark.parametrize("rows_between", [0, 1])
def test_a_run_that_kills_its_worker_fails_unless_it_gets_further_each_time(tmp_path, diary, rows_between):
    (job,) = jobs_of(tmp_path, "random")
    run_queue = RunQueue([job], SynchronizedListener(diary))
    for _ in range(MAX_DEATHS):
        assert run_queue.take() is job
        for _ in range(rows_between):
            run_queue.on_event(job, ROUND)
        run_queue.on_event(job, died())
    assert (run_queue.failed == [job]) == (rows_between == 0)
    log = read_run(job.path)
    if rows_between:
        assert log is None
    else:
        assert (log.status, log.begun) == ("failed", False)
        assert log.failure["error"] == "killed by signal 9, 3 times without a row in between"
        assert log.header["cell"] == job.name


def test_a_results_folder_that_takes_no_rows_ends_the_sweep(tmp_path, diary):
    jobs = jobs_of(tmp_path, "random", "dgmg")
    run_queue = RunQueue(jobs, SynchronizedListener(diary))
    run_queue.on_event(run_queue.take(), {"event": "failed", "error": "no room", "exit_code": 2, "stop": True})
    assert run_queue.over
    assert run_queue.take() is None
    assert (str(run_queue.fatal), run_queue.fatal.exit_code) == ("no room", 2)


HELD = {"event": "held", "error": "held", "exit_code": 2, "stop": False}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_queue_room, "_LOOK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(run_queue_room, "_START_AGAIN_SECONDS", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_run_held_elsewhere_waits_and_is_then_taken(tmp_path, diary):
    first, second = jobs_of(tmp_path, "random", "dgmg")
    run_queue = RunQueue([first, second], SynchronizedListener(diary))
    with FileWriter(first.path):
        run_queue.on_event(run_queue.take(), HELD)
        assert run_queue.take() is second
        assert run_queue.take() is None
        run_queue.on_event(second, DONE)
        assert not run_queue.over
    assert run_queue.take() is first
    assert "waiting for runs that process" in diary.of("warn")[0][0]


def test_a_holder_without_a_heartbeat_is_not_asked_all_the_time(tmp_path, diary):
    """A process that was stopped keeps its lock: to try and be refused for as long would take a core."""
    (job,) = jobs_of(tmp_path, "random")
    run_queue = RunQueue([job], SynchronizedListener(diary))
    run_queue.on_event(run_queue.take(), HELD)
    assert (run_queue.take(), run_queue.over) == (None, False)
    assert diary.of("warn") == [("held",)]


@pytest.mark.parametrize("end", ["done", "failed", "skipped"])
def test_what_another_runner_has_ended_meanwhile_is_over(experiment, tmp_path, diary, end):
    config, path = example_config("random", "rounds=1"), tmp_path / "random" / "seed-0.jsonl"
    job = PlannedRun(config, path)
    run_queue = RunQueue([job], SynchronizedListener(diary))
    if end == "done":
        run_in_process(experiment, path, config)
    else:
        with FileWriter(path) as writer:
            writer.write_header(header_outline(config, job.name))
            getattr(writer, f"write_{'failure' if end == 'failed' else end}")(
                *["diverged", ""][: 1 + (end == "failed")]
            )
    assert (run_queue.take(), run_queue.over) == (None, True)
    assert len(diary.of(end)) == 1
    assert run_queue.failed == ([job] if end == "failed" else [])


def test_a_failure_of_before_is_tried_when_it_is_on_the_list(tmp_path, diary):
    (job,) = jobs_of(tmp_path, "random")
    record_failure(job, "diverged")
    assert RunQueue([job], SynchronizedListener(diary)).take() is job


@pytest.mark.usefixtures("impatient")
def test_a_failure_is_written_once_the_dead_workers_lock_is_free(tmp_path, diary):
    (job,) = jobs_of(tmp_path, "random")
    run_queue = RunQueue([job], SynchronizedListener(diary))
    with FileWriter(job.path):  # stands for the worker
        for _ in range(MAX_DEATHS):
            assert run_queue.take() is job
            run_queue.on_event(job, died())
        assert (run_queue.take(), run_queue.over, run_queue.failed) == (None, False, [])
    assert (run_queue.take(), run_queue.over, run_queue.failed) == (None, True, [job])
    assert read_run(job.path).failure["error"].startswith("killed by signal 9, 3 times")


@pytest.mark.parametrize("facts", [{"recorded": True}, {"refused": True}])
def test_a_failure_that_its_worker_has_written_or_may_not_write_is_not_written_again(tmp_path, diary, facts):
    (job,) = jobs_of(tmp_path, "random")
    run_queue = RunQueue([job], SynchronizedListener(diary))
    run_queue.on_event(run_queue.take(), {"event": "failed", "error": "no", "exit_code": 1, "stop": False, **facts})
    assert (run_queue.failed, run_queue.over) == ([job], True)
    assert read_run(job.path) is None


def test_a_node_that_cannot_begin_runs_ends_the_sweep_and_fails_none(tmp_path, diary):
    """It would have eaten the queue in seconds: data missing there, or another version installed."""
    jobs = jobs_of(tmp_path, "random", "dgmg", "margin", "rsmg")
    run_queue = RunQueue(jobs, SynchronizedListener(diary))
    run_queue.take()  # on another node, for an hour
    for _ in range(MAX_START_FAILURES):
        assert not run_queue.over
        run_queue.on_event(run_queue.take(), unbegun())
    assert (run_queue.over, run_queue.failed) == (True, [])
    assert str(run_queue.fatal) == "3 attempts in a row could not start a run: digits is missing (on node7)"
    assert run_queue.fatal.exit_code == 3
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("rows", [0, 1])
def test_one_run_that_cannot_begin_there_ends_nothing_while_others_run(tmp_path, diary, rows):
    first, second = jobs_of(tmp_path, "random", "dgmg")
    run_queue = RunQueue([first, second], SynchronizedListener(diary))
    assert run_queue.take() is first
    for _ in range(2 * MAX_START_FAILURES):
        run_queue.on_event(run_queue.take(), unbegun())
        for _ in range(rows):
            run_queue.on_event(first, ROUND)
    assert diary.of("warn") == [(f"{second.name}: digits is missing (on node7); it is tried again",)]
    run_queue.on_event(first, DONE)
    for _ in range(MAX_START_FAILURES if rows else 1):
        assert run_queue.fatal is None
        assert run_queue.take() is second
        run_queue.on_event(second, unbegun())
    assert (run_queue.over, run_queue.failed) == (True, [])


def test_a_run_that_could_not_begin_waits(tmp_path, diary):
    """A node that fails at once would take it again at once."""
    (job,) = jobs_of(tmp_path, "random")
    run_queue = RunQueue([job], SynchronizedListener(diary))
    run_queue.on_event(run_queue.take(), unbegun())
    assert (run_queue.take(), run_queue.over) == (None, False)


@pytest.mark.parametrize(
    ("error", "refused", "stop"),
    [
        (CacheError("its disk is full"), False, True),
        (ResultsError("other rows"), True, True),
        (DataError("x"), False, True),
        (ValueError("x"), False, False),
    ],
)
def test_what_is_wrong_with_a_node_is_not_refused_by_the_run(error, refused, stop):
    of_a_run, of_a_set_up = (final_event(error, kind) for kind in ("run", "setup"))
    assert (of_a_run["refused"], of_a_run["stop"], of_a_set_up["stop"]) == (refused, False, stop)
    assert of_a_run["node"]


def test_a_file_that_was_damaged_meanwhile_costs_its_own_run(tmp_path, diary):
    first, second = jobs_of(tmp_path, "random", "dgmg")
    run_queue = RunQueue([first, second], SynchronizedListener(diary))
    first.path.parent.mkdir(parents=True)
    first.path.write_text("no line of ours\nand another\n")
    assert run_queue.take() is second
    assert run_queue.failed == [first]
    assert str(first.path) in diary.of("failed")[0][1]


def test_runs_that_were_not_begun_come_again_first_and_dropped_ones_never(tmp_path, diary):
    jobs = jobs_of(tmp_path, "random", "dgmg", "margin", "rsmg")
    run_queue = RunQueue(jobs, SynchronizedListener(diary))
    run_queue.put_back([run_queue.take(), run_queue.take()])
    assert len(run_queue) == 4
    run_queue.drop(jobs[1:3])
    assert [run_queue.take(), run_queue.take(), run_queue.take()] == [jobs[0], jobs[3], None]


def test_a_skipped_run_is_no_failure(tmp_path, diary):
    (job,) = jobs_of(tmp_path, "ganvae")
    run_queue = RunQueue([job], SynchronizedListener(diary))
    run_queue.on_event(run_queue.take(), {"event": "skipped", "error": "embeddings", "exit_code": 2, "stop": False})
    assert (run_queue.over, run_queue.failed) == (True, [])
    assert diary.of("skipped") == [(job.name, "embeddings")]


class Broken:
    """An engine on which one representation collapses."""

    def ask(self, kind, job):
        ready = job.config.graph.graph_k == 5
        yield {"event": "ready", "points": 1437} if ready else {
            "event": "failed", "error": "collapsed", "exit_code": 2, "stop": False,
        }  # fmt: skip


def test_runs_whose_set_up_broke_say_so_in_their_files(tmp_path, diary):
    jobs = plan_runs(axes(strategy=["dgmg"], graph__graph_k=["5", "10"]), settings(tmp_path))
    assert set_up(jobs, Broken(), SynchronizedListener(diary)) == [jobs[1]]
    assert diary.of("failed") == [(jobs[1].name, "collapsed")]
    assert (read_run(jobs[1].path).status, read_run(jobs[0].path)) == ("failed", None)
    with pytest.raises(UserError, match="collapsed"):
        set_up(jobs[1:], Broken(), SynchronizedListener(diary))


def test_what_failed_or_was_skipped_is_tried_again_when_asked_for(experiment, tmp_path):
    where = settings(tmp_path)
    jobs = jobs_of(tmp_path, "random", "dgmg", "margin", "rsmg")
    config = example_config("random")
    runs = [PlannedRun(config, job.path) for job in jobs]
    run_in_process(experiment, runs[0].path, config)
    for job, end in ((runs[1], "write_failure"), (runs[2], "write_skipped")):
        with FileWriter(job.path) as writer:
            writer.write_header(read_run(runs[0].path).header)
            getattr(writer, end)(*(["diverged", ""] if end == "write_failure" else ["not for these"]))
    logs = read_logs(runs, where)
    assert [None if log is None else log.status for log in logs.values()] == ["done", "failed", "skipped", None]
    for retry, due in (((), [3]), (("failed",), [1, 3]), (("failed", "skipped"), [1, 2, 3])):
        assert runs_to_do(runs, logs, replace(where, retry=retry)) == [runs[i] for i in due]


def test_a_failure_of_another_configuration_is_none_of_this_run(experiment, tmp_path):
    """It has no row that could be mixed with another's; a row would be refused."""
    old, new = example_config("random"), example_config("random", "rounds=3")
    path = tmp_path / "random" / "seed-0.jsonl"
    with FileWriter(path) as writer:
        writer.write_header(header_outline(old, "digits/random/seed-0"))
        writer.write_failure("diverged", "")
    assert read_logs([PlannedRun(new, path)], settings(tmp_path)) == {path: None}
    alone = run_in_process(experiment, tmp_path / "alone" / "seed-0.jsonl", new)
    assert list(map(choice, run_in_process(experiment, path, new))) == list(map(choice, alone))


def test_engines_may_be_asked_for_by_name():
    assert ENGINES_TO_ASK_FOR is ENGINES
    assert set(ENGINES) == {"local", "ray", "slurm"}


@pytest.mark.parametrize(
    ("here", "changes", "threads", "device", "expected"),
    [
        (0, {}, 1, "auto", available_cores()),  # no GPU: the cores
        (0, {}, 10_000, "auto", 1),  # never none
        (0, {"jobs": 7}, 1, "auto", 7),  # what was asked for
        (1, {}, 1, "auto", 1),  # a GPU each
        (8, {"gpus": 8}, 1, "auto", 8),  # asked for: whatever the cores
        (8, {"gpus": 2, "gpus_per_cell": 0.5}, 1, "auto", 4),
        (3, {"gpus": 3, "gpus_per_cell": 1 / 3}, 1, "auto", 9),
        (4, {"gpus": 4, "gpus_per_cell": 2}, 1, "auto", 2),
        (8, {"gpus": 0}, 1, "auto", available_cores()),  # they are to be left alone
        (8, {"gpus": 2, "jobs": 5}, 1, "auto", 5),  # jobs decides
        (8, {}, 1, "cpu", available_cores()),  # runs that use none
    ],
)
def test_lanes(tmp_path, here, changes, threads, device, expected):
    config = replace(example_config("random"), threads=threads, device=device)
    where = settings(tmp_path, **{"jobs": None, **changes})
    assert local.count_lanes([PlannedRun(config, Path("x"))], where, here) == expected


def test_a_run_cannot_have_more_gpus_than_there_are(tmp_path):
    with pytest.raises(ConfigError, match="gpus_per_cell=2, but there are 1 GPUs to use"):
        local.count_lanes(
            [PlannedRun(example_config("random"), Path("x"))], settings(tmp_path, jobs=None, gpus=1, gpus_per_cell=2), 8
        )


@pytest.mark.parametrize(
    ("gpus", "changes", "expected"),
    [
        (["3", "5"], {}, ["3", "5", "3"]),
        (["3", "5"], {"gpus_per_cell": 0.5}, ["3", "5", "3"]),
        (["0", "1", "2", "3", "4"], {"gpus_per_cell": 2}, ["0,1", "2,3", "0,1"]),
        ([], {}, [None] * 3),
        ([], {"gpus": 0}, [""] * 3),  # hidden, though the machine has some
    ],
)
def test_what_a_lane_sees_of_the_gpus(tmp_path, gpus, changes, expected):
    assert local.assign_gpus(gpus, settings(tmp_path, **changes), 3) == expected


@pytest.mark.parametrize(("devices", "expected"), [(1, "3"), (2, "3,5"), (9, "3,5,7")])
def test_a_set_up_on_several_gpus_sees_as_many(tmp_path, devices, expected):
    """As far as there are: more is its own error."""
    assert local.assign_gpus(["3", "5", "7"], settings(tmp_path), 1, at_least=devices) == [expected]


def test_gpus_are_dealt_round_robin(tmp_path, monkeypatch):
    asked, together = [], threading.Barrier(5)

    class Idle:
        def __init__(self, environment):
            asked.append(environment.get("CUDA_VISIBLE_DEVICES"))

        def run(self, job):
            together.wait()
            yield {"event": "done", "seconds": 0.0}

    monkeypatch.setattr(local, "visible_gpus", lambda: ["3", "5", "7"])
    monkeypatch.setattr(ForkServers, "fit", lambda servers, worker, environment: Idle(environment))
    jobs = [PlannedRun(example_config("random", f"seed={seed}"), tmp_path / str(seed)) for seed in range(5)]
    notify = SynchronizedListener(Diary())
    local.LocalEngine(jobs, settings(tmp_path, jobs=5, gpus=2), notify).run(RunQueue(jobs, notify))
    assert sorted(asked) == ["3", "3", "3", "5", "5"]
    with pytest.raises(ConfigError, match="gpus=4, but this machine has 3"):
        local.LocalEngine(jobs, settings(tmp_path, gpus=4), SynchronizedListener(Diary()))


def test_the_environment_gives_threads_and_one_gpu():
    config = replace(example_config("random"), threads=3)
    assert worker_environment(config)["OMP_NUM_THREADS"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(config)
    assert worker_environment(config, "5")["CUDA_VISIBLE_DEVICES"] == "5"
    assert worker_environment(replace(config, device="cpu"), "5")["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_threads_of_every_process_that_works_sleep_while_they_wait(own, monkeypatch):
    """Unless the user says otherwise: the command's, on a node of a cluster, and whoever starts it here."""
    wanted, seen, popen = own or "PASSIVE", [], subprocess.Popen

    def start(words, **how):
        seen.append(how["env"])
        return popen(["true"], **how)

    monkeypatch.delenv("OMP_WAIT_POLICY")
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    say = "import os; from dgal_bench.cli.main import main; main(['--version']); print(os.environ['OMP_WAIT_POLICY'])"
    assert subprocess.check_output([sys.executable, "-c", say], text=True).splitlines()[-1] == wanted
    asked = worker_environment(example_config("random"))
    assert asked["OMP_WAIT_POLICY"] == wanted
    monkeypatch.setattr(subprocess, "Popen", start)
    ForkServer(asked).close()
    with spawning(2, print):
        seen.append(dict(os.environ))
    assert [one["OMP_WAIT_POLICY"] for one in seen] == [wanted, wanted]
