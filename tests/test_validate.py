"""dgal-bench validate: whatever is changed in a file, in a field or in the whole, is found and named by its line."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from dgal_bench.config.schema import to_dict
from dgal_bench.conformance import example_config
from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import lock, lock_path
from dgal_bench.results.reader import read_run
from dgal_bench.results.rows import Timing, state_digest, timings_path
from dgal_bench.results.schema import config_hashes
from dgal_bench.results.validate import AT_MOST, validate
from dgal_bench.results.writer import write_timings

HERE = Path(__file__).parent


@pytest.fixture
def root(tmp_path):
    """Runs done, partial, failed, continued, skipped, and full supervision; one with a second seed."""
    shutil.copytree(HERE / "golden" / "schema-2", tmp_path / "results")
    return tmp_path / "results"


def run(root, label="margin", seed=0):
    return root / "golden" / "digits" / label / f"seed-{seed}.jsonl"


def edit(path, number, change):
    """``change``: fields to set, or a function of the parsed line; line 1 is the header."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if callable(change):
        change(lines[number - 1])
    else:
        lines[number - 1].update(change)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def found(root, path, number=None):
    """The problems of a file, less its place and their line; all of them are of that file, and of that line."""
    verdict = validate(root)
    where = f"{path}, line {number}: " if number else f"{path}: "
    assert [line for line in verdict.problems if not line.startswith(where)] == []
    assert verdict.n_problems >= len(verdict.problems) > 0
    return "\n".join(line.removeprefix(where) for line in verdict.problems)


@pytest.mark.parametrize("folder", ["results/reference", "tests/golden/schema-1", "tests/golden/schema-2"])
def test_what_the_program_wrote_is_valid(folder):
    verdict = validate(HERE.parent / folder)
    assert (verdict.problems, verdict.n_problems) == ([], 0)
    assert verdict.n_files > 5
    assert verdict.text.endswith("nothing wrong")


def less(name):
    return lambda line: line.pop(name)


def inside(section, **changes):
    return lambda line: line[section].update(changes)


def in_config(section, **changes):
    return lambda line: line["config"][section].update(changes)


def repeated(line):
    line["indices"][1] = line["indices"][0]


def first_label_again(line):
    line["initial"][1] = line["initial"][0]


def slower(line):
    line["seconds"]["infer"] += 0.1


ROWS = {
    "a missing field": (less("epochs"), "epochs is missing"),
    "an unknown field": ({"mood": 1}, "mood is no field"),
    "a bool for an int": ({"epochs": True}, "epochs is true, where a whole number should be"),
    "an int for a bool": ({"underfit": 0}, "underfit is 0, where true or false should be"),
    "a text for a number": ({"accuracy": "0.5"}, 'accuracy is "0.5", where a number should be'),
    "not a number": ({"accuracy": float("nan")}, "accuracy is NaN, where a finite number"),
    "infinity in a phase": (inside("seconds", infer=float("inf")), "seconds.infer is Infinity, where a finite number"),
    "a float among positions": ({"indices": [1.5, 2, 3, 4, 5]}, r"indices\[0\] is 1.5, where a whole number"),
    "another round": ({"round": 2}, "round 2, where round 1 should be"),
    "a label too many": ({"n_labeled": 16}, "n_labeled 16, where 10 first labels and 1 batches of 5 make 15"),
    "a query by half": (less("n_scored"), "without n_scored, which a query leaves"),
    "a short batch": ({"indices": [1, 2, 3, 4]}, "4 indices, where a batch has 5"),
    "a class short": ({"classes": [1, 2, 3, 4]}, "4 classes, where a batch has 5"),
    "a class out of range": ({"classes": [0, 1, 2, 3, 10]}, "10 in classes, where there are 10"),
    "a negative class": ({"classes": [0, 1, 2, 3, -1]}, "-1 in classes"),
    "a pick twice": (repeated, "1 of 5 indices stand there twice"),
    "a pick outside": ({"indices": [200, -1, 201, 202, 203]}, "200, -1, 201 and 2 more in indices, outside the pool"),
    "a share above 1": ({"accuracy": 1.01}, "accuracy 1.01, not in 0..1"),
    "a share below 0": ({"ties": -0.1}, "ties -0.1, not in 0..1"),
    "too many candidates": ({"n_candidates": 186}, "n_candidates 186, not in 5..185"),
    "too few candidates": ({"n_candidates": 4}, "n_candidates 4, not in 5..185"),
    "more scored than there are": ({"n_scored": 201}, "n_scored 201, of a pool of 200"),
    "no thread": ({"threads": 0}, "threads 0, where 1 is the least"),
    "no job": ({"jobs": 0}, "jobs 0, where 1 is the least"),
    "time that runs back": ({"train_seconds": -1.0}, "train_seconds -1 is negative"),
    "a negative phase": (inside("seconds", select=-1e-9), "seconds.select -1e-09 is negative"),
    "an unknown phase": (inside("seconds", dream=0.0), "phase 'dream' is none of acquire, "),
    "no acquire phase": (lambda line: line["seconds"].pop("acquire"), "no phase 'acquire'"),
    "scored in no phase": (lambda line: line["seconds"].pop("infer"), "points scored, but no phase 'infer'"),
    "phases beyond the total": (slower, "more than 2 % apart"),
    "seconds in no phase": ({"query_seconds": 1.0}, "more than 2 % apart"),
    "an unknown kind": ({"kind": "remark"}, "unknown kind 'remark'"),
    "a second header": ({"kind": "header"}, "a second header"),
}


@pytest.mark.parametrize(("change", "said"), ROWS.values(), ids=ROWS)
def test_a_changed_row_is_found(root, change, said):
    """The second of three rows; where it is no row any more, the one after it is also out of order."""
    path = run(root)
    edit(path, 3, change)
    lines = [line.removeprefix(f"{path}, line ") for line in validate(root).problems]
    assert any(re.match(f"3: .*{said}", line) for line in lines), lines
    assert {line[0] for line in lines} <= {"3", "4"}


def test_a_pick_of_an_earlier_round_is_found(root):
    path = run(root)
    before = read_run(path)
    edit(path, 3, lambda line: line["indices"].__setitem__(0, before.records[0].indices[2]))
    assert found(root, path, 3) == f"{before.records[0].indices[2]} in indices, labeled before"
    edit(path, 3, lambda line: line["indices"].__setitem__(0, before.header["initial"][3]))
    assert found(root, path, 3) == f"{before.header['initial'][3]} in indices, labeled before"


def test_a_restriction_of_fixed_size_leaves_that_many(root):
    path = run(root, "dgmg")
    edit(path, 2, {"n_candidates": 19})
    assert found(root, path, 2) == "n_candidates 19, where the restriction leaves 20"


def test_the_last_row_has_no_query_and_nothing_follows_it(root):
    path = run(root)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[2])
    assert "a query in round 2, the last, which has none" in found(root, path, 4)
    path.write_text("".join(lines) + '{"kind": "skipped", "why": "tired"}\n')
    assert found(root, path, 5) == "skipped after the last round"
    path.write_text("".join(lines[:2]) + lines[3])
    assert "no query in round 1 of 2" in found(root, path, 3)


HEADERS = {
    "no fingerprint": (less("fingerprint"), "fingerprint.algorithm_version is missing"),
    "no rounds": (lambda line: line["config"].pop("rounds"), "config.rounds is missing"),
    "no data": (less("data"), "data is missing"),
    "no torch": (lambda line: line["fingerprint"].pop("torch"), "fingerprint.torch is missing"),
    "a remark": ({"remark": ""}, "remark is no field"),
    "a version in words": (inside("fingerprint", algorithm_version="1"), 'fingerprint.algorithm_version is "1"'),
    "a newer schema": ({"schema_version": 99}, "schema 99, .*update dgal-bench"),
    "no schema": (less("schema_version"), "schema no schema_version"),
    "another setting": (in_config("training", lr=0.5), "fingerprint.config [0-9a-f]{8} is not the hash"),
    "a setting of another type": (in_config("training", lr="fast"), 'config.training.lr is "fast", where a number'),
    "no hash": (inside("fingerprint", data="digits"), "fingerprint.data 'digits' is no hash"),
    "another seed": (inside("config", seed=1), "it is of seed 1, but named seed-0.jsonl"),
    "another data set": (in_config("dataset", name="mnist"), "it is of data set 'mnist', but in the folder 'digits'"),
    "another strategy": (in_config("strategy", name="mar"), "it is of strategy 'mar', but in the folder 'margin'"),
    "another cell": ({"cell": "digits/lc/seed-0"}, "it is of run 'digits/lc/seed-0', where its place says"),
    "a label short": (lambda line: line["initial"].pop(), "9 first labels, where initial_size=10"),
    "a first label twice": (first_label_again, "1 of 10 first labels stand there twice"),
    "a first label outside": (lambda line: line["initial"].append(200), "200 in first labels, outside the pool of 200"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), HEADERS.values(), ids=HEADERS)
def test_a_changed_header_is_found(root, change, said):
    path = run(root)
    edit(path, 1, change)
    assert any(re.match(f"{path}, line 1: {said}", line) for line in validate(root).problems), validate(root).problems


def test_full_supervision_labels_the_whole_pool(root):
    path = run(root, "full_supervision")
    edit(path, 1, lambda line: line["initial"].pop())
    assert f"{path}, line 1: 199 first labels, where initial_size=200" in validate(root).problems


def test_a_run_that_never_began_says_why_and_has_no_rows(root):
    path = run(root, "badge")
    header, failure = path.read_text().splitlines(keepends=True)
    path.write_text(header)
    assert "no line says why" in found(root, path)
    path.write_text(header + run(root).read_text().splitlines(keepends=True)[1] + failure)
    assert found(root, path, 2) == "a round, but the header names no initial set"


def test_a_failure_is_gone_on_from_by_a_continuation(root):
    path = run(root, "rsmg")
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["kind"] for line in lines[2:4]] == ["failure", "continuation"]
    path.write_text("".join(lines[:3] + lines[4:]))
    assert found(root, path, 4) == "a round after a failure, with no continuation between them"


@pytest.mark.parametrize("broken", [b"{not json}\n", b"\xff\n", b"\n", b"[1]\n", b'{"round": 1}\n', b'{"kind": 3}\n'])
def test_a_line_that_is_no_record_is_found_and_the_others_are_still_checked(root, broken):
    path = run(root)
    edit(path, 4, {"accuracy": 7.0})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], broken, *lines[2:]]))
    problems = validate(root).problems
    assert [line.partition(" line ")[2][:1] for line in problems] == ["3", "5"]
    assert problems[1].endswith("accuracy 7.0, not in 0..1")


def test_problems_of_a_file_are_counted_not_all_said(root):
    path = run(root)
    for number in (2, 3, 4):
        edit(path, number, {"accuracy": 2.0, "reach": 2.0, "threads": 0, "jobs": 0})
    verdict = validate(root)
    assert (verdict.n_problems, len(verdict.problems)) == (12, AT_MOST + 1)
    assert verdict.problems[-1] == f"{path}: and 7 more"
    assert verdict.text.endswith("7 files, 9 rounds: 12 problems")


def test_a_torn_line_and_a_file_without_a_header_are_no_problem_but_said(root):
    path = run(root, "dgmg")
    path.write_bytes(path.read_bytes()[:-20])
    run(root, "dgmg", 1).write_text("")
    verdict = validate(root)
    assert verdict.problems == []
    assert verdict.notes == [
        f"{path}, line 2: torn: killed while writing; the next run cuts it",
        f"{run(root, 'dgmg', 1)}: no whole header yet: the next run starts it over",
    ]


def test_the_same_run_twice_in_a_suite_is_found(root):
    """Under another label: as a seed of its own it would be misplaced."""
    twin = run(root, "margin+again")
    twin.parent.mkdir()
    shutil.copy(run(root), twin)
    edit(twin, 1, {"cell": "digits/margin+again/seed-0"})
    assert found(root, twin, 1) == f"the same run as {run(root)}"
    shutil.move(root / "golden" / "digits" / "margin", root / "other" / "digits" / "margin")  # another suite's
    assert validate(root).problems == []


def test_all_strategies_of_a_seed_start_from_the_same_labels(root):
    path = run(root, "dgmg")
    taken = {position for label in ("margin", "dgmg") for position in read_run(run(root, label)).header["initial"]}
    taken |= set(read_run(path).records[0].indices)
    edit(path, 1, lambda line: line["initial"].__setitem__(0, next(n for n in range(200) if n not in taken)))
    assert found(root, path, 1).startswith("other first labels than those of ")


def test_one_slow_reading_of_the_clock_is_a_note_and_many_are_a_problem(tmp_path):
    """Another process may cut in between two readings: some milliseconds are then in no phase."""
    path = tmp_path / "all" / "digits" / "margin" / "seed-0.jsonl"
    path.parent.mkdir(parents=True)
    shutil.copy(HERE.parent / "results" / "reference" / path.relative_to(tmp_path), path)
    for number in range(2, 2 + 15):
        edit(path, number, lambda line: line.update(query_seconds=sum(line["seconds"].values()) + 0.01))
        verdict = validate(tmp_path)
        n_slow = number - 1
        if n_slow <= 7:
            assert verdict.problems == []
            said = verdict.notes[:AT_MOST]
            assert len(said) == min(n_slow, AT_MOST)
            assert all(f"line {n}: 10.0 ms of" in note for n, note in enumerate(said, start=2))
        else:
            assert verdict.problems == [f"{path}: in {n_slow} of 15 queries over 2 % are in no phase"]


def test_locks_and_temporary_files_are_notes(root):
    path = run(root)
    leftovers = [path.parent / f".{path.name}.new", lock_path(run(root, "dgmg"))]
    for left in leftovers:
        left.write_text("")
    with lock(path):
        notes = validate(root).notes
    assert validate(root).problems == []
    assert sorted(notes) == sorted(
        [
            *(f"{left}: left behind by a process that was killed: it may be removed" for left in leftovers),
            f"{path}: process {os.getpid()} of {os.uname().nodename} is at work on it: "
            "what it writes from now on is not in here",
        ]
    )


def test_no_results_are_a_mistake(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ResultsError, match="run 'dgal-bench bench"):
            validate(place)


def test_a_part_of_the_results_can_be_asked_for(root):
    edit(run(root, "dgmg"), 2, {"accuracy": 2.0})
    assert [validate(place).n_files for place in (root, root / "golden", root / "golden" / "digits")] == [7, 7, 7]
    assert validate(run(root).parent).n_problems == 0
    assert validate(run(root, "dgmg").parent).n_problems == 1


def test_the_hash_here_is_that_of_the_program():
    for config in (example_config("dgmg"), example_config("margin", "dataset.path=mine")):
        header = {"config": json.loads(json.dumps(to_dict(config))), "schema_version": 2}
        assert config_hashes(header) == {config.hash}


@pytest.fixture
def timed(root):
    """A timings file beside the run that is done."""
    log = read_run(run(root))
    timings = [
        Timing("margin", r, [0.02, 0.01, 0.03], {"infer": 0.015, "select": 0.005}, 190, 190, True, 1, 0.1, 0.0)
        for r in (0, 1)
    ]
    header = {
        "cell": "digits/margin/seed-0", "common": None, "picks": state_digest(log), "rounds": [0, 1], "repeats": 3,
        "when": "2026-11-23T11:00:00+00:00", "changed": [], "fingerprint": log.header["fingerprint"],
        "provenance": log.header["provenance"],
    }  # fmt: skip
    write_timings(timings_path(log.path), header, timings)
    return timings_path(log.path)


TIMINGS = {
    "a phase that is none": (2, inside("seconds", dream=0.0), "phase 'dream'"),
    "a repeat short": (2, {"query_seconds": [0.02, 0.02]}, "2 query_seconds, where repeats=3"),
    "phases beyond the total": (3, inside("seconds", infer=0.1), "the median repeat took 0.02"),
    "an unknown field": (2, {"mood": 1}, "mood is no field of this kind of line"),
}


@pytest.mark.parametrize(("number", "change", "said"), TIMINGS.values(), ids=TIMINGS)
def test_a_timings_file_is_checked_too(root, timed, number, change, said):
    assert validate(root).problems == []
    edit(timed, number, change)
    assert said in found(root, timed, number)


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [(2, {"load": "much"}, 'line 2: load is "much", where a number'), (1, less("when"), "line 1: when is missing")],
)
def test_a_timings_file_that_no_reader_takes_is_one_problem(root, timed, number, change, said):
    edit(timed, number, change)
    assert found(root, timed).startswith(f"is damaged ({said}")


def test_timings_of_a_run_that_is_gone_or_has_other_rows(root, timed):
    edit(timed, 1, {"picks": "0" * 20})
    verdict = validate(root)
    assert verdict.problems == []
    assert "of other rows than" in verdict.notes[0]
    run(root).unlink()
    assert "has no rows here" in found(root, timed, 1)
