"""Figures show what the rows say, and the page's copies of them say whose is what."""

import json
import re
import xml.etree.ElementTree as ET
from math import ceil

import matplotlib as mpl
import numpy as np
import pytest

from benchmarks.generated import LATENTS, generate
from dgal_bench.report.costs import (
    cumulative_query_means,
    cumulative_seconds,
    one_off,
    phase_seconds,
    replays_are_comparable,
    sources_note,
    sums_note,
    targets,
)
from dgal_bench.report.figures import inline_svg, save, used_colours
from dgal_bench.report.groups import group
from dgal_bench.report.plots.bars import labels_to_target, pareto_front, query_time
from dgal_bench.report.plots.curves import accuracy_total_time, seconds_spent
from dgal_bench.report.plots.maps import picks_on_map, read_projection
from dgal_bench.report.plots.rounds import classes, exploration, propagation
from dgal_bench.report.plots.style import RC, styles
from dgal_bench.report.summary import summarise
from dgal_bench.results.reader import read_all_timings, read_results
from tests.test_report import replayed, run, scaled

STRATEGIES = ("random", "margin", "vae_seals", "dgmg")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    generate(folder, ("digits",), STRATEGIES, seeds=range(2), rounds=6, projections=True)
    return folder


@pytest.fixture(scope="module")
def one(root):
    (found,) = group(read_results(root))
    return found


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context(rc=RC):
        yield


def rows(root, strategy):
    """Of both seeds, round by round."""
    files = sorted((root / "paper" / "digits" / strategy).glob("seed-*.jsonl"))
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    return [[line for line in one if line["kind"] == "round"] for one in lines]


def lines(axes):
    return {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in axes.lines}


def test_set_up_is_paid_by_those_whose_queries_rest_on_it(one):
    """VAE-SEALS searches the latents, DGMG walks on the graph too; the others ask for neither."""
    assert {name: one_off(one, name) for name in STRATEGIES} == {
        "random": 0.0, "margin": 0.0, "vae_seals": 300.0, "dgmg": 309.0,
    }  # fmt: skip


def test_seconds_spent_are_the_set_up_and_every_query_so_far(root, one):
    drawn = lines(seconds_spent(one).axes[0])
    for strategy, first in (("margin", 0.0), ("dgmg", 309.0)):
        queries = [[row["query_seconds"] for row in seed[:-1]] for seed in rows(root, strategy)]
        assert drawn[strategy] == pytest.approx(first + np.cumsum(np.mean(queries, axis=0)))
    total = {line.get_label(): line for line in accuracy_total_time(one).axes[0].lines}["dgmg"]
    assert total.get_xdata() == pytest.approx(drawn["dgmg"])


def test_phases_add_up_to_the_query_and_bars_are_its_mean(root, one):
    for strategy in STRATEGIES:
        queries = [row for seed in rows(root, strategy) for row in seed[:-1]]
        mean = {phase: np.mean([row["seconds"].get(phase, 0.0) for row in queries]) for phase in queries[0]["seconds"]}
        assert phase_seconds(one, strategy) == pytest.approx(mean)
    made = query_time(one)
    bars = made.axes[0].patches
    means = sorted(row.query_seconds.mean for row in summarise(one))
    assert [bar.get_x() + bar.get_width() for bar in bars] == pytest.approx(means)
    shares: dict[float, float] = {}
    for part in made.axes[1].patches:
        shares[round(part.get_y(), 3)] = shares.get(round(part.get_y(), 3), 0.0) + part.get_width()
    assert list(shares.values()) == pytest.approx([1.0] * len(STRATEGIES))


def test_classes_exploration_and_what_the_graph_knows_are_the_rows_means(root, one):
    seen = lines(classes(one).axes[0])["margin"]
    expected = []
    for path, seed in zip(sorted((root / "paper/digits/margin").glob("*.jsonl")), rows(root, "margin"), strict=True):
        known = set(json.loads(path.read_text().splitlines()[0])["initial_classes"])
        counts = [len(known)]
        for row in seed[:-1]:
            known |= set(row["classes"])
            counts.append(len(known))
        expected.append(counts)
    assert seen == pytest.approx(np.mean(expected, axis=0))
    boundary, reach = (lines(axes)["dgmg"] for axes in exploration(one).axes)
    assert boundary == pytest.approx([row["boundary_share"] for row in rows(root, "dgmg")[0][:-1]])
    assert reach == pytest.approx([row["reach"] for row in rows(root, "dgmg")[0]])
    network, graph = (lines(axes)["dgmg"] for axes in propagation(one).axes)
    looked_at = [[row for row in seed if "propagated" in row] for seed in rows(root, "dgmg")]
    assert network == pytest.approx(np.mean([[row["accuracy"] for row in seed] for seed in looked_at], axis=0))
    assert graph == pytest.approx(
        np.mean([[row["propagated"]["accuracy"] for row in seed] for seed in looked_at], axis=0)
    )


def test_the_front_is_of_those_that_nobody_beats_in_both(one):
    points = {row.strategy: (row.query_seconds.mean, row.area.mean) for row in summarise(one)}
    front = {
        name
        for name, (cost, area) in points.items()
        if not any(c <= cost and a >= area and (c, a) != (cost, area) for c, a in points.values())
    }
    made = pareto_front(one)
    stairs = next(line for line in made.axes[0].lines if line.get_gid() == "line:front")
    assert set(zip(stairs.get_xdata(), stairs.get_ydata(), strict=True)) == {points[name] for name in front}


def test_a_target_that_not_every_seed_reaches_is_hollow(root, one):
    made = labels_to_target(one)
    hollow = sum(line.get_markerfacecolor() == "none" for line in made.axes[0].lines)
    expected = 0
    for strategy in STRATEGIES:
        for goal in targets(one):
            n = sum(any(row["accuracy"] >= goal for row in seed) for seed in rows(root, strategy))
            expected += 0 < n < 2
    assert hollow == expected


def test_picks_lie_where_the_projection_has_them(root, one):
    made = picks_on_map(one)
    projection = read_projection(root / "paper" / "digits", LATENTS)
    early, late = (line for line in made.axes[0].lines if line.get_gid() == "line:picks")
    names = list(styles(one))
    first = [row["indices"] for row in rows(root, names[0])[0][:-1]]
    for drawn, batches in ((early, first[:2]), (late, first[-2:])):
        expected = projection.of([position for batch in batches for position in batch])[0]
        points = np.column_stack([drawn.get_xdata(), drawn.get_ydata()])
        assert points[: len(expected)] == pytest.approx(expected)  # the first panel is in the middle
    assert len(made.axes[0].images) == len(STRATEGIES)


def test_of_very_many_picks_every_nth_is_drawn(tmp_path):
    generate(tmp_path, ("digits",), ("random",), seeds=(0,), rounds=6, overrides=("batch_size=50",), projections=True)
    (found,) = group(read_results(tmp_path))
    early, _ = (line for line in picks_on_map(found).axes[0].lines if line.get_gid() == "line:picks")
    assert len(early.get_xdata()) == ceil(100 / ceil(100 / 60))


def test_without_a_projection_there_is_no_map_and_with_another_version_of_it_an_error(root, one, tmp_path):
    generate(tmp_path, ("digits",), ("random",), seeds=(0,), rounds=2)
    (bare,) = group(read_results(tmp_path))
    assert picks_on_map(bare) is None


def test_the_pages_copy_has_no_title_or_legend_and_says_whose_is_what(one, tmp_path):
    made = seconds_spent(one)
    paths, svg = save(made, tmp_path / "figure")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert "Set-up and queries" in svg
    copy = inline_svg(svg, made.top, made.bottom, "mine")
    root_ = ET.fromstring(copy)
    texts = ["".join(element.itertext()).strip() for element in root_.iter("{http://www.w3.org/2000/svg}text")]
    assert "queries made" in texts
    assert not any(name in texts for name in STRATEGIES)
    assert "Set-up and queries" not in copy
    marked = {element.get("data-strategy") for element in root_.iter() if element.get("data-strategy")}
    assert marked == set(STRATEGIES)
    assert all(element.get("id", "mine-").startswith("mine-") for element in root_.iter())
    assert not re.search(r"#[0-9a-fA-F]{6}", copy)
    colours = used_colours([copy])
    assert set(re.findall(r"var\(--(\w+)\)", copy)) - {"ink", "faint", "grid", "paper"} == set(colours)
    assert colours["c010101"] == ("#010101", "#FFFFFF")


def test_a_picture_is_on_the_page_once(one, tmp_path):
    made = picks_on_map(one)
    _, svg = save(made, tmp_path / "figure")
    copy = inline_svg(svg, made.top, made.bottom, "mine")
    assert svg.count("<image") == len(STRATEGIES)
    assert copy.count("<image") == 1
    assert copy.count("<use") >= len(STRATEGIES)
    assert "first third of the queries" in copy  # its key is its own


def test_sums_of_seconds_are_of_one_source_or_of_none_replayed(tmp_path):
    """Margin alone is replayed: its curve shows that, and what is added up and compared is of the rows."""
    results = tmp_path
    for seed in (0, 1):
        run(results, "margin", seed, scaled(1 + seed))
        run(results, "dgmg", seed, scaled(0.1 * (1 + seed)), restrict="diffusion")
    replayed(results, "margin", 0, [(70, 70, 70), (70, 70, 70)])
    (one,) = group(read_results(results), read_all_timings(results))
    assert not replays_are_comparable(one)
    assert cumulative_query_means(one, "margin")[-1] == 140
    assert cumulative_seconds(one, "margin")[-1] == pytest.approx((8 + 16) / 2)
    assert "not all were replayed alike" in sums_note(one)
    assert "query times of margin replayed, of others the rows' own" in sources_note(one)
    for seed in (0, 1):
        replayed(results, "margin", seed, [(70, 70, 70), (70, 70, 70)])
        replayed(results, "dgmg", seed, [(7, 7, 7), (7, 7, 7)])
    (one,) = group(read_results(results), read_all_timings(results))
    assert replays_are_comparable(one)
    assert cumulative_seconds(one, "dgmg")[-1] == pytest.approx(7.5 + 14)


def test_variants_are_told_apart_by_dashes_and_then_by_markers(tmp_path):
    for n in range(12):
        run(tmp_path, f"dgmg+strategy.restrict.score=s{n}", 0, scaled(1), restrict="diffusion")
    for name in ("random", "random+graph.graph_k=9"):
        run(tmp_path, name, 0, scaled(1), acquire="random")
    (one,) = group(read_results(tmp_path))
    found = [(look.color, look.marker, str(look.linestyle)) for look in styles(one).values()]
    assert len(set(found)) == len(found) == 14
    for name in ("dgmg+training.max_epochs=9", "dgmg+representation.max_epochs=9"):
        run(tmp_path / "other", name, 0, scaled(1), restrict="diffusion")
    (one,) = group(read_results(tmp_path / "other"))
    assert {look.name for look in styles(one).values()} == set(one.strategies)
