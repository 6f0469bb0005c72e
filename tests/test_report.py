"""Numbers from rows: by hand, against scipy, and never from unfinished cells."""

import csv
import io
import itertools
import json
from dataclasses import replace
from math import exp, inf, log, sqrt

import pytest
from scipy import stats

from dgal_bench.errors import ResultsError
from dgal_bench.record import Recorder, RoundRecord, read_results
from dgal_bench.report.figures import FIGURES, accuracy_against_query_time, styles
from dgal_bench.report.statistics import (
    area_under_curve,
    cumulative_query_seconds,
    mean_query_seconds,
    mean_scored,
    ratio_interval,
    t_interval,
)
from dgal_bench.report.summary import group, summarise, summary_csv
from dgal_bench.report.tables import space, summary_md
from dgal_bench.report.write import write_report


def row(round_, n_labeled, accuracy, seconds=None, scored=None):
    return RoundRecord(
        round=round_, n_labeled=n_labeled, accuracy=accuracy, underfit=False, epochs=1, train_loss=0.1, reach=1.0,
        train_seconds=1.0, test_seconds=1.0, threads=1, jobs=1, load=0.0, query_seconds=seconds, n_scored=scored,
    )  # fmt: skip


ROWS = [row(0, 10, 0.2, 3.0, 90), row(1, 20, 0.6, 5.0, 80), row(2, 50, 0.8)]


def test_the_space_of_a_graph_is_named_with_what_made_it():
    assert space({"kind": "vae"}) == "vae"  # rows of before there was a choice of encoders
    assert space({"kind": "vae", "encoder": "cnn", "model": "resnet18"}) == "vae"
    assert space({"kind": "vae", "encoder": "resnet18"}) == "vae (resnet18)"
    assert space({"kind": "timm", "model": "resnet50", "path": None}) == "timm (resnet50)"
    assert space({"kind": "npy", "path": "some/where/mine.npy"}) == "npy (mine.npy)"
    assert space({"kind": "pca", "path": "left over"}) == "pca"


def test_measures_of_three_rows_by_hand():
    # trapezoids 10 x 0.4 + 30 x 0.7 = 25, over a width of 40
    assert area_under_curve(ROWS) == pytest.approx(25 / 40)
    assert mean_query_seconds(ROWS) == 4.0
    assert mean_scored(ROWS) == 85
    # a row is paid for by the queries of the rows before it
    assert cumulative_query_seconds(ROWS) == [0.0, 3.0, 8.0]


def test_t_interval_is_scipys():
    values = [0.91, 0.88, 0.93, 0.90, 0.95]
    ours = t_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=ours.mean, scale=stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx((low, high))
    assert t_interval([3.0, 5.0]).high == pytest.approx(4 + 12.7062 * sqrt(2) / sqrt(2), abs=1e-3)


def test_one_seed_has_no_interval():
    assert (t_interval([0.5]).low, t_interval([0.5]).high) == (-inf, inf)
    assert (ratio_interval([6.0], [2.0]).mean, ratio_interval([6.0], [2.0]).high) == (pytest.approx(3.0), inf)


def test_a_ratio_is_paired_and_geometric():
    ours = ratio_interval([10.0, 40.0, 90.0], [1.0, 2.0, 3.0])  # ratios 10, 20, 30
    logs = t_interval([log(10), log(20), log(30)])
    assert ours.mean == pytest.approx((10 * 20 * 30) ** (1 / 3))
    assert (ours.low, ours.high) == pytest.approx((exp(logs.low), exp(logs.high)))


def header(strategy, seed, restrict="everything", acquire="margin", profile="cpu", version=1, graph_k=20, rounds=2):
    return {
        "cell": f"toy/{strategy}/seed-{seed}",
        "profile": profile,
        "config": {
            "seed": seed, "rounds": rounds, "batch_size": 10, "initial_size": 10, "restricted_size": 50,
            "dataset": {"name": "toy"}, "graph": {"graph_k": graph_k}, "representation": {"kind": "vae"},
            "strategy": {"name": strategy, "restrict": {"kind": restrict}, "acquire": {"kind": acquire}},
        },
        "fingerprint": {
            "algorithm_version": version, "git": "0123456789", "torch": "2.x", "device": "cpu", "graph": "g",
        },
        "provenance": {
            "machine": {"cpu": "Abacus", "cores": 2}, "git": {"revision": "0123456789abcdef", "dirty": False},
        },
        "setup": {
            "representation": {"kind": "vae", "seconds": 7.0, "label_share": {"latents": 0.9, "pixels": 0.8}},
            "graph": {"seconds": 0.5, "components": 1, "exact": True, "recall": 1.0},
        },
    }  # fmt: skip


def cell(root, strategy, seed, rows, failure=None, suite="suite", **facts):
    with Recorder(root / suite / "toy" / strategy / f"seed-{seed}.jsonl") as recorder:
        recorder.write_header(header(strategy, seed, **facts))
        for one in rows:
            recorder.write(one)
        if failure:
            recorder.write_failure(failure, "")


def scaled(factor, shift=0.0):
    def seconds(one):
        return None if one.query_seconds is None else one.query_seconds * factor

    return [row(r.round, r.n_labeled, r.accuracy + shift, seconds(r), r.n_scored) for r in ROWS]


@pytest.fixture
def results(tmp_path):
    """Margin and a strategy ten times as fast on two seeds; a partial and a failed cell of a third."""
    for seed in (0, 1):
        cell(tmp_path, "margin", seed, scaled(1 + seed))
        cell(tmp_path, "dgmg", seed, scaled(0.1 * (1 + seed), 0.02 * seed), restrict="diffusion")
    cell(tmp_path, "dgmg", 2, scaled(0.1)[:2], restrict="diffusion")
    cell(tmp_path, "lc", 0, scaled(1)[:1], failure="ValueError: diverged", acquire="least_confidence")
    return tmp_path


def test_the_summary_is_of_finished_cells(results):
    (one,) = group(read_results(results))
    rows = {r.strategy: r for r in summarise(one)}
    assert set(rows) == {"margin", "dgmg"}
    assert rows["dgmg"].final_accuracy.n == 2
    assert rows["dgmg"].final_accuracy.mean == pytest.approx(0.81)
    assert rows["dgmg"].speedup.mean == pytest.approx(10)
    assert rows["margin"].query_seconds.mean == pytest.approx(6)
    assert list(rows) == ["dgmg", "margin"]  # by area


def test_csv_and_markdown_tell_the_same(results):
    groups = group(read_results(results))
    lines = {line["strategy"]: line for line in csv.DictReader(io.StringIO(summary_csv(groups)))}
    assert float(lines["dgmg"]["speedup"]) == pytest.approx(10)
    assert float(lines["dgmg"]["final_accuracy_high"]) == pytest.approx(t_interval([0.80, 0.82]).high)
    text = summary_md(groups)
    assert "profile cpu" in text
    assert "| dgmg     |     2 | 81.0 ± 12.7 |" in " ".join(text.split()).replace("| dgmg |", "| dgmg     |").replace(
        "| 2 |", "|     2 |"
    )
    assert "Abacus, 2 cores, torch 2.x, dgal-bench 01234567" in text
    assert "FAILED, not counted: lc/seed-0, 1 of 3 rows: ValueError: diverged" in text
    assert "PARTIAL, not counted: dgmg/seed-2, 2 of 3 rows" in text


def test_what_must_not_be_mixed_is_kept_apart(results):
    cell(results, "margin", 7, scaled(1), suite="other")
    cell(results, "margin", 8, scaled(1), profile="paper")
    cell(results, "margin", 9, scaled(1), version=2)
    found = {(g.suite, g.profile, g.algorithm_version): len(g.finished("margin")) for g in group(read_results(results))}
    assert found == {("suite", "cpu", 1): 2, ("suite", "cpu", 2): 1, ("suite", "paper", 1): 1, ("other", "cpu", 1): 1}


def test_seeds_of_different_settings_are_never_averaged(tmp_path):
    """SEEDS=0 and then SEEDS=1 with another setting land in one folder."""
    cell(tmp_path, "dgmg", 0, scaled(1))
    cell(tmp_path, "dgmg", 1, scaled(1), graph_k=7)
    (one,) = group(read_results(tmp_path))
    assert [(row.strategy, row.area.n) for row in summarise(one)] == [("dgmg", 1), ("dgmg (graph.graph_k: 20 -> 7)", 1)]
    assert "K = 20/7" in summary_md([one])


def test_a_grid_is_compared_within_its_setting_and_drawn_apart(tmp_path):
    for k, factor in ((10, 1), (20, 3)):
        cell(tmp_path, f"margin+graph.graph_k={k}", 0, scaled(factor), graph_k=k)
        cell(tmp_path, f"dgmg+graph.graph_k={k}", 0, scaled(0.5), graph_k=k, restrict="diffusion")
    (one,) = group(read_results(tmp_path))
    speedups = {row.strategy: row.speedup.mean for row in summarise(one)}
    assert speedups["dgmg+graph.graph_k=10"] == pytest.approx(2)
    assert speedups["dgmg+graph.graph_k=20"] == pytest.approx(6)
    looks = [json.dumps(look) for look in styles(one, list(one.cells)).values()]
    assert len(set(looks)) == 4


def test_without_the_reference_there_is_no_speedup(tmp_path):
    cell(tmp_path, "dgmg", 0, scaled(1))
    (one,) = group(read_results(tmp_path))
    assert summarise(one)[0].speedup is None


def test_the_report_is_written_and_the_same_rows_give_the_same_svg(results, tmp_path):
    first, second = (write_report(results, tmp_path / name) for name in ("a", "b"))
    names = sorted(path.name for path in first.files)
    assert names == [
        "suite-toy-cpu-accuracy-labels.png", "suite-toy-cpu-accuracy-labels.svg",
        "suite-toy-cpu-accuracy-query-time.png", "suite-toy-cpu-accuracy-query-time.svg", "summary.csv", "summary.md",
    ]  # fmt: skip
    for a, b in zip(first.files, second.files, strict=True):
        assert a.stat().st_size > 100
        if a.suffix in (".svg", ".csv", ".md"):
            assert a.read_bytes() == b.read_bytes()


def test_the_curves_are_the_rows(results):
    (one,) = group(read_results(results))
    axes = accuracy_against_query_time(one).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert axes.get_xscale() == "log"
    # the mean over both seeds of the seconds before rows 1 and 2: (3, 6) and (8, 16)
    assert lines["margin"].get_xdata().tolist() == pytest.approx([4.5, 12.0])
    assert lines["dgmg"].get_ydata().tolist() == pytest.approx([0.61, 0.81])


def test_the_frame_follows_the_means_and_no_accuracy_is_above_1(tmp_path):
    """Two seeds that differ by up to 75 points: the t band of their mean leaves 0..1 on both sides."""
    for seed, shift in ((0, -0.1), (1, 0.15)):
        rows = [row(r.round, r.n_labeled, r.accuracy + shift * (r.round + 1), 1.0) for r in ROWS]
        cell(tmp_path, "margin", seed, rows)
    (one,) = group(read_results(tmp_path))
    for draw in FIGURES.values():
        low, high = draw(one).axes[0].get_ylim()
        means = draw(one).axes[0].lines[0].get_ydata()
        assert 0 <= low < min(means)
        assert max(means) <= high <= 1


def test_a_legend_of_many_strategies_stays_in_the_figure(tmp_path):
    """27 of them, as in the suite all, with names as long as they get."""
    for place in range(27):
        cell(tmp_path, f"dgmg+strategy.restrict.score=s{place:02}xxxxx", 0, scaled(1))
    (one,) = group(read_results(tmp_path))
    for draw in FIGURES.values():
        figure = draw(one)
        figure.canvas.draw()
        (legend,) = figure.legends
        box, page = legend.get_window_extent(), figure.bbox
        assert page.y0 <= box.y0 < box.y1 <= page.y1
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert figure.axes[0].get_window_extent().width > 0.4 * page.width


def test_an_installed_wheel_is_named_by_its_version(tmp_path):
    installed = header("margin", 0)
    installed["provenance"] |= {"git": {"revision": None, "dirty": None}, "versions": {"dgal-bench": "9.8.7"}}
    with Recorder(tmp_path / "suite" / "toy" / "margin" / "seed-0.jsonl") as recorder:
        recorder.write_header(installed)
        for one in scaled(1):
            recorder.write(one)
    (one,) = group(read_results(tmp_path))
    assert "dgal-bench 9.8.7;" in summary_md([one])


def test_a_strategy_looks_the_same_everywhere_and_two_never_alike(results):
    (one,) = group(read_results(results))
    looks = {name: json.dumps(look) for name, look in styles(one, list(one.cells)).items()}
    assert len(set(looks.values())) == len(looks) == 3
    assert all(json.dumps(styles(one, [name])[name]) == look for name, look in looks.items())


def graph_table(text):
    lines = text.partition("Labels propagated")[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| strategy"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[part.strip() for part in line.strip("|").split("|")] for line in table]


def test_what_the_graph_knows_stands_beside_the_network(tmp_path):
    """Two seeds: means over them by hand, unreached behind; a directed graph has no converged figure."""
    for seed in (0, 1):
        graph = {"accuracy": 0.3 + 0.2 * seed, "unreached": 0.25}
        converged = {"converged_accuracy": 0.7, "converged_unreached": 0.0, "iterations": 40}
        rows = scaled(1)
        rows[0], rows[2] = replace(rows[0], propagated=graph | converged), replace(rows[2], propagated=graph)
        cell(tmp_path, "margin", seed, rows)
    text = summary_md(group(read_results(tmp_path)))
    assert graph_table(text) == [
        ["(all)", "10", "20.0 ± 0.0", "40.0 ± 127.1 (25.0 unreached)", "70.0 ± 0.0"],
        ["margin", "50", "80.0 ± 0.0", "40.0 ± 127.1 (25.0 unreached)", ""],
    ]


def test_what_the_graph_knows_is_told_apart_where_strategies_began_or_ended_apart(tmp_path):
    """Other first labels, fewer rounds: every line has its own count of labels, and nothing is said of all."""
    fact = {"accuracy": 0.5, "unreached": 0.0, "converged_accuracy": 0.6, "converged_unreached": 0.0}
    rows = [replace(one, propagated=fact) for one in ROWS]
    cell(tmp_path, "margin", 0, rows, rounds=2)
    cell(tmp_path, "margin+rounds=1", 0, [replace(rows[0], n_labeled=40), rows[1]], rounds=1)
    assert [line[:2] for line in graph_table(summary_md(group(read_results(tmp_path))))] == [
        ["margin", "10"], ["margin+rounds=1", "40"],
        ["margin", "20"], ["margin", "50"], ["margin+rounds=1", "20"],
    ]  # fmt: skip


def test_makeshifts_are_said_by_strategy(tmp_path):
    rows = scaled(1)
    rows[0] = replace(rows[0], indices=[1, 2, 3], extra={"topped_up": 2, "indistinct": 1}, halved_to=64)
    rows[1] = replace(rows[1], indices=[4, 5, 6], halved_to=128)
    cell(tmp_path, "badge", 0, rows)
    cell(tmp_path, "margin", 0, scaled(1))
    text = summary_md(group(read_results(tmp_path)))
    assert "Topped up: 1 of 2 queries of badge left fewer candidates than a batch; 2 points were drawn" in text
    assert "Drawn uniformly: 1 of 6 picks of badge, among points it could not tell apart." in text
    assert "Out of memory: 2 rounds of badge went on with down to 64 images a pass." in text
    assert "of margin" not in text


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(ResultsError, match="holds no results"):
        write_report(tmp_path, tmp_path / "out")


def test_a_report_that_cannot_be_written_names_the_knob(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="set --out DIR"):
        write_report(results, tmp_path / "file" / "out")
