"""What every engine owes a sweep: the docket of its cells, and the lanes that they run on."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest

from dgal_bench.config import available_cores
from dgal_bench.engines import ENGINES, local
from dgal_bench.engines import docket as docket_room
from dgal_bench.engines.base import Teller
from dgal_bench.engines.docket import MAX_DEATHS, MAX_UNBEGUN, Docket, leave_word
from dgal_bench.engines.setup import set_up
from dgal_bench.errors import CacheError, ConfigError, DataError, ResultsError, UserError
from dgal_bench.identity import outline
from dgal_bench.laws import practice, run_here
from dgal_bench.models.ranks import Rank
from dgal_bench.process import Worker, environment
from dgal_bench.record import choice, read_cell
from dgal_bench.recorder import Recorder
from dgal_bench.request.sweeps import ENGINES as ENGINES_TO_ASK_FOR
from dgal_bench.sweep import Job, plan, scan, to_run
from dgal_bench.worker import ending
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
    return plan(axes(strategy=list(strategies)), settings(tmp_path))


def unbegun():
    return {"event": "failed", "error": "digits is missing", "exit_code": 3, "stop": False, "node": "node7"}


def died():
    return {"event": "failed", "error": "killed by signal 9", "exit_code": 1, "stop": False, "died": True}


ROUND = {"event": "round", "round": 0, "accuracy": 0.5}
DONE = {"event": "done", "seconds": 1.0}


def test_cells_come_in_order_and_each_once(tmp_path, diary):
    jobs = jobs_of(tmp_path, "random", "dgmg")
    docket = Docket(jobs, Teller(diary))
    assert [docket.take(), docket.take(), docket.take()] == [*jobs, None]
    assert not docket.over
    for job in jobs:
        docket.hear(job, DONE)
    assert docket.over
    assert diary.of("begun") == [(job.name,) for job in jobs]


def test_a_killed_worker_sends_its_cell_to_the_end_of_the_queue(tmp_path, diary):
    first, second = jobs_of(tmp_path, "random", "dgmg")
    docket = Docket([first, second], Teller(diary))
    docket.hear(docket.take(), died())
    assert [docket.take(), docket.take()] == [second, first]
    assert docket.failed == []
    assert diary.of("warn") == [(f"{first.name}: killed by signal 9; it is tried again",)]


@pytest.mark.parametrize("rows_between", [0, 1])
def test_a_cell_that_kills_its_worker_fails_unless_it_gets_further_each_time(tmp_path, diary, rows_between):
    (job,) = jobs_of(tmp_path, "random")
    docket = Docket([job], Teller(diary))
    for _ in range(MAX_DEATHS):
        assert docket.take() is job
        for _ in range(rows_between):
            docket.hear(job, ROUND)
        docket.hear(job, died())
    assert (docket.failed == [job]) == (rows_between == 0)
    log = read_cell(job.path)
    if rows_between:
        assert log is None
    else:
        assert (log.status, log.begun) == ("failed", False)
        assert log.failure["error"] == "killed by signal 9, 3 times without a row in between"
        assert log.header["cell"] == job.name


def test_a_results_folder_that_takes_no_rows_ends_the_sweep(tmp_path, diary):
    jobs = jobs_of(tmp_path, "random", "dgmg")
    docket = Docket(jobs, Teller(diary))
    docket.hear(docket.take(), {"event": "failed", "error": "no room", "exit_code": 2, "stop": True})
    assert docket.over
    assert docket.take() is None
    assert (str(docket.fatal), docket.fatal.exit_code) == ("no room", 2)


HELD = {"event": "held", "error": "held", "exit_code": 2, "stop": False}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(docket_room, "_LOOK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(docket_room, "_BEGIN_AGAIN_SECONDS", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_cell_held_elsewhere_waits_and_is_then_taken(tmp_path, diary):
    first, second = jobs_of(tmp_path, "random", "dgmg")
    docket = Docket([first, second], Teller(diary))
    with Recorder(first.path):
        docket.hear(docket.take(), HELD)
        assert docket.take() is second
        assert docket.take() is None
        docket.hear(second, DONE)
        assert not docket.over
    assert docket.take() is first
    assert "waiting for cells that process" in diary.of("warn")[0][0]


def test_a_holder_without_a_heartbeat_is_not_asked_all_the_time(tmp_path, diary):
    """A process that was stopped keeps its lock: to try and be refused for as long would take a core."""
    (job,) = jobs_of(tmp_path, "random")
    docket = Docket([job], Teller(diary))
    docket.hear(docket.take(), HELD)
    assert (docket.take(), docket.over) == (None, False)
    assert diary.of("warn") == [("held",)]


@pytest.mark.parametrize("end", ["done", "failed", "skipped"])
def test_what_another_runner_has_ended_meanwhile_is_over(lab, tmp_path, diary, end):
    config, path = practice("random", "rounds=1"), tmp_path / "random" / "seed-0.jsonl"
    job = Job(config, path)
    docket = Docket([job], Teller(diary))
    if end == "done":
        run_here(lab, path, config)
    else:
        with Recorder(path) as recorder:
            recorder.write_header(outline(config, job.name))
            getattr(recorder, f"write_{'failure' if end == 'failed' else end}")(
                *["diverged", ""][: 1 + (end == "failed")]
            )
    assert (docket.take(), docket.over) == (None, True)
    assert len(diary.of(end)) == 1
    assert docket.failed == ([job] if end == "failed" else [])


def test_a_failure_of_before_is_tried_when_it_is_on_the_list(tmp_path, diary):
    (job,) = jobs_of(tmp_path, "random")
    leave_word(job, "diverged")
    assert Docket([job], Teller(diary)).take() is job


@pytest.mark.usefixtures("impatient")
def test_a_failure_is_written_once_the_dead_workers_lease_is_over(tmp_path, diary):
    """On another host a worker's death is known only when its heartbeat has been missed."""
    (job,) = jobs_of(tmp_path, "random")
    docket = Docket([job], Teller(diary))
    with Recorder(job.path):  # stands for the lease
        for _ in range(MAX_DEATHS):
            assert docket.take() is job
            docket.hear(job, died())
        assert (docket.take(), docket.over, docket.failed) == (None, False, [])
    assert (docket.take(), docket.over, docket.failed) == (None, True, [job])
    assert read_cell(job.path).failure["error"].startswith("killed by signal 9, 3 times")


@pytest.mark.parametrize("facts", [{"recorded": True}, {"refused": True}])
def test_a_failure_that_its_worker_has_written_or_may_not_write_is_not_written_again(tmp_path, diary, facts):
    (job,) = jobs_of(tmp_path, "random")
    docket = Docket([job], Teller(diary))
    docket.hear(docket.take(), {"event": "failed", "error": "no", "exit_code": 1, "stop": False, **facts})
    assert (docket.failed, docket.over) == ([job], True)
    assert read_cell(job.path) is None


def test_a_node_that_cannot_begin_cells_ends_the_sweep_and_fails_none(tmp_path, diary):
    """It would have eaten the queue in seconds: data missing there, or another version installed."""
    jobs = jobs_of(tmp_path, "random", "dgmg", "margin", "rsmg")
    docket = Docket(jobs, Teller(diary))
    docket.take()  # on another node, for an hour
    for _ in range(MAX_UNBEGUN):
        assert not docket.over
        docket.hear(docket.take(), unbegun())
    assert (docket.over, docket.failed) == (True, [])
    assert str(docket.fatal) == "3 tries in a row could not begin their cells: digits is missing (on node7)"
    assert docket.fatal.exit_code == 3
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("rows", [0, 1])
def test_one_cell_that_cannot_begin_there_ends_nothing_while_others_run(tmp_path, diary, rows):
    first, second = jobs_of(tmp_path, "random", "dgmg")
    docket = Docket([first, second], Teller(diary))
    assert docket.take() is first
    for _ in range(2 * MAX_UNBEGUN):
        docket.hear(docket.take(), unbegun())
        for _ in range(rows):
            docket.hear(first, ROUND)
    assert diary.of("warn") == [(f"{second.name}: digits is missing (on node7); it is tried again",)]
    docket.hear(first, DONE)
    for _ in range(MAX_UNBEGUN if rows else 1):
        assert docket.fatal is None
        assert docket.take() is second
        docket.hear(second, unbegun())
    assert (docket.over, docket.failed) == (True, [])


def test_a_cell_that_could_not_begin_waits(tmp_path, diary):
    """A node that fails at once would take it again at once."""
    (job,) = jobs_of(tmp_path, "random")
    docket = Docket([job], Teller(diary))
    docket.hear(docket.take(), unbegun())
    assert (docket.take(), docket.over) == (None, False)


@pytest.mark.parametrize(
    ("error", "refused", "stop"),
    [
        (CacheError("its disk is full"), False, True),
        (ResultsError("other rows"), True, True),
        (DataError("x"), False, True),
        (ValueError("x"), False, False),
    ],
)
def test_what_is_wrong_with_a_node_is_not_refused_by_the_cell(error, refused, stop):
    of_a_cell, of_a_set_up = (ending(error, kind) for kind in ("cell", "setup"))
    assert (of_a_cell["refused"], of_a_cell["stop"], of_a_set_up["stop"]) == (refused, False, stop)
    assert of_a_cell["node"]


def test_a_file_that_was_damaged_meanwhile_costs_its_own_cell(tmp_path, diary):
    first, second = jobs_of(tmp_path, "random", "dgmg")
    docket = Docket([first, second], Teller(diary))
    first.path.parent.mkdir(parents=True)
    first.path.write_text("no line of ours\nand another\n")
    assert docket.take() is second
    assert docket.failed == [first]
    assert str(first.path) in diary.of("failed")[0][1]


def test_cells_that_were_not_begun_come_again_first_and_dropped_ones_never(tmp_path, diary):
    jobs = jobs_of(tmp_path, "random", "dgmg", "margin", "rsmg")
    docket = Docket(jobs, Teller(diary))
    docket.put_back([docket.take(), docket.take()])
    assert len(docket) == 4
    docket.drop(jobs[1:3])
    assert [docket.take(), docket.take(), docket.take()] == [jobs[0], jobs[3], None]


def test_a_skipped_cell_is_no_failure(tmp_path, diary):
    (job,) = jobs_of(tmp_path, "ganvae")
    docket = Docket([job], Teller(diary))
    docket.hear(docket.take(), {"event": "skipped", "error": "embeddings", "exit_code": 2, "stop": False})
    assert (docket.over, docket.failed) == (True, [])
    assert diary.of("skipped") == [(job.name, "embeddings")]


class Broken:
    """An engine on which one representation collapses."""

    def ask(self, kind, job):
        ready = job.config.graph.graph_k == 5
        yield {"event": "ready", "points": 1437} if ready else {
            "event": "failed", "error": "collapsed", "exit_code": 2, "stop": False,
        }  # fmt: skip


def test_cells_whose_set_up_broke_say_so_in_their_files(tmp_path, diary):
    jobs = plan(axes(strategy=["dgmg"], graph__graph_k=["5", "10"]), settings(tmp_path))
    assert set_up(jobs, Broken(), Teller(diary)) == [jobs[1]]
    assert diary.of("failed") == [(jobs[1].name, "collapsed")]
    assert (read_cell(jobs[1].path).status, read_cell(jobs[0].path)) == ("failed", None)
    with pytest.raises(UserError, match="collapsed"):
        set_up(jobs[1:], Broken(), Teller(diary))


def test_what_failed_or_was_skipped_is_tried_again_when_asked_for(lab, tmp_path):
    where = settings(tmp_path)
    jobs = jobs_of(tmp_path, "random", "dgmg", "margin", "rsmg")
    config = practice("random")
    cells = [Job(config, job.path) for job in jobs]
    run_here(lab, cells[0].path, config)
    for job, end in ((cells[1], "write_failure"), (cells[2], "write_skipped")):
        with Recorder(job.path) as recorder:
            recorder.write_header(read_cell(cells[0].path).header)
            getattr(recorder, end)(*(["diverged", ""] if end == "write_failure" else ["not for these"]))
    logs = scan(cells, where)
    assert [None if log is None else log.status for log in logs.values()] == ["done", "failed", "skipped", None]
    for retry, due in (((), [3]), (("failed",), [1, 3]), (("failed", "skipped"), [1, 2, 3])):
        assert to_run(cells, logs, replace(where, retry=retry)) == [cells[i] for i in due]


def test_a_failure_of_another_configuration_is_none_of_this_cell(lab, tmp_path):
    """It has no row that could be mixed with another's; a row would be refused."""
    old, new = practice("random"), practice("random", "rounds=3")
    path = tmp_path / "random" / "seed-0.jsonl"
    with Recorder(path) as recorder:
        recorder.write_header(outline(old, "digits/random/seed-0"))
        recorder.write_failure("diverged", "")
    assert scan([Job(new, path)], settings(tmp_path)) == {path: None}
    alone = run_here(lab, tmp_path / "alone" / "seed-0.jsonl", new)
    assert list(map(choice, run_here(lab, path, new))) == list(map(choice, alone))


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
        (8, {}, 1, "cpu", available_cores()),  # cells that use none
    ],
)
def test_lanes(tmp_path, here, changes, threads, device, expected):
    config = replace(practice("random"), threads=threads, device=device)
    where = settings(tmp_path, **{"jobs": None, **changes})
    assert local.lanes([Job(config, Path("x"))], where, here) == expected


def test_a_cell_cannot_have_more_gpus_than_there_are(tmp_path):
    with pytest.raises(ConfigError, match="gpus_per_cell=2, but there are 1 GPUs to use"):
        local.lanes([Job(practice("random"), Path("x"))], settings(tmp_path, jobs=None, gpus=1, gpus_per_cell=2), 8)


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
    assert local.dealt(gpus, settings(tmp_path, **changes), 3) == expected


@pytest.mark.parametrize(("devices", "expected"), [(1, "3"), (2, "3,5"), (9, "3,5,7")])
def test_a_set_up_on_several_gpus_sees_as_many(tmp_path, devices, expected):
    """As far as there are: more is its own error."""
    assert local.dealt(["3", "5", "7"], settings(tmp_path), 1, at_least=devices) == [expected]


def test_gpus_are_dealt_round_robin(tmp_path, monkeypatch):
    asked = []

    class Idle:
        pid = 0

        def __init__(self, environment):
            asked.append(environment.get("CUDA_VISIBLE_DEVICES"))

        def close(self):
            pass

    monkeypatch.setattr(local, "visible_gpus", lambda: ["3", "5", "7"])
    monkeypatch.setattr(local, "Worker", Idle)
    jobs = [Job(practice("random", f"seed={seed}"), Path(str(seed))) for seed in range(5)]
    local.Local(jobs, settings(tmp_path, jobs=5, gpus=2), Teller(Diary())).close()
    assert asked == ["3", "5", "3", "5", "3"]
    with pytest.raises(ConfigError, match="gpus=4, but this machine has 3"):
        local.Local(jobs, settings(tmp_path, gpus=4), Teller(Diary()))


def test_the_environment_gives_threads_and_one_gpu():
    config = replace(practice("random"), threads=3)
    assert environment(config)["OMP_NUM_THREADS"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in environment(config)
    assert environment(config, "5")["CUDA_VISIBLE_DEVICES"] == "5"
    assert environment(replace(config, device="cpu"), "5")["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_threads_of_every_process_that_works_sleep_while_they_wait(own, tmp_path, monkeypatch):
    """Unless the user says otherwise: the command's, on a node of a cluster, and whoever starts it here."""
    wanted, seen, popen = own or "PASSIVE", [], subprocess.Popen

    def start(words, **how):
        seen.append(how["env"])
        return popen(["true"], **how)

    monkeypatch.delenv("OMP_WAIT_POLICY")
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    say = "import os, dgal_bench; print(os.environ['OMP_WAIT_POLICY'])"
    assert subprocess.check_output([sys.executable, "-c", say], text=True) == f"{wanted}\n"
    asked = environment(practice("random"))
    assert asked["OMP_WAIT_POLICY"] == wanted
    monkeypatch.setattr(subprocess, "Popen", start)
    Worker(asked).close()
    Rank(tmp_path, 0, 2, 1, SimpleQueue()).end()
    assert [one["OMP_WAIT_POLICY"] for one in seen] == [wanted, wanted]
