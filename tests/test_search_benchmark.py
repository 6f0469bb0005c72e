"""benchmarks/graph_build.py: ratios that are quotients, goals that are judged, peers that are left out by name."""

import json

import pytest

from benchmarks import graph_build
from tests.measuring import answer_here


def row(contender, seconds, size="points", **facts):
    measured = {"status": "measured", "kind": "clustered", "floor_seconds": 2.0, "recall": 1.0, "peak_mb": 10.0}
    return {"size": size, "contender": contender, "seconds": seconds, "remark": ""} | measured | facts


def test_a_ratio_is_their_seconds_by_ours_and_by_the_floor():
    rows = [row("tiles", 4.0), row("lists", 0.5), row("flat", 6.0), {"contender": "hnswlib", "status": "left_out"}]
    graph_build.with_ratios(rows)
    assert rows[2]["x"] == {"tiles": 1.5, "lists": 12.0}
    assert rows[2]["x_floor"] == 3.0
    assert "x" not in rows[3]


@pytest.mark.parametrize(("facts", "met"), [({}, True), ({"seconds": 3.0}, False), ({"recall": 0.97}, False)])
def test_a_goal_asks_for_speed_and_recall(facts, met):
    found = graph_build.goals([row("tiles", 4.0), row("flat", 8.0), row("lists", 1.0) | facts], "clustered")
    assert [goal["met"] for goal in found] == [True, met]
    assert graph_build.goal_text(found[1]).startswith("met" if met else "MISSED")


@pytest.mark.parametrize(("peak", "met"), [(3999.0, True), (4001.0, False), (None, False)])
def test_the_large_goal_asks_for_memory_too(peak, met):
    (goal,) = graph_build.goals([row("lists", 1.0, "large", peak_mb=peak), row("ivf", 3.0, "large")], "clustered")
    assert goal["met"] is met
    said = "in unmeasured memory (goal 4000)" if peak is None else f"in {peak:.0f} MB (goal 4000)"
    assert said in graph_build.goal_text(goal)


def test_where_ours_compares_all_there_are_no_lists_for_an_inverted_file(monkeypatch, tmp_path, capsys):
    answered = row("lists", 1.0, lists=None)
    monkeypatch.setattr(graph_build, "answer", lambda *asked: answered)
    asked = ["--quick", "--kinds", "manifold", "--peers", "lists", "ivf", "--out", str(tmp_path / "found.json")]
    assert graph_build.main(asked) == 0
    assert capsys.readouterr().out.count("ours compared all points") == 2


@pytest.mark.slow
def test_the_quick_run_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graph_build, "answer", answer_here)
    out = tmp_path / "found.json"
    peers = ["--peers", "tiles", "lists", "flat", "ivf"]
    assert graph_build.main(["--quick", "--kinds", "clustered", *peers, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["measurements"]
    assert {found["status"] for found in rows} == {"measured"}
    seconds = {(found["size"], found["contender"]): found["seconds"] for found in rows}
    for found in rows:
        for ours, x in found["x"].items():
            assert x == found["seconds"] / seconds[found["size"], ours]
    assert str(out) in capsys.readouterr().out
