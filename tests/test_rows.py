"""The results file: what is torn is cut, what is damaged is refused, and only one may write."""

import json
import os
import re
from dataclasses import asdict

import pytest

from dgal_bench.config.schema import flatten
from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import LockHeldError
from dgal_bench.results.reader import read_results, read_run, run_files
from dgal_bench.results.rows import RoundRecord, choice, picks
from dgal_bench.results.schema import OLDER_DEFAULTS, SCHEMA_VERSION
from dgal_bench.results.writer import FileWriter
from tests.headers import header

HEADER = header(
    cell="toy/random/seed-0",
    initial=[7],
    config={
        "rounds": 3, "seed": 0, "initial_size": 1, "dataset": {"name": "toy"},
        "strategy": {"name": "random", "restrict": {"kind": "everything"}, "acquire": {"kind": "random"}},
    },
)  # fmt: skip


def record(round_, **facts):
    base = {
        "n_labeled": 10 + 2 * round_, "accuracy": 0.5 + 0.1 * round_, "underfit": False, "epochs": 4, "train_loss": 0.2,
        "reach": 1.0, "train_seconds": 1.0, "test_seconds": 0.5, "threads": 1, "jobs": 1, "load": 0.3,
    }  # fmt: skip
    return RoundRecord(round=round_, **{**base, **facts})


def write(path, *rounds):
    with FileWriter(path) as writer:
        if writer.log is None:
            writer.write_header(HEADER)
        for round_ in rounds:
            writer.write(record(round_, indices=[round_, 100 + round_]))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "suite" / "toy" / "random" / "seed-0.jsonl"


def test_rows_come_back_as_written(path):
    write(path, 0, 1)
    log = read_run(path)
    assert log.records == (record(0, indices=[0, 100]), record(1, indices=[1, 101]))
    assert log.header["schema_version"] == SCHEMA_VERSION
    assert (log.status, log.done) == ("partial", False)
    assert picks(log.records) == [0, 100, 1, 101]
    write(path, 2, 3)
    assert read_run(path).status == "done"


@pytest.mark.parametrize("lost", [1, 5, 60])
def test_a_torn_last_line_is_cut_and_the_run_goes_on(path, lost):
    write(path, 0, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    assert [r.round for r in read_run(path).records] == [0]
    write(path, 1)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_file_without_a_whole_header_is_started_over(path, kept):
    write(path)
    path.write_bytes(path.read_bytes()[:kept])
    assert read_run(path) is None
    write(path, 0)
    assert read_run(path).header["cell"] == "toy/random/seed-0"


@pytest.mark.parametrize("broken", [b"{not json}\n", b"[1]\n", b'{"no": "kind"}\n', b'{"kind": "round", "round": 0}\n'])
def test_a_damaged_earlier_line_is_refused_by_file_and_number(path, broken):
    write(path, 0, 1)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = lines[0] + broken + lines[2]
    path.write_bytes(damaged)
    for use in (read_run, write):
        with pytest.raises(ResultsError, match=f"{path}, line 2"):
            use(path)
    assert path.read_bytes() == damaged  # nothing was lost


def test_rows_out_of_order_are_refused(path):
    write(path, 0, 1, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[3])
    with pytest.raises(ResultsError, match=r"rounds \[0, 2\] are not 0, 1, 2"):
        read_run(path)


def test_another_schema_is_refused(path):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"kind": "header", "schema_version": 99, **HEADER}) + "\n")
    with pytest.raises(ResultsError, match="schema 99, where this version reads 1"):
        read_run(path)


def test_a_failure_is_the_status_until_rows_follow(path):
    with FileWriter(path) as writer:
        writer.write_header(HEADER)
        writer.write(record(0))
        writer.write_failure("ValueError: diverged", "Traceback ...")
    assert read_run(path).status == "failed"
    assert read_run(path).failure["error"] == "ValueError: diverged"
    with FileWriter(path) as writer:
        writer.write_continuation({"changed": []})
        writer.write(record(1))
    assert read_run(path).status == "partial"
    assert len(read_run(path).continuations) == 1


def test_one_writer_at_a_time(path):
    with FileWriter(path) as first:
        first.write_header(HEADER)
        first.write(record(0))
        second = FileWriter(path)
        with pytest.raises(LockHeldError, match=f"being written by process {os.getpid()} of "):
            second.__enter__()
    with second:  # released
        assert second.log is not None


def test_nan_is_no_fact(path):
    with FileWriter(path) as writer:
        writer.write_header(HEADER)
        with pytest.raises(ValueError, match="JSON"):
            writer.write(record(0, accuracy=float("nan")))


def test_circumstances_are_no_choice():
    assert choice(record(0)) == choice(
        record(0, train_seconds=9.0, jobs=2, load=7.0, query_seconds=1.0, seconds={"infer": 1.0})
    )
    assert choice(record(0)) != choice(record(0, indices=[1]))
    assert choice(record(0)) != choice(record(0, accuracy=0.51))


def test_reading_a_folder_of_results(tmp_path, path):
    with pytest.raises(ResultsError, match="is not a folder of results"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match="holds no results"):
        read_results(tmp_path)
    write(path, 0)
    path.with_name("seed-1.jsonl").write_text("")  # just being started
    (tmp_path / "summary.csv").write_text("")
    assert [log.path for log in read_results(tmp_path)] == [path]


def test_a_folder_that_goes_while_it_is_looked_into_is_not_there(tmp_path, path, monkeypatch):
    """As an entry of a cache that is being made."""
    write(path, 0)
    (path.parent / "key.part").mkdir()
    look = os.scandir

    def late(folder):
        if os.fspath(folder).endswith(".part"):
            os.rmdir(folder)
        return look(folder)

    monkeypatch.setattr(os, "scandir", late)
    assert run_files(tmp_path) == [path]
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written_names_the_knob(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ResultsError, match=r"cannot be written.*set results=DIR"),
        FileWriter(tmp_path / "file" / "seed-0.jsonl"),
    ):
        pass


def without(header, path):
    """The header less what is at a dotted path."""
    first, _, rest = path.partition(".")
    return {
        name: without(value, rest) if name == first else value
        for name, value in header.items()
        if rest or name != first
    }


def forged(path, header=HEADER, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [{"kind": "header", "schema_version": SCHEMA_VERSION, **header}, *lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in whole))


NEEDED = (
    "cell", "profile", "network", "fingerprint.data", "fingerprint.weights", "fingerprint.device",
    "provenance.git.dirty", "provenance.machine.cpu", "provenance.machine.cores", "setup.graph.recall",
    "setup.graph.components", "setup.representation.seconds",
)  # fmt: skip

ROW = {"kind": "round", **asdict(record(0, indices=[1], query_seconds=1.0, seconds={"infer": 1.0}))}


@pytest.mark.parametrize("name", [name for name in flatten(HEADER) if name in NEEDED or name.startswith("config.")])
def test_a_header_without_a_field_that_readers_need_is_refused_by_its_name(path, name):
    """Of a configuration all: what older files lack has a value of its own, and the golden files have all else."""
    forged(path, without(HEADER, name))
    if name.startswith(("config.strategy.restrict.", "config.strategy.acquire.")) or is_absent_in_older(name):
        assert read_run(path) is not None
        return
    with pytest.raises(ResultsError, match=f"^{path}, line 1: {name} is missing: restore the line"):
        read_run(path)


def is_absent_in_older(name):
    return name in flatten(OLDER_DEFAULTS) or name == "config.dataset.kind"


@pytest.mark.parametrize("name", ["config", "config.strategy", "fingerprint", "provenance", "setup", "setup.graph"])
def test_a_header_without_a_section_is_refused_by_its_name(path, name):
    forged(path, without(HEADER, name))
    with pytest.raises(ResultsError, match=rf"^{path}, line 1: {name}(\.\w+)? is missing: restore the line"):
        read_run(path)


@pytest.mark.parametrize(("name", "value"), [("rounds", "3"), ("rounds", True), ("seed", 1.5), ("strategy", "margin")])
def test_a_header_of_something_else_is_refused_by_field(path, name, value):
    forged(path, HEADER | {"config": HEADER["config"] | {name: value}})
    with pytest.raises(ResultsError, match=f"^{path}, line 1: config.{name} is .*, where (a whole number|an object) "):
        read_run(path)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("query_seconds", "x", 'query_seconds is "x", where a number should be'),
        ("accuracy", None, "accuracy is null, where a number should be"),
        ("accuracy", float("nan"), "accuracy is NaN, where a finite number should be"),
        ("jobs", 1.5, "jobs is 1.5, where a whole number should be"),
        ("threads", True, "threads is true, where a whole number should be"),
        ("indices", 3, "indices is 3, where a list should be"),
        ("indices", [1, "2"], 'indices[1] is "2", where a whole number should be'),
        ("seconds", {"infer": None}, "seconds.infer is null, where a number should be"),
        ("extra", {"lucky": "7"}, 'extra.lucky is "7", where a number should be'),
    ],
)
def test_a_field_of_a_row_that_is_something_else_is_refused_by_line_and_field(path, name, value, told):
    forged(path, HEADER, ROW | {"query_seconds": 1, "extra": {"aux_steps": 4, "lucky": True}})
    assert read_run(path).records[0].query_seconds == 1  # a whole number is a number
    forged(path, HEADER, ROW, ROW | {"round": 1, name: value})
    with pytest.raises(ResultsError, match=re.escape(f"{path}, line 3: {told}")):
        read_run(path)


@pytest.mark.parametrize(("kind", "name"), [("failure", "error"), ("skipped", "why"), ("continuation", "changed")])
def test_an_ending_that_does_not_say_why_is_refused(path, kind, name):
    forged(path, HEADER, {"kind": kind})
    with pytest.raises(ResultsError, match=f"{path}, line 2: {name} is missing"):
        read_run(path)
    forged(path, HEADER, {"kind": kind, name: 3})
    with pytest.raises(ResultsError, match=f"{path}, line 2: {name} is 3, where a (text|list) should be"):
        read_run(path)


def test_rows_of_a_run_that_never_began_are_refused(path):
    forged(path, without(HEADER, "initial"), ROW)
    with pytest.raises(ResultsError, match=f"{path}, line 1: initial is missing, and there are rounds"):
        read_run(path)
