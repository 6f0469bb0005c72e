"""Numbers from rows: by hand, against scipy, and never from unfinished runs."""

import csv
import io
import itertools
from dataclasses import replace
from math import exp, inf, log, sqrt

import pytest
from scipy import stats

from dgal_bench.core.errors import ResultsError
from dgal_bench.report.figures import FIGURES
from dgal_bench.report.groups import group
from dgal_bench.report.notes import space
from dgal_bench.report.plots.curves import accuracy_labels, accuracy_query_time
from dgal_bench.report.plots.style import styles
from dgal_bench.report.statistics import interpolate, ratio_interval, t_interval
from dgal_bench.report.summary import summarise, summary_csv
from dgal_bench.report.write import summary_md, write_report
from dgal_bench.results.metrics import (
    area_under_curve,
    cumulative,
    cumulative_query_seconds,
    mean_query_seconds,
    mean_scored,
)
from dgal_bench.results.reader import read_all_timings, read_results, read_run
from dgal_bench.results.resume import ALGORITHM_VERSION
from dgal_bench.results.rows import (
    COMMON,
    RoundRecord,
    Timing,
    state_digest,
    timings_path,
)
from dgal_bench.results.writer import FileWriter, write_timings
from tests import headers


def row(round_, n_labeled, accuracy, seconds=None, scored=None, jobs=1, busy=0.0):
    return RoundRecord(
        round=round_, n_labeled=n_labeled, accuracy=accuracy, underfit=False, epochs=1, train_loss=0.1, reach=1.0,
        train_seconds=1.0, test_seconds=1.0, threads=1, jobs=jobs, load=0.0, busy_elsewhere=busy,
        query_seconds=seconds, n_scored=scored,
    )  # fmt: skip


ROWS = [row(0, 10, 0.2, 3.0, 90), row(1, 20, 0.6, 5.0, 80), row(2, 50, 0.8)]


def test_the_space_of_a_graph_is_named_with_what_made_it():
    plain = {"encoder": "cnn", "model": None, "path": None}
    assert space(plain | {"kind": "vae", "model": "resnet18"}) == "vae"
    assert space(plain | {"kind": "vae", "encoder": "resnet18"}) == "vae (resnet18)"
    assert space(plain | {"kind": "timm", "model": "resnet50"}) == "timm (resnet50)"
    assert space(plain | {"kind": "npy", "path": "some/where/mine.npy"}) == "npy (mine.npy)"
    assert space(plain | {"kind": "pca", "path": "left over"}) == "pca"


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


def header(
    strategy,
    seed,
    restrict="everything",
    acquire="margin",
    profile="cpu",
    version=ALGORITHM_VERSION,
    graph_k=20,
    rounds=2,
):
    made = headers.header(
        cell=f"toy/{strategy}/seed-{seed}",
        profile=profile,
        config={
            "seed": seed, "profile": profile, "rounds": rounds, "batch_size": 10, "initial_size": 10,
            "restricted_size": 50, "dataset": {"name": "toy"}, "graph": {"graph_k": graph_k},
            "representation": {"kind": "vae", "encoder": "cnn", "model": None, "path": None},
            "strategy": {"name": strategy, "restrict": {"kind": restrict}, "acquire": {"kind": acquire}},
        },
        fingerprint={
            "algorithm_version": version, "config": strategy, "data": "d", "git": "0123456789", "torch": "2.x",
            "device": "cpu", "graph": "g", "latents": "l",
        },
        provenance={"machine": {"cpu": "Abacus", "cores": 2}, "git": {"revision": "0123456789abcdef", "dirty": False}},
        initial=list(range(10)),
    )  # fmt: skip
    made["provenance"]["versions"] = {}
    made["setup"] = {
        "representation": {"kind": "vae", "seconds": 7.0, "label_share": {"latents": 0.9, "pixels": 0.8}},
        "graph": {"seconds": 0.5, "components": 1, "exact": True, "recall": 1.0},
    }
    return made


def run(root, strategy, seed, rows, failure=None, suite="suite", **facts):
    with FileWriter(root / suite / "toy" / strategy / f"seed-{seed}.jsonl") as writer:
        writer.write_header(header(strategy, seed, **facts))
        for one in rows:
            writer.write(one)
        if failure:
            writer.write_failure(failure, "")


def scaled(factor, shift=0.0):
    def seconds(one):
        return None if one.query_seconds is None else one.query_seconds * factor

    return [row(r.round, r.n_labeled, r.accuracy + shift, seconds(r), r.n_scored) for r in ROWS]


@pytest.fixture
def results(tmp_path):
    """Margin and a strategy ten times as fast on two seeds; a partial and a failed run of a third."""
    for seed in (0, 1):
        run(tmp_path, "margin", seed, scaled(1 + seed))
        run(tmp_path, "dgmg", seed, scaled(0.1 * (1 + seed), 0.02 * seed), restrict="diffusion")
    run(tmp_path, "dgmg", 2, scaled(0.1)[:2], restrict="diffusion")
    run(tmp_path, "lc", 0, scaled(1)[:1], failure="ValueError: diverged", acquire="least_confidence")
    return tmp_path


def test_the_summary_is_of_finished_runs(results):
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
    run(results, "margin", 7, scaled(1), suite="other")
    run(results, "margin", 8, scaled(1), profile="paper")
    run(results, "margin", 9, scaled(1), version=1)
    found = {(g.suite, g.profile, g.algorithm_version): len(g.finished("margin")) for g in group(read_results(results))}
    now = ALGORITHM_VERSION
    assert found == {
        ("suite", "cpu", now): 2, ("suite", "cpu", 1): 1, ("suite", "paper", now): 1, ("other", "cpu", now): 1,
    }  # fmt: skip


def test_seeds_of_different_settings_are_never_averaged(tmp_path):
    """SEEDS=0 and then SEEDS=1 with another setting land in one folder."""
    run(tmp_path, "dgmg", 0, scaled(1))
    run(tmp_path, "dgmg", 1, scaled(1), graph_k=7)
    (one,) = group(read_results(tmp_path))
    assert [(row.strategy, row.area.n) for row in summarise(one)] == [("dgmg", 1), ("dgmg (graph.graph_k: 20 -> 7)", 1)]
    assert "K = 20/7" in summary_md([one])


def test_a_grid_is_compared_within_its_setting_and_drawn_apart(tmp_path):
    for k, factor in ((10, 1), (20, 3)):
        run(tmp_path, f"margin+graph.graph_k={k}", 0, scaled(factor), graph_k=k)
        run(tmp_path, f"dgmg+graph.graph_k={k}", 0, scaled(0.5), graph_k=k, restrict="diffusion")
    (one,) = group(read_results(tmp_path))
    speedups = {row.strategy: row.speedup.mean for row in summarise(one)}
    assert speedups["dgmg+graph.graph_k=10"] == pytest.approx(2)
    assert speedups["dgmg+graph.graph_k=20"] == pytest.approx(6)
    assert len({(look.color, look.marker, str(look.linestyle)) for look in styles(one).values()}) == 4


def test_without_the_reference_there_is_no_speedup(tmp_path):
    run(tmp_path, "dgmg", 0, scaled(1))
    (one,) = group(read_results(tmp_path))
    assert summarise(one)[0].speedup is None


@pytest.mark.slow
def test_the_report_is_written_and_the_same_rows_give_the_same_svg(results, tmp_path):
    first, second = (write_report(results, tmp_path / name) for name in ("a", "b"))
    names = [str(path.relative_to(tmp_path / "a")) for path in first.files]
    assert names[:3] == ["report.html", "summary.csv", "summary.md"]
    drawn = [f"figures/suite-toy-cpu-{name}" for name in FIGURES if name not in ("picks", "propagated")]
    drawn.append(f"figures/suite-cpu-v{ALGORITHM_VERSION}-penalties")
    assert names[3:] == [f"{name}.{kind}" for name in drawn for kind in ("png", "svg")]
    for a, b in zip(first.files, second.files, strict=True):
        assert a.stat().st_size > 100
        if a.suffix != ".png":
            assert a.read_bytes() == b.read_bytes()


def test_the_curves_are_the_rows(results):
    (one,) = group(read_results(results))
    axes = accuracy_query_time(one).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert axes.get_xscale() == "log"
    # the mean over both seeds of the seconds before rows 1 and 2: (3, 6) and (8, 16)
    assert lines["margin"].get_xdata().tolist() == pytest.approx([4.5, 12.0])
    assert lines["dgmg"].get_ydata().tolist() == pytest.approx([0.61, 0.81])


def test_the_frame_follows_the_means_and_no_accuracy_is_above_1(tmp_path):
    """Two seeds that differ by up to 75 points: the t band of their mean leaves 0..1 on both sides."""
    for seed, shift in ((0, -0.1), (1, 0.15)):
        rows = [row(r.round, r.n_labeled, r.accuracy + shift * (r.round + 1), 1.0, 9) for r in ROWS]
        run(tmp_path, "margin", seed, rows)
    (one,) = group(read_results(tmp_path))
    for draw in (accuracy_labels, accuracy_query_time):
        low, high = draw(one).axes[0].get_ylim()
        means = draw(one).axes[0].lines[0].get_ydata()
        assert 0 <= low < min(means)
        assert max(means) <= high <= 1


def test_a_legend_of_many_strategies_stays_in_the_figure(tmp_path):
    """28 of them, as in the suite all, with names as long as they get."""
    for place in range(28):
        run(tmp_path, f"dgmg+strategy.restrict.score=s{place:02}xxxxx", 0, scaled(1))
    (one,) = group(read_results(tmp_path))
    for spec in (FIGURES["accuracy-labels"], FIGURES["exploration"]):
        figure = spec.draw(one).figure
        figure.canvas.draw()
        (legend,) = figure.legends
        box, page = legend.get_window_extent(), figure.bbox
        assert page.y0 <= box.y0 < box.y1 <= page.y1
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert sum(axes.get_window_extent().width for axes in figure.axes) > 0.4 * page.width
        assert box.y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes)
        assert box.y0 >= max(text.get_window_extent().y1 for text in figure.texts if text.get_gid() == "note")


def test_an_installed_wheel_is_named_by_its_version(tmp_path):
    installed = header("margin", 0)
    installed["provenance"] |= {"git": {"revision": None, "dirty": None}, "versions": {"dgal-bench": "9.8.7"}}
    with FileWriter(tmp_path / "suite" / "toy" / "margin" / "seed-0.jsonl") as writer:
        writer.write_header(installed)
        for one in scaled(1):
            writer.write(one)
    (one,) = group(read_results(tmp_path))
    assert "dgal-bench 9.8.7;" in summary_md([one])


def test_a_strategy_looks_the_same_everywhere_and_two_never_alike(results):
    (one,) = group(read_results(results))
    found = styles(one)
    assert len(set(map(str, found.values()))) == len(found) == 2
    for name, look in found.items():
        alone = replace(one, runs={name: one.runs[name]})
        assert styles(alone) == {name: look}


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
        run(tmp_path, "margin", seed, rows)
    text = summary_md(group(read_results(tmp_path)))
    assert graph_table(text) == [
        ["(all)", "10", "20.0 ± 0.0", "40.0 ± 127.1 (25.0 unreached)", "70.0 ± 0.0"],
        ["margin", "50", "80.0 ± 0.0", "40.0 ± 127.1 (25.0 unreached)", ""],
    ]


def test_what_the_graph_knows_is_told_apart_where_strategies_began_or_ended_apart(tmp_path):
    """Other first labels, fewer rounds: every line has its own count of labels, and nothing is said of all."""
    fact = {"accuracy": 0.5, "unreached": 0.0, "converged_accuracy": 0.6, "converged_unreached": 0.0}
    rows = [replace(one, propagated=fact) for one in ROWS]
    run(tmp_path, "margin", 0, rows, rounds=2)
    run(tmp_path, "margin+rounds=1", 0, [replace(rows[0], n_labeled=40), rows[1]], rounds=1)
    assert [line[:2] for line in graph_table(summary_md(group(read_results(tmp_path))))] == [
        ["margin", "10"], ["margin+rounds=1", "40"],
        ["margin", "20"], ["margin", "50"], ["margin+rounds=1", "20"],
    ]  # fmt: skip


def test_makeshifts_are_said_by_strategy(tmp_path):
    rows = scaled(1)
    rows[0] = replace(rows[0], indices=[1, 2, 3], extra={"topped_up": 2, "indistinct": 1}, halved_to=64)
    rows[1] = replace(rows[1], indices=[4, 5, 6], halved_to=128)
    run(tmp_path, "badge", 0, rows)
    run(tmp_path, "margin", 0, scaled(1))
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


def replayed(
    root, strategy, seed, seconds, equal=True, jobs=1, rounds=(0, 1), machine="Abacus", digest_of=None, busy=0.0
):
    """A timings file of a run: of each round's repeats these seconds."""
    path = root / "suite" / "toy" / strategy / f"seed-{seed}.jsonl"
    facts = header(strategy, seed)
    facts["provenance"]["machine"]["cpu"] = machine
    timings_header = {
        "cell": f"toy/{strategy}/seed-{seed}", "common": None, "picks": digest_of or state_digest(read_run(path)),
        "rounds": list(rounds), "repeats": 3, "changed": [], "when": "now",
        "fingerprint": facts["fingerprint"], "provenance": facts["provenance"],
    }  # fmt: skip
    lines = [timing(strategy, n, each, equal, jobs, busy) for n, each in zip(rounds, seconds, strict=True)]
    write_timings(timings_path(path), timings_header, lines)


def timing(strategy, round_, seconds, equal=True, jobs=1, busy=0.0):
    return Timing(strategy, round_, list(seconds), {"infer": 1.0}, 90, 80, equal, jobs, 0.0, busy)


def tables(root):
    """The one group, its rows of the main table by strategy, and the whole text."""
    (one,) = group(read_results(root), read_all_timings(root))
    text = summary_md([one])
    found = itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(
        lambda line: not line.startswith("| strategy"), text.splitlines()))  # fmt: skip
    runs = [[part.strip() for part in line.strip("|").split("|")] for line in found]
    return one, {line[0]: line for line in runs[2:]}, text


def test_replayed_times_are_preferred_and_named(results):
    """Margin's 2 s (the median of 1, 2 and 9) and 4 s, dgmg's 1 and 2: no row's seconds are in the table."""
    replayed(results, "margin", 0, [(1, 9, 2), (4, 4, 4)])
    replayed(results, "dgmg", 0, [(1, 1, 1), (2, 2, 2)])
    one, rows, text = tables(results)
    assert (rows["margin"][4], rows["margin"][6]) == ("3000.00", "1")
    assert (rows["dgmg"][4], rows["dgmg"][6]) == ("1500.00", "2")
    assert "Query times of all strategies are replayed: rounds 0, 1 of seed 0, median of 3, on Abacus" in text
    assert "; nothing ran beside." in text
    lines = {line["strategy"]: line for line in csv.DictReader(io.StringIO(summary_csv([one])))}
    assert {line["query_source"] for line in lines.values()} == {"replay"}
    assert float(lines["dgmg"]["query_seconds"]) == 1.5


def test_a_speedup_is_of_one_source_on_both_sides(results):
    """Only dgmg has a replay: its time is told from that, its speed-up (10) from the rows."""
    replayed(results, "dgmg", 0, [(1, 1, 1), (2, 2, 2)])
    one, rows, text = tables(results)
    assert rows["dgmg"][4] == "1500.00"
    assert rows["dgmg"][6].startswith("10 [")
    assert "Query times of dgmg are replayed" in text
    assert "Query times of the others are the rows' own." in text
    assert "Speed-ups of all strategies are of the rows' own times: no replay of the same rounds on the same" in text
    line = {line["strategy"]: line for line in csv.DictReader(io.StringIO(summary_csv([one])))}["dgmg"]
    assert (line["query_source"], line["speedup_source"]) == ("replay", "rows")


@pytest.mark.parametrize("facts", [{"machine": "Another"}, {"rounds": (1,), "seconds": [(1, 1, 1)]}])
def test_replays_that_cannot_be_compared_give_no_ratio(results, facts):
    """Both query times are replays, the speed-up between them is not, and nothing is mixed silently."""
    replayed(results, "margin", 0, **{"seconds": [(3, 3, 3), (3, 3, 3)], **facts})
    replayed(results, "dgmg", 0, [(1, 1, 1), (2, 2, 2)])
    _, rows, text = tables(results)
    assert rows["dgmg"][6].startswith("10 [")
    assert "\nSpeed-ups of dgmg are of the rows' own times: no replay of the same rounds on the same machine" in text
    assert ("These query times are means over different rounds" in text) == ("rounds" in facts)
    assert "the others" not in text


def test_where_all_is_of_one_replay_nothing_is_said_to_be_mixed(results):
    for strategy in ("margin", "dgmg"):
        replayed(results, strategy, 0, [(1, 1, 1), (2, 2, 2)])
    _, _, text = tables(results)
    for said in ("Speed-ups of", "different rounds", "the others"):
        assert said not in text


def test_a_replay_that_picked_others_or_is_of_other_rows_is_not_used(results):
    before = tables(results)[1]
    replayed(results, "margin", 0, [(1, 1, 1), (1, 1, 1)], equal=False)
    replayed(results, "dgmg", 1, [(1, 1, 1), (1, 1, 1)], digest_of="of before")
    _, rows, text = tables(results)
    assert rows == before
    assert "Replay not used: margin/seed-0 picked others than its rows say in round 0, 1." in text
    assert "Replay not used: timings-seed-1.jsonl is of other rows than dgmg/seed-1 has now." in text


def test_times_taken_beside_other_work_are_marked_and_no_others(tmp_path):
    """Of margin one query in four ran beside another run; lc's neighbour was busy; dgmg's last row has no query."""
    alone = scaled(1)
    crowded = [alone[0], replace(alone[1], jobs=2), alone[2]]
    busy = [replace(alone[0], busy_elsewhere=0.11), *alone[1:]]
    quiet = [replace(alone[0], busy_elsewhere=0.1), alone[1], replace(alone[2], jobs=9)]
    for strategy, rows in (("margin", [alone, crowded]), ("lc", [busy, alone]), ("dgmg", [quiet, quiet])):
        for seed, one in enumerate(rows):
            run(tmp_path, strategy, seed, one)
    _, rows, text = tables(tmp_path)
    assert {name: row[4].endswith(" *") for name, row in rows.items()} == {
        "margin": True, "lc": True, "dgmg": False,
    }  # fmt: skip
    assert all(row[6].endswith(" *") for name, row in rows.items())  # margin is in each ratio
    assert text.count("Times marked * were taken beside other work") == 1
    replayed(tmp_path, "margin", 0, [(1, 1, 1), (1, 1, 1)])
    replayed(tmp_path, "lc", 0, [(1, 1, 1), (1, 1, 1)], jobs=2)
    _, rows, text = tables(tmp_path)
    marks = {name: (row[4].endswith(" *"), row[6].endswith(" *")) for name, row in rows.items()}
    # dgmg has no replay: its ratio is that of rows, margin's disturbed ones among them
    assert marks == {"margin": (False, False), "lc": (True, True), "dgmg": (False, True)}


def test_without_other_work_there_is_no_mark_and_no_legend(tmp_path):
    run(tmp_path, "margin", 0, scaled(1))
    one, _, text = tables(tmp_path)
    assert "*" not in text
    assert [line["query_beside"] for line in csv.DictReader(io.StringIO(summary_csv([one])))] == ["no"]


def csv_of(group_, strategy):
    return {line["strategy"]: line for line in csv.DictReader(io.StringIO(summary_csv([group_])))}[strategy]


def test_what_is_not_known_is_neither_marked_nor_told_to_have_been_alone(tmp_path):
    """Margin's rows are of before it was recorded; one of lc's queries ran beside another run all the same."""
    silent = [replace(one, busy_elsewhere=None) for one in scaled(1)]
    run(tmp_path, "margin", 0, silent)
    run(tmp_path, "dgmg", 0, scaled(0.1))
    run(tmp_path, "lc", 0, [silent[0], replace(silent[1], jobs=2), silent[2]])
    one, rows, text = tables(tmp_path)
    assert {name: row[4].endswith("*") for name, row in rows.items()} == {"margin": False, "dgmg": False, "lc": True}
    assert "It is not known what else ran during the query times of margin and the speed-ups of" in text
    found = {name: (csv_of(one, name)["query_beside"], csv_of(one, name)["speedup_beside"]) for name in rows}
    assert found == {"margin": ("unknown", "unknown"), "dgmg": ("no", "unknown"), "lc": ("yes", "yes")}


def test_of_a_replay_where_it_is_not_known_what_ran_nothing_is_promised(tmp_path):
    run(tmp_path, "margin", 0, scaled(1))
    replayed(tmp_path, "margin", 0, [(1, 1, 1), (1, 1, 1)], busy=None)
    one, _, text = tables(tmp_path)
    assert "; what else ran is not known." in text
    assert "nothing ran beside" not in text
    assert csv_of(one, "margin")["query_beside"] == "unknown"


def test_with_one_seed_an_intervals_ends_are_empty(tmp_path):
    for strategy, factor in (("margin", 1), ("dgmg", 0.1)):
        run(tmp_path, strategy, 0, scaled(factor))
    line = csv_of(tables(tmp_path)[0], "dgmg")
    assert float(line["speedup"]) == pytest.approx(10)
    ends = {name: value for name, value in line.items() if name.endswith(("_low", "_high"))}
    assert ends == dict.fromkeys(ends, "")
    assert len(ends) == 12


def small_print(made):
    found = [text.get_text() for text in made.figure.texts if text.get_gid() == "note"]
    return " ".join(" ".join(found).split())


def test_between_replayed_rounds_times_are_linear():
    assert interpolate({0: 1.0, 4: 9.0, 5: 7.0}, 6) == pytest.approx([1, 3, 5, 7, 9, 7])
    assert interpolate({0: 5.0}, 1) == [5]
    assert cumulative([1, 2, 3]) == [0, 1, 3, 6]


def test_the_figure_shows_replayed_times_where_there_are_any_and_says_so(tmp_path):
    """Five rounds, two of them replayed: 1 s and 5 s with 2, 3 and 4 between; lc has rows only, 1 s each."""
    rows = [row(n, 10 + n, 0.1 * n, 1.0 if n < 5 else None, 9) for n in range(6)]
    for strategy in ("margin", "lc"):
        run(tmp_path, strategy, 0, rows, rounds=5, acquire=strategy)
    replayed(tmp_path, "margin", 0, [(1, 1, 1), (5, 5, 5)], rounds=(0, 4))
    (one,) = group(read_results(tmp_path), read_all_timings(tmp_path))
    made = accuracy_query_time(one)
    lines = {line.get_label(): line for line in made.axes[0].lines}
    assert lines["margin"].get_xdata().tolist() == pytest.approx([1, 3, 6, 10, 15])
    assert lines["lc"].get_xdata().tolist() == pytest.approx([1, 2, 3, 4, 5])
    assert "query times of all but lc replayed at rounds 0, 4, linear between them" in small_print(made)
    assert "replayed" not in small_print(accuracy_labels(one))


@pytest.mark.parametrize("rounds", [(0,), (4,), (0, 3), (1, 4)])
def test_the_figure_makes_nothing_up_outside_of_what_was_replayed(tmp_path, rounds):
    rows = [row(n, 10 + n, 0.1 * n, 1.0 if n < 5 else None, 9) for n in range(6)]
    run(tmp_path, "margin", 0, rows, rounds=5)
    replayed(tmp_path, "margin", 0, [(7, 7, 7)] * len(rounds), rounds=rounds)
    made = accuracy_query_time(tables(tmp_path)[0])
    assert made.axes[0].lines[0].get_xdata().tolist() == pytest.approx([1, 2, 3, 4, 5])
    assert "replayed" not in small_print(made)


def test_all_strategies_on_one_state_have_a_table_of_their_own(results):
    """Beside the main table: sorted by mean, the labels of each round, a mark where something ran beside."""
    path = results / "suite" / "toy" / "margin" / "seed-0.jsonl"
    facts = header("margin", 0)
    common = {
        "cell": "toy/margin/seed-0", "common": "toy/margin/seed-0", "picks": state_digest(read_run(path)),
        "rounds": [0, 1], "repeats": 3, "changed": [], "when": "now", "fingerprint": facts["fingerprint"],
        "provenance": facts["provenance"],
    }  # fmt: skip
    lines = [timing("margin", 0, [4, 4, 4]), timing("margin", 1, [6, 6, 6])]
    lines += [timing("dgmg", n, [1 + n] * 3, equal=None, busy=0.5) for n in (0, 1)]
    write_timings(path.parent.parent / COMMON, common, lines)
    _, rows, text = tables(results)
    assert rows["margin"][4].startswith("6000.00")  # the rows', not the state's
    table = text.partition("Every strategy on one state, the network and pool of toy/margin/seed-0 at rounds 0, 1")[2]
    assert [" ".join(line.split()) for line in table.splitlines()[4:6]] == [
        "| dgmg | 1000.00 | 2000.00 | 1500.00 * | 80 |",
        "| margin | 4000.00 | 6000.00 | 5000.00 | 80 |",
    ]
    assert "10 labels | 20 labels" in table
    write_timings(path.parent.parent / COMMON, common, [replace(lines[0], picks_equal=False), *lines[1:]])
    assert "Every strategy on one state" not in tables(results)[2]


def never_begun(root, strategy, seed, error=None, why=None, **facts):
    """What a run leaves that could not even be set up."""
    full = header(strategy, seed, **facts)
    fingerprint = {name: full["fingerprint"][name] for name in ("algorithm_version", "config")}
    outline = {name: full[name] for name in ("cell", "profile", "config", "provenance")}
    with FileWriter(root / "suite" / "toy" / strategy / f"seed-{seed}.jsonl") as writer:
        writer.write_header(outline | {"fingerprint": fingerprint})
        if error:
            writer.write_failure(error, "")
        if why:
            writer.write_skipped(why)


@pytest.mark.slow
def test_runs_that_never_began_are_shown_with_their_group_and_never_counted(results, tmp_path):
    counted = [(row.strategy, row.area.n) for row in summarise(group(read_results(results))[0])]
    never_begun(results, "badge", 0, error="Traceback\n  deep inside\nRuntimeError: out of memory")
    never_begun(results, "ganvae", 0, why="embeddings have no images to train on")
    (one,) = group(read_results(results))
    assert [(row.strategy, row.area.n) for row in summarise(one)] == counted
    text = summary_md([one])
    assert "FAILED, not counted: badge/seed-0, 0 of 3 rows: RuntimeError: out of memory\n" in text
    assert "SKIPPED, not counted: ganvae/seed-0, 0 of 3 rows: embeddings have no images to train on\n" in text
    assert "MISSING: margin has no seed 2.\n" in text
    assert "MISSING: badge has no seed 1, 2.\n" in text
    assert "MISSING: dgmg" not in text
    write_report(results, tmp_path / "out")


def test_a_folder_of_nothing_but_runs_that_never_began_has_a_report(tmp_path):
    never_begun(tmp_path, "margin", 0, error="RuntimeError: no room")
    written = write_report(tmp_path, tmp_path / "out")
    assert "No run has begun." in written.summary
    assert "FAILED, not counted: margin/seed-0, 0 of 3 rows: RuntimeError: no room" in written.summary
    assert [path.name for path in written.files] == ["report.html", "summary.csv", "summary.md"]


def test_runs_of_other_data_stay_apart_and_what_never_began_is_told_once(tmp_path):
    for strategy, data in (("margin", "one"), ("lc", "two")):
        made = header(strategy, 0)
        made["fingerprint"]["data"] = data
        with FileWriter(tmp_path / "suite" / "toy" / strategy / "seed-0.jsonl") as writer:
            writer.write_header(made)
            for one in scaled(1):
                writer.write(one)
    never_begun(tmp_path, "badge", 0, error="no")
    groups = group(read_results(tmp_path))
    assert [(one.name, list(one.runs)) for one in groups] == [
        ("suite/toy (data one)", ["margin"]), ("suite/toy (data two)", ["lc"]),
    ]  # fmt: skip
    assert summary_md(groups).count("FAILED, not counted: badge/seed-0") == 1


@pytest.mark.parametrize("change", [{"query_seconds": None}, {"query_seconds": 0.0}, {"n_scored": None}])
def test_rows_without_a_query_are_refused_not_averaged(tmp_path, change):
    rows = scaled(1)
    run(tmp_path, "margin", 0, [rows[0], replace(rows[1], **change), rows[2]])
    with pytest.raises(ResultsError, match="of the query of round 1"):
        group(read_results(tmp_path))
