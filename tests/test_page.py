"""report.html: its numbers are the rows', it is whole in itself, and whatever a file says is text on it."""

import csv
import io
import json
import os
import re
import shlex
import signal
import threading
import time
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from benchmarks.generated import generate
from dgal_bench.cli.main import main
from dgal_bench.cli.options import axes_of, parse_arguments, settings_of
from dgal_bench.core.errors import ResultsError
from dgal_bench.engines.progress import BarProgress
from dgal_bench.engines.sweep import plan_runs
from dgal_bench.report import figures, write
from dgal_bench.report.groups import Group, group
from dgal_bench.report.notes import rerun_command, unfinished_lines
from dgal_bench.report.write import write_report
from dgal_bench.results.reader import read_results
from dgal_bench.results.resume import ALGORITHM_VERSION
from tests.test_report import ROWS, never_begun, row, run, scaled

STRATEGIES = ("random", "margin", "rsmg", "dgmg")
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Elements with their attributes, the text, and every number with where it stands."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.numbers, self._open = [], [], {}, []
        self.feed(text)
        self.close()
        assert self._open == [], "elements that nobody closed"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append((tag, attributes))
        if tag == "data":
            section, table, strategy = (self._around(key) for key in ("section", "table", "strategy"))
            self.numbers[section, table, strategy, attributes["data-measure"]] = float(attributes["value"])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> where <{opened}> is open"

    def handle_data(self, data):
        if not any(tag in ("style", "script") for tag, _ in self._open):
            self.text.append(data)

    def _around(self, what):
        found = [a.get("id") if what == "section" else a.get(f"data-{what}") for tag, a in self._open
                 if (tag == "section") == (what == "section")]  # fmt: skip
        return next(one for one in reversed(found) if one)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    generate(root, ("digits",), STRATEGIES, seeds=range(3), rounds=6)
    return root


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "DPI", 10)  # no test looks at the PNG files
        return write_report(results, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(report):
    return Page(report.files[0].read_text())


def rows_of(path):
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == "round"]


def recomputed(root, strategy):
    """Measures of each seed from the lines of the files alone."""
    found = {}
    for path in sorted((root / "paper" / "digits" / strategy).glob("seed-*.jsonl")):
        rows = rows_of(path)
        labels, accuracy = ([one[key] for one in rows] for key in ("n_labeled", "accuracy"))
        widths = [b - a for a, b in pairwise(labels)]
        areas = [width * (a + b) / 2 for width, (a, b) in zip(widths, pairwise(accuracy), strict=True)]
        seconds = [one["query_seconds"] for one in rows[:-1]]
        found[path.stem] = {
            "final_accuracy": accuracy[-1],
            "area": sum(areas) / (labels[-1] - labels[0]),
            "query_seconds": sum(seconds) / len(seconds),
            "n_scored": sum(one["n_scored"] for one in rows[:-1]) / len(seconds),
        }
    return found


def test_the_page_the_csv_and_the_rows_tell_the_same_numbers(results, report, page):
    lines = {line["strategy"]: line for line in csv.DictReader(io.StringIO(report.files[1].read_text()))}
    assert set(lines) == set(STRATEGIES)
    margin = recomputed(results, "margin")
    for strategy, line in lines.items():
        each = recomputed(results, strategy)
        shown = {
            measure: value
            for (section, table, name, measure), value in page.numbers.items()
            if (section, table, name) == ("paper-digits-cpu", "main", strategy)
        }
        for measure in ("final_accuracy", "area", "query_seconds", "n_scored"):
            values = [one[measure] for one in each.values()]
            assert shown[measure] == float(line[measure]) == pytest.approx(np.mean(values), rel=1e-12)
            if measure != "n_scored":
                low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
                assert float(line[f"{measure}_low"]) == pytest.approx(low)
                assert float(line[f"{measure}_high"]) == pytest.approx(high)
        ratios = [margin[seed]["query_seconds"] / one["query_seconds"] for seed, one in each.items()]
        assert shown["speedup"] == float(line["speedup"]) == pytest.approx(stats.gmean(ratios))
        assert int(shown["n_seeds"]) == int(line["n_seeds"]) == 3
        setup = {"dgmg": 309.0}.get(strategy, 0.0)
        assert shown["setup_seconds"] == float(line["setup_seconds"]) == setup


def test_differences_and_their_tests_are_the_same_on_the_page_in_the_csv_and_in_scipy(results, report, page):
    lines = {line["strategy"]: line for line in csv.DictReader(io.StringIO(report.files[1].read_text()))}
    for opponent in ("margin", "random"):
        theirs = [one["area"] for one in recomputed(results, opponent).values()]
        for strategy in set(STRATEGIES) - {opponent}:
            ours = [one["area"] for one in recomputed(results, strategy).values()]
            expected = {f"area_vs_{opponent}": np.subtract(ours, theirs).mean(),
                        f"area_vs_{opponent}_p": stats.ttest_rel(ours, theirs).pvalue}  # fmt: skip
            for measure, value in expected.items():
                shown = page.numbers["paper-digits-cpu", "comparisons", strategy, measure]
                assert shown == float(lines[strategy][measure]) == pytest.approx(value)
    assert "0.25 with 3 seeds" in " ".join("".join(page.text).split())  # the smallest p of 3 differences


def test_labels_needed_and_accuracy_at_equal_time_are_the_rows(results, page):
    goals = {key[3] for key in page.numbers if key[1] == "targets"}
    assert len(goals) == 3
    for goal in goals:
        target = float(goal.removeprefix("labels_to_"))
        for strategy in STRATEGIES:
            first = [
                next((one["n_labeled"] for one in rows_of(path) if one["accuracy"] >= target), None)
                for path in (results / "paper" / "digits" / strategy).glob("seed-*.jsonl")
            ]
            reached = [labels for labels in first if labels is not None]
            shown = page.numbers.get(("paper-digits-cpu", "targets", strategy, goal))
            assert shown == (pytest.approx(np.mean(reached)) if reached else None)
    # margin spends its own total on all of its queries, and nothing else
    finals = [one["final_accuracy"] for one in recomputed(results, "margin").values()]
    own = page.numbers["paper-digits-cpu", "budgets", "margin", "accuracy_at_margin"]
    assert own == pytest.approx(np.mean(finals))
    assert ("paper-digits-cpu", "budgets", "dgmg", "accuracy_at_margin") not in page.numbers  # not even set up


def test_the_page_needs_nothing_but_itself(report, page):
    text = report.files[0].read_text()
    assert len(text) < 2_000_000
    targets = [a.get(key) for _, a in page.elements for key in ("src", "href", "xlink:href", "srcset", "action")]
    assert {target[:5] for target in targets if target and not target.startswith("#")} <= {"data:"}
    assert not re.findall(r"url\((?!#)|@import", text)
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    wanted = re.findall(r"url\(#([^)]+)\)", text) + [target[1:] for target in targets if target and target[0] == "#"]
    assert set(wanted) <= set(ids)


def test_every_figure_is_there_and_a_strategy_has_one_colour_in_all_of_them(report, page):
    drawn = [a["data-figure"] for tag, a in page.elements if tag == "figure"]
    assert drawn[:-1] == [name for name in figures.FIGURES if name != "picks"]
    assert sum(tag == "figcaption" for tag, _ in page.elements) == len(drawn)
    text = report.files[0].read_text()
    for strategy, colour in (("margin", "c0072b2"), ("rsmg", "ce69f00"), ("dgmg", "cd55e00"), ("random", "c010101")):
        parts = re.findall(rf'<g data-strategy="{strategy}">.*?</g>', text, flags=re.DOTALL)
        assert len(parts) > 10
        assert all(set(re.findall(r"var\(--(c[0-9a-f]{6})\)", part)) <= {colour} for part in parts)
        assert len(re.findall(rf"--{colour}: #[0-9A-Fa-f]{{6}}", text)) == 3  # light, dark and print


def test_from_a_row_one_reaches_its_runs_and_the_command_that_runs_them_again(results, page, report):
    """The command's own configuration has the hash of the header, whichever way the run was asked for."""
    links = [a["href"][1:] for tag, a in page.elements if tag == "a" and "-cells-" in a.get("href", "")]
    assert len(links) == len(STRATEGIES)
    assert set(links) <= {a["id"] for tag, a in page.elements if tag == "details" and a.get("id")}
    shown = report.files[0].read_text()
    for log in read_results(results):
        told = rerun_command(log)
        assert (told is None) == (log.path.parent.name == "full_supervision")
        if told is not None:
            assert told in shown
            assert hash_of_command(told) == log.header["fingerprint"]["config"]


def hash_of_command(told):
    words = parse_arguments(shlex.split(told)[2:])
    (job,) = plan_runs(axes_of(words, {}), settings_of(words, "single"))
    return job.config.hash


@pytest.mark.parametrize(
    ("strategy", "overrides"),
    [
        ("dgmg+strategy.restrict.score=margin", ("graph.graph_k=7", "net.channels=[8,8]", "representation.seed=cell")),
        ("seals_matched", ("rounds=4", "training.lr=0.01", "net.input_size=32", "balanced=true")),
    ],
)
def test_a_command_says_what_is_not_the_default(tmp_path, strategy, overrides):
    generate(tmp_path, ("digits",), (strategy,), seeds=(3,), rounds=None if "rounds=4" in overrides else 2,
             overrides=overrides)  # fmt: skip
    (log,) = [log for log in read_results(tmp_path) if log.path.parent.name != "full_supervision"]
    assert hash_of_command(rerun_command(log)) == log.header["fingerprint"]["config"]


NASTY = "<img src=x onerror=alert(1)>&\"'"


def test_names_and_errors_are_text_whatever_they_hold(tmp_path, few_figures):
    for seed in (0, 1):
        run(tmp_path, NASTY, seed, scaled(1))
    run(tmp_path, "margin", 0, scaled(1)[:1], failure="ValueError: <script>alert('boo')</script> | <b>")
    never_begun(tmp_path, "ganvae", 0, why="</section><h1>gone</h1>")
    written = write_report(tmp_path, tmp_path / "out")
    found = Page(written.files[0].read_text())
    tags = {tag for tag, _ in found.elements}
    assert "img" not in tags
    assert "b" not in tags
    assert sum(tag == "script" for tag, _ in found.elements) == 1
    assert sum(tag == "h1" for tag, _ in found.elements) == 1
    assert not any(key.startswith("on") for _, attributes in found.elements for key in attributes)
    text = "".join(found.text)
    assert NASTY in text
    assert "ValueError: <script>alert('boo')</script> | <b>" in text
    assert "</section><h1>gone</h1>" in text
    assert NASTY in {key[2] for key in found.numbers}
    for line in written.summary.splitlines():
        assert not re.search(r"(?<!\\)<(script|img|b|h1|/section)", line), line


def sections(written):
    found = Page(written.files[0].read_text())
    return [a["id"] for tag, a in found.elements if tag == "section"], "".join(found.text), found


def test_what_is_not_counted_stands_on_top(tmp_path, few_figures):
    run(tmp_path, "margin", 0, scaled(1))
    run(tmp_path, "margin", 1, scaled(1)[:2])
    run(tmp_path, "lc", 0, scaled(1)[:1], failure="RuntimeError: diverged")
    never_begun(tmp_path, "badge", 0, error="OSError: no room")
    ids, text, found = sections(write_report(tmp_path, tmp_path / "out"))
    assert ids[0] == "trouble"
    assert "Not counted: 5" in text
    for line in (
        "FAILED, not counted: lc/seed-0, 1 of 3 rows: RuntimeError: diverged",
        "FAILED, not counted: badge/seed-0, 0 of 3 rows: OSError: no room",
        "PARTIAL, not counted: margin/seed-1, 2 of 3 rows",
        "MISSING: lc has no seed 1.",
    ):
        assert text.index(line) < text.index("final accuracy %")
    assert {key[2] for key in found.numbers if key[1] == "main"} == {"margin"}


SET_APART = ({"cores": 64}, {"profile": "paper"}, {"version": 1})


def moved(root, strategy, seed, cpu="Abacus", cores=2, profile="cpu", version=ALGORITHM_VERSION):
    """A finished run of some machine."""
    run(root, strategy, seed, scaled(1), profile=profile, version=version)
    path = root / "suite" / "toy" / strategy / f"seed-{seed}.jsonl"
    first, *rest = path.read_text().splitlines()
    facts = json.loads(first)
    facts["provenance"]["machine"] |= {"cpu": cpu, "cores": cores}
    path.write_text("\n".join([json.dumps(facts), *rest]) + "\n")


@pytest.mark.parametrize(
    "other",
    [{"cpu": "Slide rule"}, *(pytest.param(one, marks=pytest.mark.slow) for one in SET_APART)],
    ids=str,
)
def test_machines_profiles_and_versions_are_kept_apart(tmp_path, few_figures, other):
    for seed in (0, 1):
        moved(tmp_path, "margin", seed)
        moved(tmp_path, "dgmg", seed)
    moved(tmp_path, "margin", 2, **other)
    found = group(read_results(tmp_path))
    assert sorted(sorted(log.header["config"]["seed"] for log in one.runs["margin"]) for one in found) == [[0, 1], [2]]
    assert len({one.slug for one in found}) == 2
    assert len({(one.name, one.profile, one.algorithm_version) for one in found}) == 2
    ids, text, _ = sections(write_report(tmp_path, tmp_path / "out"))
    assert len([one for one in ids if one.startswith("suite-toy")]) == 2
    if "cpu" in other:
        assert "suite/toy (on Slide rule, 2 cores)" in text


def test_a_run_that_went_on_elsewhere_is_of_neither_machine(tmp_path):
    moved(tmp_path, "margin", 0)
    moved(tmp_path, "margin", 1)
    path = tmp_path / "suite" / "toy" / "margin" / "seed-1.jsonl"
    lines = path.read_text().splitlines()
    elsewhere = json.loads(lines[0])["provenance"]
    elsewhere["machine"] = elsewhere["machine"] | {"cpu": "Slide rule"}
    going_on = {"kind": "continuation", "changed": ["cpu: 'Abacus' -> 'Slide rule'"], "provenance": elsewhere}
    path.write_text("\n".join([*lines[:2], json.dumps(going_on), *lines[2:]]) + "\n")
    found = {one.machine: len(one.finished("margin")) for one in group(read_results(tmp_path))}
    assert found == {"Abacus, 2 cores": 1, "Abacus, 2 cores, then Slide rule, 2 cores": 1}


@pytest.mark.slow
def test_one_seed_has_numbers_and_no_intervals(tmp_path):
    run(tmp_path, "margin", 0, scaled(1))
    run(tmp_path, "random", 0, scaled(0.1), acquire="random")
    written = write_report(tmp_path, tmp_path / "out")
    _, text, found = sections(written)
    assert found.numbers["suite-toy-cpu", "main", "margin", "area"] == pytest.approx(25 / 40)
    assert ("suite-toy-cpu", "comparisons", "margin", "area_vs_random_p") not in found.numbers
    assert "inf" not in text.replace("information", "")
    assert "nan" not in text


def test_strategies_of_different_lengths_are_compared_where_both_were_evaluated(tmp_path, few_figures):
    """Three rows against two: the difference of areas is over the first two numbers of labels, 10 and 20."""
    for seed in (0, 1):
        run(tmp_path, "margin", seed, scaled(1, 0.01 * seed))
        run(tmp_path, "lc", seed, [*scaled(1)[:1], row(1, 20, 0.7)], rounds=1)
    _, text, found = sections(write_report(tmp_path, tmp_path / "out"))
    # margin (0.2 + 0.6) / 2 and 0.01 more with seed 1; lc (0.2 + 0.7) / 2
    gap = found.numbers["suite-toy-cpu", "comparisons", "lc", "area_vs_margin"]
    assert gap == pytest.approx(0.45 - 0.405)
    assert "Not of one length" in text


def test_a_missing_round_is_an_error_that_names_the_file(tmp_path, capsys):
    run(tmp_path, "margin", 0, [ROWS[0], ROWS[2]])
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "margin/seed-0.jsonl: rounds [0, 2] are not 0, 1, 2, ..." in error
    assert error.count("\n") == 1


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"dgal-bench: {tmp_path} holds no results: run 'dgal-bench bench results={tmp_path}' first\n"
    )
    (tmp_path / "suite" / "toy" / "margin").mkdir(parents=True)
    (tmp_path / "suite" / "toy" / "margin" / "seed-0.jsonl").touch()  # begun, and no header yet
    with pytest.raises(ResultsError, match="holds no results"):
        write_report(tmp_path, tmp_path / "out")


def test_a_file_that_is_being_written_is_read_as_far_as_it_is_whole(tmp_path, monkeypatch):
    """A few bytes at a time, while one report after the other is made: never an error, never a torn number."""
    monkeypatch.setattr(figures, "FIGURES", {})
    run(tmp_path, "margin", 0, scaled(1))
    run(tmp_path, "growing", 0, scaled(2))
    path = tmp_path / "suite" / "toy" / "growing" / "seed-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"")
    over = threading.Event()

    def write():
        with path.open("ab", buffering=0) as file:
            for start in range(0, len(whole), 97):
                file.write(whole[start : start + 97])
                time.sleep(0.005)
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    counted = []
    while not over.is_set():
        found = Page(write_report(tmp_path, tmp_path / "out").files[0].read_text())
        counted.append({key[2] for key in found.numbers if key[1] == "main"})
    writer.join()
    assert counted
    assert all(names in ({"margin"}, {"margin", "growing"}) for names in counted)
    found = Page(write_report(tmp_path, tmp_path / "out").files[0].read_text())
    assert {key[2] for key in found.numbers if key[1] == "main"} == {"margin", "growing"}


def test_processes_of_their_own_draw_the_same_page(tmp_path, monkeypatch, few_figures):
    for suite in ("one", "two"):
        for seed in (0, 1):
            run(tmp_path / "results", "margin", seed, scaled(1 + seed), suite=suite)
    pages = []
    for n_cores in (1, 2):
        monkeypatch.setattr(write, "available_cores", lambda n=n_cores: n)
        pages.append(write_report(tmp_path / "results", tmp_path / str(n_cores)).files[0].read_text())
    assert pages[0] == pages[1]


def test_a_killed_child_is_an_error_and_no_endless_wait(tmp_path, monkeypatch):
    for suite in ("one", "two"):
        run(tmp_path / "results", "margin", 0, scaled(1), suite=suite)
    monkeypatch.setattr(write, "available_cores", lambda: 2)
    monkeypatch.setattr(write, "_section", lambda one, folder: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ResultsError, match="a process that drew figures was killed"):
        write_report(tmp_path / "results", tmp_path / "out")


def test_a_bar_on_a_terminal_leaves_the_process_fit_to_be_copied():
    """Its monitor would be a second thread, beside which a report is drawn by one process alone."""
    before = threading.active_count()
    bar = BarProgress({}, io.StringIO())
    bar.drawing(0, 2)
    bar.drawing(2, 2)
    assert threading.active_count() == before
    bar.close()


def test_the_same_run_in_two_trees_is_an_error_that_names_both(tmp_path):
    for tree in ("a", "b"):
        run(tmp_path / tree, "margin", 0, scaled(1))
    with pytest.raises(ResultsError, match=r"a/suite/toy/margin/seed-0.jsonl and .*b/suite/.*report on one folder"):
        write_report(tmp_path, tmp_path / "out")


def test_a_suite_of_any_name_has_addresses_that_work(tmp_path, few_figures):
    run(tmp_path, "margin", 0, scaled(1), suite="it's#1 of a (50%)")
    text = write_report(tmp_path, tmp_path / "out").files[0].read_text()
    ids = {a["id"] for _, a in Page(text).elements if a.get("id")}
    assert all(re.fullmatch(r"[\w.-]+", one) for one in ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= ids


def test_names_that_look_alike_once_joined_have_addresses_of_their_own():
    groups = [Group("paper", "svhn-extra", "cpu", 1, {}), Group("paper-svhn", "extra", "cpu", 1, {})]
    assert len({one.slug for one in groups}) == 2


def test_a_seed_that_ran_on_another_machine_is_not_missing(tmp_path):
    for seed, cpu in ((0, "Abacus"), (1, "Slide rule")):
        moved(tmp_path, "margin", seed, cpu=cpu)
        moved(tmp_path, "dgmg", 1 - seed, cpu=cpu)
    assert [unfinished_lines(one) for one in group(read_results(tmp_path))] == [[], []]


def test_a_damaged_projection_costs_the_map_and_nothing_else(tmp_path, monkeypatch):
    generate(tmp_path, ("digits",), ("random",), seeds=(0,), rounds=2, projections=True)
    monkeypatch.setattr(figures, "FIGURES", {"picks": figures.FIGURES["picks"]})
    (path,) = (tmp_path / "paper" / "digits").glob("projection-*.npz")
    path.write_bytes(path.read_bytes()[:100])
    _, text, found = sections(write_report(tmp_path, tmp_path / "out"))
    assert "No map of the latents: " in text
    assert not any(tag == "figure" for tag, _ in found.elements)


def test_settings_in_names_are_left_as_they_are(tmp_path, few_figures):
    """Short numbers in drawings, but not in what they say or whose they are; a dollar is no formula."""
    names = ("dgmg+training.lr=0.00001", "a$\\frac$b", "x" * 90)
    for name in names:
        run(tmp_path, name, 0, scaled(1))
    _, text, found = sections(write_report(tmp_path, tmp_path / "out"))
    marked = {a["data-strategy"] for tag, a in found.elements if tag == "g" and "data-strategy" in a}
    assert marked == set(names)
    assert "dgmg lr=0.00001" in text
