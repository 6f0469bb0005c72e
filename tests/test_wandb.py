"""What W&B is told is what the result files say: read back with wandb's own reader, and from a server of our own."""

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from wandb.util import get_core_path

from dgal_bench.cli.main import main
from dgal_bench.cli.options import parse_arguments, tracking_of, wandb_of
from dgal_bench.core.errors import ConfigError
from dgal_bench.results import metrics as areas
from dgal_bench.results import wandb as facts
from dgal_bench.results import wandb_process as driver
from dgal_bench.results.reader import read_results, read_run
from dgal_bench.results.rows import RoundRecord
from dgal_bench.results.wandb import MARKER, FolderLock, RunFolders
from dgal_bench.results.wandb_follow import FileMirror
from dgal_bench.results.wandb_process import Tracking
from tests.sweeping import HERE, command, descendants, finish, is_alive, listing, texts_of
from tests.wandb_server import KEY, serving

GOLDEN = HERE / "tests" / "golden" / "schema-2" / "golden"
RUN = GOLDEN / "digits" / "dgmg" / "seed-0.jsonl"

OFFLINE = {
    "DGAL_OFFLINE": "true", "WANDB_API_KEY": "", "WANDB_MODE": "offline",
    "WANDB_PROJECT": "", "WANDB_ENTITY": "", "WANDB_DIR": "", "WANDB_ERROR_REPORTING": "false",
}  # fmt: skip


def row(round_, accuracy, seconds=None):
    return RoundRecord(
        round_, 10 + 5 * round_, accuracy, False, 30, 0.5, 0.9, 2.0, 0.1, 1, 1, 0.5, query_seconds=seconds,
        seconds=None if seconds is None else {"diffuse": seconds}, n_scored=None if seconds is None else 20,
        propagated={"accuracy": 0.5}, extra={"odd <b>key</b>": 3.0},
    )  # fmt: skip


THREE = (row(0, 0.2, 1.0), row(1, 0.4, 3.0), row(2, 0.6))


def run(records=THREE, failure=None, path=RUN, **header):
    log = read_run(RUN)
    changed = {**log.header, "config": {**log.header["config"], "rounds": 2}, **header}
    lines = (changed, *({"kind": "round", **asdict(record)} for record in records))
    return replace(log, header=changed, records=tuple(records), failure=failure, path=path, lines=lines)


def test_a_row_stands_on_our_axes_and_query_time_is_that_of_the_rows_before():
    rows = facts.logged_rows(run())
    assert [(r["round"], r["labels"], r["query_seconds"]) for r in rows] == [(0, 10, 0.0), (1, 15, 1.0), (2, 20, 4.0)]
    assert [r["accuracy/by_labels"] for r in rows] == [r["accuracy/by_query_seconds"] for r in rows] == [0.2, 0.4, 0.6]
    assert rows[1]["query/phase/diffuse"] == rows[1]["query/seconds"] == 3.0
    assert rows[0]["extra/odd <b>key</b>"] == 3.0
    assert rows[0]["propagated/accuracy"] == 0.5
    assert "query/seconds" not in rows[2]


def test_every_number_of_a_row_has_a_name_on_an_axis():
    globs = tuple(name.removesuffix("*") for name, _ in facts.DEFINITIONS)
    for told in facts.logged_rows(read_run(RUN)):
        assert [name for name in told if name not in facts.AXES and not name.startswith(globs)] == []
        assert all(isinstance(value, int | float) for value in told.values())


def test_the_summary_is_the_reports_statistics():
    log = run()
    told = facts.run_summary(log)
    assert told["status"] == "done"
    assert told["rows"] == 3
    assert told["final_accuracy"] == 0.6
    assert told["area"] == areas.area_under_curve(log.records) == pytest.approx(0.4)
    assert told["mean_query_seconds"] == 2.0
    assert told["mean_points_scored"] == 20
    assert told["graph/components"] == log.header["setup"]["graph"]["components"]
    assert told["setup/graph_seconds"] == log.header["setup"]["graph"]["seconds"]


def test_a_run_of_one_row_or_of_none_has_neither_area_nor_mean():
    one = facts.run_summary(run([row(0, 0.9)], config={**read_run(RUN).header["config"], "rounds": 0}))
    assert (one["status"], one["final_accuracy"], one["rows"]) == ("done", 0.9, 1)
    assert not {"area", "mean_query_seconds"} & one.keys()
    assert facts.logged_rows(run([])) == []
    assert "final_accuracy" not in facts.run_summary(run([]))


def test_a_failed_run_says_why():
    log = run(THREE[:2], failure={"kind": "failure", "error": "out of memory"})
    told = facts.run_summary(log)
    assert (told["status"], told["error"], told["rows"]) == ("failed", "out of memory", 2)
    assert [facts.EXIT_CODES[status] for status in ("done", "skipped", "failed", "partial")] == [0, 0, 1, 255]


def test_the_id_is_of_what_a_result_is_about():
    log = run()
    first = facts.run_names(log)
    assert facts.run_names(run(THREE[:1], provenance={})) == first
    assert (first.group, first.name) == ("digits/dgmg", "dgmg/seed-0")
    assert first.tags == ["golden", "digits", "smoke", "dgmg", f"algorithm-{first.algorithm_version}"]
    said = log.header["fingerprint"]
    others = [
        run(cell="digits/dgmg/seed-1"),
        run(fingerprint=said | {"config": "0" * 64}),
        run(fingerprint=said | {"data": "0" * 64}),
        run(fingerprint=said | {"algorithm_version": 99}),
        run(initial=[1, 2, 3]),
        run(path=Path("elsewhere") / "another" / Path(*RUN.parts[-3:])),
    ]
    ids = {facts.run_names(other).id for other in others}
    assert len(ids) == len(others)
    assert first.id not in ids


def test_odd_names_are_kept_and_tags_cut_to_what_w_and_b_takes():
    label = "dgmg+strategy.restrict.score=<margin>&" + "x" * 80
    told = facts.run_names(run(cell=f"my \u00e4 & <b>data</b>/{label}/seed-0"))
    assert told.group == f"my \u00e4 & <b>data</b>/{label}"
    assert max(len(tag) for tag in told.tags) == 64


def test_the_configuration_is_the_resolved_one_and_what_runs_are_grouped_by():
    log = read_run(RUN)
    told = facts.run_config(log)
    assert {key: told[key] for key in log.header["config"]} == log.header["config"]
    assert (told["suite"], told["dataset_name"], told["strategy_name"]) == ("golden", "digits", "dgmg")
    assert (told["cell"], told["fingerprint"]) == (log.header["cell"], log.header["fingerprint"])


def test_digests_tell_what_differs():
    assert facts.mirror_digest(run()) == facts.mirror_digest(run())
    assert facts.mirror_digest(run()) != facts.mirror_digest(run(THREE[:2]))
    assert facts.rows_digest(run(), 2) == facts.rows_digest(run(THREE[:2]), 2)
    again = (replace(THREE[0], query_seconds=1.5), *THREE[1:])
    assert facts.rows_digest(run(), 2) != facts.rows_digest(run(again), 2)


def test_digests_are_of_the_file_and_not_of_what_this_version_reads_into_it():
    older = read_run(RUN)
    lines = tuple({k: v for k, v in line.items() if k != "halved_to"} for line in older.lines)
    older = replace(older, lines=lines)
    newer = replace(older, records=tuple(replace(record, halved_to=7) for record in older.records))
    assert (facts.mirror_digest(newer), facts.rows_digest(newer, 2)) == (
        facts.mirror_digest(older),
        facts.rows_digest(older, 2),
    )


def test_a_folder_is_whole_with_its_marker_and_others_go_unless_they_are_written_to(tmp_path):
    log, folders = run(path=tmp_path / "s" / "digits" / "dgmg" / "seed-0.jsonl"), RunFolders((0,))
    names = [f"offline-run-2026010{n}-{facts.run_names(log).id}" for n in range(3)]
    new, dead, alive = (folders.of(log) / name for name in names)
    for folder in (new, dead, alive):
        folder.mkdir(parents=True)
    held = FolderLock(alive)
    assert not folders.has(log)
    lock = FolderLock(new)
    folders.mark(log, new)
    folders.clear(log, lock)
    assert folders.has(log)
    assert not dead.exists()
    assert alive.exists()
    assert not folders.has(run(THREE[:2], path=log.path))
    held.release()


def test_pictures_asked_for_later_make_a_folder_incomplete(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "golden")
    log = read_run(tmp_path / "golden" / "digits" / "dgmg" / "seed-0.jsonl")
    folder = RunFolders(()).of(log) / f"offline-run-1-{facts.run_names(log).id}"
    folder.mkdir(parents=True)
    RunFolders((50,)).mark(log, folder)
    assert RunFolders(()).has(log)
    assert RunFolders((99,)).has(log)  # there is no round 99
    assert not RunFolders((0,)).has(log)


def test_auto_is_online_with_a_key_and_never_where_the_network_is_forbidden(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))

    def mode(*words):
        return wandb_of(parse_arguments(words)).mode

    assert tracking_of(parse_arguments([])) is None
    assert mode("offline=false") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert mode("offline=false") == "online"
    assert mode("offline=true") == "offline"
    assert mode("offline=false", "wandb.mode=offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert mode("offline=false") == "offline"
    told = tracking_of(parse_arguments(["tracking=wandb", "wandb.project=p", "wandb.entity=e", "wandb.images=0,7"]))
    assert (told.project, told.entity, told.images) == ("p", "e", (0, 7))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tracking=wand"], "unknown tracking 'wand'; did you mean 'wandb'?"),
        (["wandb.project=x"], "wandb.project= is for tracking=wandb, this one is off"),
        (["tracking=wandb", "wandb.mode=on"], "unknown wandb.mode 'on'; did you mean 'online'?"),
        (["tracking=wandb", "wandb.images=a"], "wandb.images=a: use a whole number of 0 or more"),
        (["tracking=wandb", "wandb.images="], "wandb.images= is empty: leave it out"),
        (["tracking=wandb", "wandb.mode=online", "offline=true"], "wandb.mode=online contradicts offline=true"),
        (["tracking=wandb", "wandb.mode=online", "offline=false"], "wandb.mode=online needs a key: run 'wandb login'"),
        (["tracking=wandb", "wandb.project=a,b"], "wandb.project takes one value, not 2"),
        (["tracking=wandb", "wandb.project=a/b#c"], "wandb.project=a/b#c: W&B takes no #/ in a name"),
        (["tracking=wandb", f"wandb.project={'x' * 129}"], "wandb.project= is a name of 129 characters"),
    ],
)
def test_mistakes_are_one_line(words, message, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError) as caught:
        tracking_of(parse_arguments(words))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WANDB_API_KEY", KEY + " ", "WANDB_API_KEY begins or ends with a blank: set it without"),
        ("WANDB_BASE_URL", "api.wandb.ai", "WANDB_BASE_URL=api.wandb.ai: begin it with https:// or http://"),
        ("WANDB_BASE_URL", "https://wandb.ai", "WANDB_BASE_URL=https://wandb.ai: W&B's own server is https://api."),
        ("WANDB_BASE_URL", "http://api.wandb.ai", "WANDB_BASE_URL=http://api.wandb.ai: W&B's own server is https://"),
        ("WANDB_PROJECT", "a?b", "wandb.project=a?b: W&B takes no ? in a name"),
    ],
)
def test_what_wandb_refuses_is_one_line_before_anything_is_run(name, value, message, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        tracking_of(parse_arguments(["tracking=wandb"]))
    assert str(caught.value).startswith(message)


class Failing:
    """A mirror whose server falls silent with the first end of a run; from then on it writes runs offline."""

    def __init__(self):
        self.online, self.opened, self.written = True, set(), []

    def has(self, log):
        return log.header["cell"] in self.written

    def is_open(self, log):
        return log.header["cell"] in self.opened

    def update(self, log):
        self.opened.add(log.header["cell"])
        return True

    def finish(self, log):
        if self.online:
            self.opened.clear()
            self.online = False
        self.opened.discard(log.header["cell"])
        self.written.append(log.header["cell"])


def test_a_server_that_falls_silent_at_the_end_loses_no_run(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "golden")
    paths = [tmp_path / "golden" / "digits" / name / "seed-0.jsonl" for name in ("margin", "rsmg", "dgmg")]
    for path in paths:
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    mirror, warned = Failing(), []
    follower = FileMirror(paths, mirror, warned.append)
    follower.look()
    follower.close()
    assert sorted(mirror.written) == [f"digits/{name}/seed-0" for name in ("dgmg", "margin", "rsmg")]
    assert (mirror.opened, warned) == (set(), [])


def driven(monkeypatch, code):
    """What is warned of when the mirror is a process of that code, and the sweep waits for it."""
    started = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    words = [sys.executable, "-S", "-c", code]
    monkeypatch.setattr(driver, "_start_process", lambda _, stderr: subprocess.Popen(words, stderr=stderr, **started))
    warned = []
    return driver._MirrorProcess(Tracking(), Path("r"), [], warned.append), warned


def test_the_last_words_of_a_mirror_are_heard_before_the_summary_of_them(monkeypatch):
    mirroring, warned = driven(monkeypatch, "import sys; sys.stdin.read(); print('one\\ntwo'); sys.exit(1)")
    mirroring.close(20.0)
    assert warned == ["one", "two", driver.INCOMPLETE.format(results="r")]


def test_stopped_while_it_waits_the_driver_leaves_no_mirror(monkeypatch):
    mirroring, warned = driven(monkeypatch, "import time; time.sleep(60)")

    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mirroring, "_over", stopped)
    with pytest.raises(KeyboardInterrupt):
        mirroring.close(20.0)
    assert mirroring._process.returncode == -signal.SIGKILL
    assert warned == [driver.INCOMPLETE.format(results="r")]


def test_a_mirror_is_nice_before_it_imports_anything_large():
    code = "import sys, dgal_bench.results.wandb_follow; print({'torch', 'wandb', 'scipy'} & sys.modules.keys())"
    assert finish([sys.executable, "-c", code]).stdout == "set()\n"


@pytest.mark.parametrize("module", ["wandb", "dashboard"])
def test_crash_reports_are_off_before_wandb_is_imported(module):
    """wandb reads the variable when it is imported."""
    code = (
        "import os, sys; variable, values = 'WANDB_ERROR_REPORTING', []; os.environ.pop(variable, None); "
        "sys.addaudithook(lambda event, args: event == 'import' and args[0] == 'wandb' "
        f"and values.append(os.environ.get(variable))); import dgal_bench.results.{module}; "
        "print(values[0], flush=True); os._exit(0)"
    )
    assert finish([sys.executable, "-c", code]).stdout == "false\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["push"], "push takes one results folder: dgal-bench push RESULTS"),
        (["push", "a", "b"], "push takes one results folder"),
        (["push", "a", "seed=0"], "seed= means nothing here: the keys of this verb are wandb.mode"),
        (["push", "nowhere"], "nowhere is not a folder of results"),
    ],
)
def test_mistakes_of_push_are_one_line(words, message, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"dgal-bench: {message}")


# ---- with wandb itself, in processes of their own


def push(root, *words, **environment):
    words = [sys.executable, "-m", "dgal_bench.cli.main", "push", str(root), *words]
    return finish(words, **{**OFFLINE, **environment})


def begun(root):
    return [log for log in read_results(root) if log.begun]


def runs_of(root):
    """Every whole offline run: its records by type, as wandb's own reader prints them."""
    found = {}
    for folder in sorted((root / "wandb").glob("offline-run-*")):
        (file,) = folder.glob("run-*.wandb")
        # what `wandb leet inspect --json` starts, without its two seconds of imports
        words = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", file, folder]
        lines = [json.loads(line) for line in finish(words).stdout.splitlines()]
        records = {}
        for line in lines:
            records.setdefault(line["type"], []).append(line[line["type"]])
        (run,) = records["run"]
        assert run["run_id"] not in found
        found[run["run_id"]] = run, records
    return found


def check_told(root):
    """The runs under ``root`` are its result files: every row, name, setting and summary."""
    logs = {facts.run_names(log).id: log for log in begun(root)}
    found = runs_of(root)
    assert found.keys() == logs.keys()
    for run_id, (run, records) in found.items():
        log, known = logs[run_id], facts.run_names(logs[run_id])
        assert (run["run_group"], run["display_name"], run["project"]) == (known.group, known.name, "dgal_bench")
        assert (sorted(run["tags"]), run["job_type"]) == (sorted(known.tags), known.suite)
        told = {key: value for key, value in run["config"]["update"].items() if key != "_wandb"}
        assert told == json.loads(json.dumps(facts.run_config(log)))
        items = [item["item"] for item in records["history"]]
        assert [own(item) for item in items] == [pytest.approx(row) for row in facts.logged_rows(log)]
        assert [item["_step"] for item in items] == [record.round for record in log.records]
        metrics = {m.get("name") or m["glob_name"]: m.get("step_metric") for m in records["metric"]}
        assert metrics == {**dict.fromkeys(facts.AXES), **dict(facts.DEFINITIONS)}
        summary = {}
        for update in records["summary"]:
            summary |= update["update"]
        assert {key: summary[key] for key in facts.run_summary(log)} == pytest.approx(facts.run_summary(log))
        assert records["exit"] == [pytest.approx({"exit_code": facts.EXIT_CODES[log.status]} | runtime(records))]


def own(item):
    return {name: value for name, value in item.items() if not name.startswith(("_", "picked"))}


def runtime(records):
    return {name: value for name, value in records["exit"][0].items() if name == "runtime"}


def tell(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
def test_push_tells_everything_and_twice_changes_nothing(tmp_path):
    """Runs of every kind: done, partial, failed, one row, never begun, odd names."""
    root = tmp_path / "results"
    shutil.copytree(GOLDEN, root / "golden")
    lines = [json.loads(line) for line in RUN.read_text().splitlines()]
    partial = root / "golden" / "digits" / "margin" / "seed-0.jsonl"
    tell(partial, [json.loads(line) for line in partial.read_text().splitlines()][:2])
    odd = root / "golden" / "digits" / "dgmg+a=<b>&\u00e4 'q'" / "seed-0.jsonl"
    odd.parent.mkdir()
    failure = {"kind": "failure", "error": 'no <memory> & "more"', "traceback": ""}
    tell(odd, [lines[0] | {"cell": f"digits/{odd.parent.name}/seed-0"}, lines[1], failure])
    n_runs = len(begun(root))

    first = push(root)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert f"{n_runs} runs: {n_runs} pushed, 0 already there; offline, in {root}/wandb" in first.stdout
    assert "Not begun, and so no runs: digits/badge/seed-0, digits/ganvae/seed-0\n" in first.stdout
    check_told(root)
    before = listing(root / "wandb")
    again = push(root / "golden")
    assert f"{n_runs} runs: 0 pushed, {n_runs} already there" in again.stdout
    assert listing(root / "wandb") == before

    shutil.copy(GOLDEN / "digits" / "margin" / "seed-0.jsonl", partial)
    more = push(root, "wandb.images=0")
    n_pictured = sum(bool(log.records[0].indices) for log in begun(root))
    assert f"{n_pictured} pushed, {n_runs - n_pictured} already there" in more.stdout
    check_told(root)


def sweep(root, cache, *words, limit=240, **environment):
    fixed = ["suite=smoke", "dataset=digits", "strategy=margin,dgmg", "seed=0"]
    return finish(command(root, cache, *fixed, *words), limit, **{**OFFLINE, **environment})


def warnings_of(done):
    return [line for line in done.stderr.splitlines() if line.startswith("warning: ")]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    """The rows of a sweep that nobody mirrors, its cache, and its seconds; others need no more runs or set-up."""
    root, cache = tmp_path_factory.mktemp("untracked"), tmp_path_factory.mktemp("cache")
    start = time.monotonic()
    done = sweep(root, cache)
    assert done.returncode == 0, done.stderr
    return texts_of(root), cache, time.monotonic() - start


@pytest.mark.slow
def test_a_sweep_offline_is_mirrored_row_by_row(untracked, tmp_path):
    texts, cache, _ = untracked
    done = sweep(tmp_path, cache, "tracking=wandb", "wandb.images=0")
    assert done.returncode == 0, done.stderr
    assert warnings_of(done) == []
    assert texts_of(tmp_path) == texts
    check_told(tmp_path)
    for _, records in runs_of(tmp_path).values():
        assert [item["item"].get("picked.nrows") for item in records["history"]] == [5, None, None]
    before = listing(tmp_path / "wandb")
    assert "2 runs: 0 pushed, 2 already there" in push(tmp_path).stdout
    assert listing(tmp_path / "wandb") == before


@contextmanager
def listening():
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def dead():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    yield url


@contextmanager
def refusing():
    with serving(status=401) as server:
        yield server.url


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("trouble", [dead, listening, refusing])
def test_a_server_that_is_none_costs_a_sweep_a_warning(trouble, untracked, tmp_path):
    """And no more: its rows come as without, and after the last it waits no longer than it says.

    A machine so busy that this was not enough leaves the rest to a push.
    """
    texts, cache, alone = untracked
    with trouble() as url:
        reach = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_MODE": "", "DGAL_OFFLINE": "false"}
        bench = command(tmp_path, cache, "suite=smoke", "dataset=digits", "strategy=margin", "seed=0", "tracking=wandb")
        words = [word if word != "bench" else "run" for word in bench]
        environment = os.environ | OFFLINE | reach
        start = time.monotonic()
        with subprocess.Popen(words, cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True) as running:
            lines = []
            for line in running.stderr:
                lines.append((time.monotonic(), line))
            assert running.wait() == 0, lines
    (finished,) = [when for when, line in lines if line.startswith("[1/1]")]
    assert finished - start < alone + 20
    waited = time.monotonic() - finished
    assert waited < driver.PATIENCE + 15
    warnings = [line for _, line in lines if line.startswith("warning: ")]
    if waited > driver.PATIENCE:
        assert "W&B has not taken everything" in warnings.pop()
        assert push(tmp_path).returncode == 0
    else:
        assert len(warnings) == 1
    assert all("W&B cannot be reached" in warning for warning in warnings)
    assert texts_of(tmp_path) == {"digits/margin/seed-0": texts["digits/margin/seed-0"]}
    check_told(tmp_path)


@pytest.mark.slow
def test_push_to_a_server_that_is_none_is_an_error_where_it_was_asked_for(tmp_path):
    shutil.copytree(GOLDEN / "digits" / "dgmg", tmp_path / "golden" / "digits" / "dgmg")
    with refusing() as url:
        reach = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_MODE": "", "DGAL_OFFLINE": "false"}
        asked = push(tmp_path, "wandb.mode=online", **reach)
        assert asked.returncode == 1
        assert asked.stderr.startswith("dgal-bench: W&B cannot be reached (")
        assert asked.stderr.count("\n") == 1
        left = push(tmp_path, **reach)
    assert left.returncode == 0, left.stderr
    assert "1 run: 1 pushed, 0 already there; offline" in left.stdout
    check_told(tmp_path)


@pytest.mark.slow
def test_killed_with_its_mirror_and_gone_on_it_is_complete(untracked, tmp_path):
    texts, cache, _ = untracked
    words = command(
        tmp_path, cache, "suite=smoke", "dataset=digits", "strategy=margin,dgmg", "seed=0", "tracking=wandb"
    )
    with subprocess.Popen(words, cwd=HERE, env=os.environ | OFFLINE, stderr=subprocess.DEVNULL) as running:
        until(lambda: any((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")), running)
        for pid in [running.pid, *descendants(running.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not all((folder / MARKER).exists() for folder in (tmp_path / "wandb").glob("offline-run-*"))
    assert sweep(tmp_path, cache, "tracking=wandb").returncode == 0
    assert push(tmp_path).returncode == 0
    assert texts_of(tmp_path) == texts
    check_told(tmp_path)
    before = listing(tmp_path / "wandb")
    assert push(tmp_path).returncode == 0
    assert listing(tmp_path / "wandb") == before


def until(true, running, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.alone
def test_stopped_a_sweep_ends_soon_and_its_mirror_with_it(untracked, tmp_path):
    _, cache, _ = untracked
    with serving() as server:
        environment = os.environ | OFFLINE | server.environment
        words = command(
            tmp_path, cache, "suite=smoke", "dataset=digits", "strategy=margin,dgmg", "seed=0,1,2,3", "tracking=wandb"
        )
        with subprocess.Popen(words, cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True) as running:
            until(lambda: any(run.rows for run in server.runs.values()), running)
            mirrors = descendants(running.pid)
            running.send_signal(signal.SIGTERM)
            start = time.monotonic()
            assert running.wait(30) == 143
            assert time.monotonic() - start < 15
        assert gone(mirrors, 10)
        assert push(tmp_path, **server.environment).returncode == 0
        check_served(server, tmp_path)


def gone(pids, seconds):
    """Within so many seconds; a zombie that nobody reaps is gone."""
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def check_served(server, root):
    """What the server has is what the files say, each row once."""
    logs = {facts.run_names(log).id: log for log in begun(root)}
    assert server.runs.keys() == logs.keys()
    for run_id, log in logs.items():
        run, known = server.runs[run_id], facts.run_names(log)
        assert [own(row) for row in run.rows] == [pytest.approx(row) for row in facts.logged_rows(log)]
        told = {key: run.summary[key] for key in facts.run_summary(log) if "/" not in key}
        assert told == pytest.approx({key: value for key, value in facts.run_summary(log).items() if "/" not in key})
        assert (run.told["groupName"], run.told["displayName"]) == (known.group, known.name)
        assert sorted(run.told["tags"]) == sorted(known.tags)
        assert run.config["strategy_name"]["value"] == known.strategy
        assert run.exit_code == facts.EXIT_CODES[log.status]


@pytest.mark.slow
def test_online_rows_come_once_and_a_push_completes_what_a_killed_one_left(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "golden")
    paths = [tmp_path / "golden" / "digits" / name / "seed-0.jsonl" for name in ("margin", "rsmg")]
    whole = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.write_bytes(b"".join(whole[path].splitlines(keepends=True)[:2]))
    with serving() as server:
        n_runs = len(begun(tmp_path))
        first = push(tmp_path, **server.environment)
        assert f"{n_runs} runs: {n_runs} pushed, 0 already there; online" in first.stdout, first.stderr
        check_served(server, tmp_path)
        for path in paths:
            path.write_bytes(whole[path])
        assert f"{n_runs} runs: 2 pushed, {n_runs - 2} already there" in push(tmp_path, **server.environment).stdout
        check_served(server, tmp_path)
        server.asked.clear()
        assert f"{n_runs} runs: 0 pushed, {n_runs} already there" in push(tmp_path, **server.environment).stdout
        assert "UpsertBucket" not in server.asked
        check_served(server, tmp_path)
        changed = [json.loads(line) for line in whole[paths[0]].splitlines()]
        changed[1]["query_seconds"] *= 2
        tell(paths[0], changed)
        server.asked.clear()
        kept = {run_id: copy.deepcopy(run) for run_id, run in server.runs.items()}
        for _ in range(2):
            other = push(tmp_path, **server.environment)
            (warning,) = warnings_of(other)
            assert "digits/margin/seed-0: W&B has rows of an earlier execution of this run" in warning
            assert f"0 pushed, {n_runs - 1} already there, 1 refused; online" in other.stdout
            assert other.returncode == 1
        assert "UpsertBucket" not in server.asked
        assert server.runs == kept


@pytest.mark.slow
def test_online_a_run_is_its_run_whatever_the_surroundings_say_and_stale_folders_go(tmp_path):
    shutil.copytree(GOLDEN / "digits" / "dgmg", tmp_path / "golden" / "digits" / "dgmg")
    shutil.copytree(GOLDEN / "digits" / "margin", tmp_path / "golden" / "digits" / "margin")
    assert push(tmp_path).returncode == 0
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    agent = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "zzz", "WANDB_RESUME": "must", "WANDB_DISABLED": "true"}
    with serving() as server:
        first = push(tmp_path, **server.environment, **agent)
        assert "2 runs: 2 pushed, 0 already there; online" in first.stdout, first.stderr
        check_served(server, tmp_path)
        assert list((tmp_path / "wandb").glob("offline-run-*")) == []
        (warning,) = warnings_of(push(tmp_path, "wandb.images=0", **server.environment))
        assert "W&B has these rows without images" in warning
        for run in server.runs.values():
            run.exit_code = run.exit_code or None  # those that ended well are at work again
        n_whole = sum(log.status in ("done", "skipped") for log in begun(tmp_path))
        again = push(tmp_path, **server.environment)
        assert n_whole > 0
        assert f"2 runs: {n_whole} pushed, {2 - n_whole} already there" in again.stdout
        check_served(server, tmp_path)
