"""The versions of a results file: golden files of each, which every later version reads, continues or refuses."""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from dgal_bench.config.schema import flatten, from_dict, to_dict
from dgal_bench.conformance import example_config, run_in_process
from dgal_bench.core.errors import ResultsError
from dgal_bench.results.reader import read_results, read_run
from dgal_bench.results.rows import choice
from dgal_bench.results.schema import SCHEMA_VERSION
from dgal_bench.results.writer import FileWriter, UnwritableError

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = range(1, SCHEMA_VERSION + 1)

STATUSES = {
    1: {
        "digits/dgmg": "partial", "digits/full_supervision": "done", "digits/margin": "done",
        "digits/random": "failed", "digits/rsmg": "done", "mnist/rsmg": "partial",
    },
    2: {
        "digits/badge": "failed", "digits/dgmg": "partial", "digits/full_supervision": "done",
        "digits/ganvae": "skipped", "digits/margin": "done", "digits/random": "failed", "digits/rsmg": "done",
    },
}  # fmt: skip
"""Of the golden files of each version."""


def golden(version, label="margin"):
    return GOLDEN / f"schema-{version}" / "golden" / "digits" / label / "seed-0.jsonl"


def copied(tmp_path, version, label="margin"):
    path = tmp_path / "suite" / "digits" / label / "seed-0.jsonl"
    path.parent.mkdir(parents=True)
    shutil.copy(golden(version, label), path)
    return path


def listing(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_version_has_its_golden_files():
    """Raising SCHEMA_VERSION takes a folder of files of the new one (golden/make.py)."""
    assert sorted(path.name for path in GOLDEN.glob("schema-*")) == [f"schema-{version}" for version in VERSIONS]
    assert sorted(STATUSES) == list(VERSIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_files_are_of_their_version_and_read_back(version):
    logs = read_results(GOLDEN / f"schema-{version}")
    assert {log.lines[0]["schema_version"] for log in logs} == {version}
    assert {log.header["schema_version"] for log in logs} == {SCHEMA_VERSION}
    assert {"/".join(log.path.parts[-3:-1]): log.status for log in logs} == STATUSES[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_of_a_row_is_lost_or_made_up_in_reading(version):
    """What a line says is in the record, and what it does not say is absent there, or the default."""
    for log in read_results(GOLDEN / f"schema-{version}"):
        rows = [line for line in log.lines if line["kind"] == "round"]
        assert len(rows) == len(log.records)
        for line, record in zip(rows, log.records, strict=True):
            said = {name: value for name, value in line.items() if name != "kind"}
            assert {name: getattr(record, name) for name in said} == said
            others = {name: value for name, value in vars(record).items() if name not in said}
            assert set(map(str, others.values())) <= {"None", "{}", "0.0"}


@pytest.mark.parametrize("version", VERSIONS)
def test_headers_of_every_version_say_what_this_one_asks_for(version):
    for log in read_results(GOLDEN / f"schema-{version}"):
        assert {"cell", "profile", "config", "fingerprint", "provenance"} <= log.header.keys()
        if log.begun:
            assert {"weights", "files", "data", "graph"} <= log.header["fingerprint"].keys()
            assert {"initial", "data", "setup", "network"} <= log.header.keys()
            assert len(log.header["initial"]) in (10, 200)
        else:
            assert log.records == ()
            assert log.status in ("failed", "skipped")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_endings_of_a_run_are_read(version):
    failed = read_run(golden(version, "random"))
    assert failed.failure["error"] == "ValueError: the loss is not a number (mine.py, line 7)"
    assert len(failed.records) == 1
    continued = read_run(golden(version, "rsmg"))
    assert [line["kind"] for line in continued.lines] == [
        "header", "round", "failure", "continuation", "round", "round"
    ]  # fmt: skip
    assert len(continued.continuations) == 1
    if version > 1:
        assert read_run(golden(version, "badge")).failure["error"].startswith("ValueError")
        assert "embeddings" in read_run(golden(version, "ganvae")).skipped["why"]


@pytest.mark.parametrize("label", ["margin", "dgmg", "rsmg"])
def test_the_same_run_has_the_same_choices_in_every_version(label):
    """Made by the same algorithm and torch, on the same kind of CPU: a version of the schema is neither."""
    found = defaultdict(list)
    for version in VERSIONS:
        log = read_run(golden(version, label))
        made_by = [log.header["fingerprint"][name] for name in ("algorithm_version", "torch", "cpu", "config")]
        found[tuple(made_by)].append([log.header["initial"], *(choice(record) for record in log.records)])
    assert all(choices == [choices[0]] * len(choices) for choices in found.values())
    assert len(next(iter(found.values()))) >= 2  # of schemas 1 and 2


def test_what_is_of_before_a_field_says_nothing_of_it():
    assert [record.busy_elsewhere for record in read_run(golden(1)).records] == [None] * 3
    assert None not in [record.busy_elsewhere for record in read_run(golden(2)).records]
    older = read_run(GOLDEN / "schema-1" / "older" / "mnist" / "rsmg" / "seed-0.jsonl")
    assert older.header["data"] == {}
    assert older.header["fingerprint"]["weights"] is None
    assert (older.rounds, len(older.records), older.status) == (30, 2, "partial")


def test_a_partial_file_of_an_older_version_goes_on_in_this_one(tmp_path, experiment):
    """Rewritten before a line is added, the rows that were there as they were, and the whole as if undisturbed."""
    path = copied(tmp_path, 1, "dgmg")
    before, raw = read_run(path), path.read_bytes()
    with FileWriter(path) as writer:
        assert [choice(record) for record in writer.log.records] == [choice(record) for record in before.records]
        assert path.read_bytes() == raw  # it may be found unfit to go on
        writer.write_continuation(GOES_ON)
    rewritten = read_run(path)
    assert rewritten.lines[0]["schema_version"] == SCHEMA_VERSION
    assert rewritten.lines[1:-1] == before.lines[1:]
    assert rewritten.lines[-1] == {"kind": "continuation", **GOES_ON}
    assert rewritten.header == before.header
    # This machine's torch may be another than the golden file's, whose header these rows are then not of.
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["fingerprint"] |= fingerprint_here(tmp_path, experiment)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = run_in_process(experiment, path, example_config("dgmg"))
    assert len(rows) == 3
    assert choice(rows[0]) == choice(before.records[0])
    assert {line["schema_version"] for line in read_run(path).lines if line["kind"] == "header"} == {SCHEMA_VERSION}


def fingerprint_here(tmp_path, experiment):
    """What a header of the run written now says of code, machine and content."""
    path = tmp_path / "now" / "digits" / "dgmg" / "seed-0.jsonl"
    run_in_process(experiment, path, example_config("dgmg"))
    return read_run(path).header["fingerprint"]


GOES_ON = {"changed": []}


class Killed(BaseException):
    """As sudden as SIGKILL, for who only looks at the disk afterwards."""


@pytest.mark.parametrize("step", ["rename", "open"])
def test_killed_between_writing_and_renaming_the_old_file_is_whole(tmp_path, monkeypatch, step):
    path = copied(tmp_path, 1, "dgmg")
    before = path.read_bytes()
    real = getattr(Path, step)

    def killed(self, *arguments, **options):
        if self.name.endswith(".new"):
            raise Killed
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, killed)
        with pytest.raises(Killed), FileWriter(path) as writer:
            writer.write_continuation(GOES_ON)
    assert path.read_bytes() == before
    with FileWriter(path) as writer:  # and it can be opened again: nobody holds it
        assert len(writer.log.records) == 1
        writer.write_continuation(GOES_ON)
    assert read_run(path).lines[0]["schema_version"] == SCHEMA_VERSION
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_disk_without_room_for_the_rewritten_file_leaves_the_old_one(tmp_path, monkeypatch):
    path = copied(tmp_path, 1, "dgmg")
    before = path.read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UnwritableError, match="No space left"), FileWriter(path) as writer:
        writer.write_continuation(GOES_ON)
    assert listing(path.parent) == {path: before}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("label", ["margin", "rsmg", "full_supervision"])
def test_a_finished_file_is_left_byte_for_byte(tmp_path, version, label):
    path = copied(tmp_path, version, label)
    before = path.read_bytes()
    with FileWriter(path) as writer:
        assert writer.log.done
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("lost", [1, 30])
def test_a_torn_line_is_cut_before_an_older_file_goes_on(tmp_path, version, lost):
    path = copied(tmp_path, version)
    path.write_bytes(path.read_bytes()[:-lost])
    with FileWriter(path) as writer:
        writer.write_continuation(GOES_ON)
    log = read_run(path)
    assert log.lines[0]["schema_version"] == SCHEMA_VERSION
    assert log.lines[1:-1] == read_run(golden(version)).lines[1:3]


REFUSED = {
    "newer": ({"schema_version": 99}, "schema 99, where this version reads 1 to .*: update dgal-bench"),
    "none": ({"schema_version": None}, "no schema_version"),
    "a text": ({"schema_version": "2"}, "schema 2, where"),
    "true": ({"schema_version": True}, "schema True, where"),
    "zero": ({"schema_version": 0}, "schema 0, where"),
    "a share": ({"schema_version": 1.5}, "schema 1.5, where"),
    "no header": ({"kind": "round"}, "line 1"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_another_schema_is_refused_in_a_line_and_nothing_is_changed(tmp_path, change, said):
    path = copied(tmp_path, 2, "dgmg")
    header, *rows = path.read_text().splitlines(keepends=True)
    changed = {name: value for name, value in {**json.loads(header), **change}.items() if value is not None}
    path.write_text(json.dumps(changed) + "\n" + "".join(rows))
    before = listing(tmp_path)

    def opened(at):
        with FileWriter(at):
            pass

    for use in (read_run, opened):
        with pytest.raises(ResultsError, match=f"{re.escape(str(path))}.*{said}") as refused:
            use(path)
        assert "\n" not in str(refused.value)
        assert listing(tmp_path) == before


@pytest.mark.parametrize("header", [{}, {"config": {}}, {"fingerprint": {}, "config": 3}])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_header_without_what_every_header_has_is_refused_not_a_crash(tmp_path, header, version):
    path = tmp_path / "suite" / "digits" / "dgmg" / "seed-0.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"kind": "header", "schema_version": version, **header}) + "\n")
    with pytest.raises(ResultsError, match=f"{re.escape(str(path))}, line 1: "):
        read_run(path)


@pytest.mark.parametrize("section", ["representation", "dataset"])
def test_a_setting_of_before_that_is_something_else_is_refused_not_a_crash(tmp_path, section):
    path = copied(tmp_path, 1)
    header, *rows = path.read_text().splitlines(keepends=True)
    changed = json.loads(header)
    changed["config"][section] = "vae"
    path.write_text(json.dumps(changed) + "\n" + "".join(rows))
    with pytest.raises(
        ResultsError, match=f'{re.escape(str(path))}, line 1: config.{section} is "vae", where an object'
    ):
        read_run(path)


@pytest.mark.parametrize("path", sorted(GOLDEN.rglob("seed-*.jsonl")), ids=lambda path: "-".join(path.parts[-5:-1]))
def test_a_header_of_any_version_is_a_whole_configuration_of_this_one(path):
    """What it lacks has the value that behaves as the code of its time did, and its hash is of the whole."""
    log = read_run(path)
    config = from_dict(log.header["config"])
    assert to_dict(config) == log.header["config"]
    assert config.hash == log.header["fingerprint"]["config"]
    added = set(flatten(log.header["config"])) - set(flatten(log.lines[0]["config"]))
    assert {name: flatten(log.header)[f"config.{name}"] for name in added} == {name: AS_BEFORE[name] for name in added}
    assert "graph.recall_target" in added
    assert "recall_target" not in log.lines[0]["config"]["graph"]  # what was read is as it was


AS_BEFORE = {
    "propagation": "none", "trainer.devices": 1, "graph.recall_target": 0.99, "dataset.kind": "mnist",
    "dataset.path": None, "dataset.image_size": None, "dataset.test_share": 0.2, "net.hidden": [],
    "net.pretrained": False, "net.checkpoint_path": None, "net.input_size": None, "net.stem": "auto",
    "net.channels_last": True, "net.amp": False, "representation.encoder": "cnn", "representation.amp": False,
    "representation.path": None, "representation.test_path": None, "representation.model": None,
    "representation.pretrained": False, "representation.checkpoint_path": None, "representation.input_size": None,
}  # fmt: skip
"""Networks were the package's own, in channels_last; there was no propagation, and one device trained the VAE."""
