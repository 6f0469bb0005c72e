"""The benchmark's own laws: nothing dropped, ratios that are quotients, and memory. No time is asserted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import acquisition, plan, report
from benchmarks.plan import CRITERIA, IMPLEMENTATIONS, Case

ROOT = Path(__file__).parent.parent
CASE = Case("badge", 60_000, 10, 50, "ours")


def row(implementation, **facts):
    measured = {"status": "measured", "seconds": 1.0, "peak_mb": 3.0, "chosen": [7, 5, 9]}
    return replace(CASE, picks=3, implementation=implementation).facts() | measured | facts


def compare(*rows):
    (only,) = report.comparisons(rows, read_gb_per_second=10.0, limit=120.0)
    return only


def test_a_ratio_is_theirs_by_ours():
    found = compare(row("ours", seconds=0.5), row("reference", seconds=4.0), row("scikit-activeml", seconds=3.0))
    assert [found[name]["x_ours"] for name in IMPLEMENTATIONS[1:]] == [8.0, 6.0]
    assert found["ours"]["floor_seconds"] == 3 * 60_000 * 60 * 4 / 1e10
    assert found["ours"]["x_floor"] == 0.5 / found["ours"]["floor_seconds"]


def test_what_was_stopped_bounds_the_ratio_and_stays_in_the_table():
    missing = {"seconds": None, "peak_mb": None}
    found = compare(
        row("ours", seconds=0.5),
        row("reference", status="over_limit", **missing),
        row("scikit-activeml", status="over_memory", needs_gb=31.0, **missing),
    )
    assert (found["reference"]["x_ours"], found["reference"]["lower_bound"]) == (240.0, True)
    assert found["scikit-activeml"]["x_ours"] is None
    text = report.table([found], limit=120.0)
    assert "> 120 " in text
    assert "> 240 " in text
    assert "needs 31 GB" in text


@pytest.mark.parametrize(("theirs", "shared"), [([7, 5, 9], 3), ([7, 9, 5], 1), ([1, 5, 9], 0)])
def test_lists_are_compared_up_to_the_first_difference(theirs, shared):
    found = compare(row("ours"), row("reference", chosen=theirs), row("scikit-activeml", chosen=theirs))
    assert found["reference"]["shared_picks"] == shared
    assert found["scikit-activeml"]["shared_picks"] is None  # draws of its own


def test_margins_are_compared_as_sets():
    rows = [row(name, criterion="margin") for name in IMPLEMENTATIONS]
    rows[1]["chosen"] = [9, 7, 1]
    assert compare(*rows)["reference"]["shared_picks"] == 2


def test_a_case_larger_than_a_stopped_one_is_not_started_and_says_so():
    stopped = replace(CASE, implementation="reference").facts() | {"status": "over_limit", "peak_mb": None}
    larger = replace(CASE, implementation="reference", picks=200)
    found = acquisition.measured(larger, [stopped], threads=1, limit=1.0)
    assert (found["status"], found["because_of"]["picks"]) == ("not_started", 50)
    assert not replace(larger, implementation="scikit-activeml").is_larger_than(Case.of(stopped))
    assert not replace(larger, points=15_000).is_larger_than(Case.of(stopped))


def test_what_needs_more_memory_than_there_is_is_not_started(monkeypatch):
    monkeypatch.setattr(plan, "memory_bytes", lambda: 10**9)
    found = acquisition.measured(Case("badge", 125_000, 100, 50, "scikit-activeml"), [], threads=1, limit=1.0)
    assert found["status"] == "over_memory"
    assert found["needs_gb"] > 10


def test_every_size_is_planned_for_every_implementation():
    cases = plan.cases(CRITERIA, quick=False)
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert {replace(case, implementation=name) for name in IMPLEMENTATIONS} <= set(cases)


@pytest.mark.slow
def test_a_quick_run_compares_all_on_the_same_picks(tmp_path):
    out = tmp_path / "acquisition.json"
    words = [sys.executable, "benchmarks/acquisition.py", "--quick", "--out", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    measured = {(one["criterion"], one["implementation"]): one for one in results["measurements"]}
    assert set(measured) == {(criterion, name) for criterion in CRITERIA for name in IMPLEMENTATIONS}
    assert all(one["status"] == "measured" for one in measured.values())
    assert all(one["seconds"] == min(one["all_seconds"]) for one in measured.values())
    assert [one["criterion"] for one in results["comparisons"]] == list(CRITERIA)
    for one in results["comparisons"]:
        ours = measured[one["criterion"], "ours"]["seconds"]
        for name in IMPLEMENTATIONS[1:]:
            assert one[name]["x_ours"] == measured[one["criterion"], name]["seconds"] / ours
            expected = None if (one["criterion"], name) == ("badge", "scikit-activeml") else one["picks"]
            assert one[name]["shared_picks"] == expected
        assert f"\n{one['criterion']} " in done.stdout
    assert results["bandwidth"]["torch_threads"] == results["threads"]
    assert results["provenance"]["machine"]["cpu"]
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "<svg" in out.with_suffix(".svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "classes"), [("badge", 10), ("coreset", None)])
def test_memory_beyond_the_inputs_is_small(criterion, classes):
    """50 picks of 60,000 points with 50 features: the gradients alone would be 120 MB, all distances 14 GB."""
    found = acquisition.measured(Case(criterion, 60_000, classes, 50, "ours"), [], threads=1, limit=120.0)
    assert found["status"] == "measured", found
    if found["peak_mb"] is None:
        pytest.skip("peak memory is read under Linux's /proc")
    assert 0 < found["peak_mb"] < 100
