"""The paper's claims: rules by brute force, samples by hand, and verdicts in worlds that are made to have them."""

import csv
import io
import json
import re
from dataclasses import replace
from itertools import product
from math import inf, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some_of
from scipy import stats

from dgal_bench.cli.main import main
from dgal_bench.core.errors import ResultsError
from dgal_bench.report.claims import survey_claims
from dgal_bench.report.claims.evidence import ALL, EARLY, LATE, PAPER_SETS, gather_evidence, thirds
from dgal_bench.report.claims.judge import exponent, growth_findings, judge_claim
from dgal_bench.report.claims.paper import BENCHMARKS, CLAIMS
from dgal_bench.report.claims.rules import (
    COMPETITIVE,
    CONFIRMED,
    EQUAL,
    MORE,
    MORE_TIMES,
    NO_POINT_BELOW,
    NOT_RUN,
    POINTS,
    REFUTED,
    TEN_TIMES,
    TIMES,
    UNDECIDED,
    SeedSample,
    about,
    combine,
    every,
    most,
    some,
)
from dgal_bench.report.claims.sensitivity import choice_effects, setting_differences
from dgal_bench.report.claims.text import claims_csv, claims_md, headline
from dgal_bench.report.groups import group
from dgal_bench.report.statistics import Estimate
from dgal_bench.report.write import write_report
from dgal_bench.results.metrics import area_under_curve
from dgal_bench.results.reader import read_all_timings, read_results, read_run
from dgal_bench.results.rows import Timing, state_digest, timings_path
from dgal_bench.results.schema import SCHEMA_VERSION
from dgal_bench.results.writer import write_timings
from tests.headers import merged
from tests.test_report import header, row

ROUNDS = 9
KINDS = {
    "random": ("everything", "random"), "lc": ("everything", "least_confidence"), "margin": ("everything", "margin"),
    "entropy": ("everything", "entropy"), "badge": ("everything", "badge"), "coreset": ("everything", "k_center"),
    "seals": ("model_neighbors", "least_confidence"), "seals_matched": ("model_neighbors", "least_confidence"),
    "vae_seals": ("graph_neighbors", "least_confidence"), "vae_seals_matched": ("graph_neighbors", "least_confidence"),
    "ganvae": ("everything", "adversary"), "rsmg": ("uniform", "margin"), "dglc": ("diffusion", "least_confidence"),
    "dgmg": ("diffusion", "margin"), "dgbadge": ("diffusion", "badge"), "dgcoreset": ("diffusion", "k_center"),
}  # fmt: skip


class World:
    """Rows that say what they are told to: of each strategy accuracies and seconds by round, with noise by seed."""

    def __init__(self, root, dataset="mnist", seeds=range(5), suite="all", noise=0.001):
        self.root, self.dataset, self.seeds, self.suite, self.noise = root, dataset, seeds, suite, noise
        self._read = None

    def add(self, label, early=0.5, late=0.8, seconds=1.0, slower=1.0, more=1.0, boundary=(0.2, 0.2), **facts):
        """``slower`` and ``more``: how seconds and candidates grow from the first third to the last."""
        restrict, acquire = KINDS[label.partition("+")[0]]
        for seed in facts.pop("seeds", self.seeds):
            rng = np.random.default_rng([seed, sum(label.encode())])
            profile = facts.get("profile", "cpu")
            told = header(label, seed, restrict=restrict, acquire=acquire, rounds=ROUNDS, profile=profile)
            told["config"] = merged(told["config"], facts.get("config", {}))
            told["config"]["dataset"]["name"] = self.dataset
            told["provenance"]["machine"]["cpu"] = facts.get("cpu", "Abacus")
            told["fingerprint"]["latents"] = facts.get("latents", "l")
            told["setup"]["representation"]["seconds"] = facts.get("setup", 0.1)
            told["setup"]["graph"]["seconds"] = 0.0
            suite = self.suite if profile == "cpu" else profile
            apart = {"model_neighbors": "embed", "graph_neighbors": "search"}.get(restrict, "infer")
            rows = [self._row(n, early, late, seconds, slower, more, boundary, rng, apart) for n in range(ROUNDS + 1)]
            lines = [
                {"kind": "header", "schema_version": SCHEMA_VERSION, **told},
                *({"kind": "round", **vars(one)} for one in rows),
            ]
            path = self.root / suite / self.dataset / label / f"seed-{seed}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))  # not synced, as a recorder's are
        return self

    def _row(self, n, early, late, seconds, slower, more, boundary, rng, apart):
        accuracy = 0.1 if n == 0 else (early if 3 * n <= ROUNDS else late) + float(rng.normal(0, self.noise))
        if n == ROUNDS:
            return row(n, 10 + 10 * n, accuracy)
        last = 3 * n >= 2 * ROUNDS
        took = seconds * (slower if last else 1.0) * float(rng.uniform(0.99, 1.01))
        return replace(
            row(n, 10 + 10 * n, accuracy, took, 100),
            n_candidates=int(100 * (more if last else 1)),
            boundary_share=boundary[1 if last else 0] + float(rng.normal(0, self.noise)),
            seconds={"acquire": took / 2, apart: took / 2},
        )

    def replay(self, label, seed, seconds, rounds=(0, 4, 8)):
        path = self.root / self.suite / self.dataset / label / f"seed-{seed}.jsonl"
        log = read_run(path)
        told = {
            "cell": f"toy/{label}/seed-{seed}", "common": None, "picks": state_digest(log), "rounds": list(rounds),
            "repeats": 1, "when": "now", "changed": [], "fingerprint": log.header["fingerprint"],
            "provenance": log.header["provenance"],
        }  # fmt: skip
        made = [Timing(label, n, [seconds], {"acquire": seconds}, 50, 50, True, 1, 0.0, 0.0) for n in rounds]
        write_timings(timings_path(path), told, made)

    @property
    def groups(self):
        return self._read or group(read_results(self.root), read_all_timings(self.root))

    def finished(self):
        """Nothing is added any more: read once."""
        self._read = self.groups
        return self

    def judge(self, number):
        return judge_claim(CLAIMS[number - 1], gather_evidence(self.groups))


def papers_world(root, dataset="mnist"):
    """In which every claim of the paper is true."""
    world = World(root, dataset)
    fast = 0.01
    world.add("random", early=0.4, late=0.7, seconds=1e-5)
    for name in ("lc", "margin", "entropy"):
        world.add(name, early=0.55, late=0.80, seconds=1.0)
    world.add("badge", early=0.56, late=0.805, seconds=1.2).add("coreset", early=0.555, late=0.80, seconds=1.5)
    world.add("seals", early=0.5, late=0.75, seconds=2.0, slower=2.0, more=5)
    world.add("ganvae", early=0.4, late=0.7, seconds=12.0)
    world.add("dgmg", early=0.56, late=0.802, seconds=fast, boundary=(0.1, 0.5))
    world.add("dglc", early=0.54, late=0.78, seconds=fast).add("vae_seals", early=0.5, late=0.78, seconds=1.5 * fast)
    world.add("rsmg", early=0.50, late=0.80, seconds=fast / 1.3)
    world.add("dgbadge", early=0.56, late=0.804, seconds=1.5 * fast)
    return world.add("dgcoreset", early=0.55, late=0.79, seconds=2 * fast)


def contrary_world(root, dataset="mnist"):
    """In which each is false."""
    world = World(root, dataset)
    for name in KINDS:
        if name not in ("dgmg", "dgbadge", "dgcoreset", "seals"):
            world.add(name, early=0.7, late=0.9, seconds=0.5)
    world.add("seals", early=0.7, late=0.9, seconds=0.5, slower=0.5, more=0.5)
    world.add("dgbadge", early=0.3, late=0.5, seconds=0.9).add("dgcoreset", early=0.3, late=0.5, seconds=0.8)
    return world.add("dgmg", early=0.4, late=0.6, seconds=1.0, boundary=(0.5, 0.1))


@pytest.fixture(scope="module")
def true(tmp_path_factory):
    return papers_world(tmp_path_factory.mktemp("true")).finished()


@pytest.fixture(scope="module")
def false(tmp_path_factory):
    return contrary_world(tmp_path_factory.mktemp("false")).finished()


BY_ROWS = [claim.number for claim in CLAIMS if claim.parts]


class TestRules:
    @pytest.mark.parametrize(
        ("rule", "low", "high", "verdict"),
        [
            (MORE, 0.001, 0.1, CONFIRMED), (MORE, -0.1, -0.001, REFUTED), (MORE, -0.1, 0.1, UNDECIDED),
            (MORE, 0.0, 0.0, UNDECIDED), (MORE_TIMES, 1.0, 1.0, UNDECIDED), (MORE_TIMES, 1.01, 2.0, CONFIRMED),
            (TEN_TIMES, 10.0, 12.0, CONFIRMED), (TEN_TIMES, 9.9, 12.0, UNDECIDED), (TEN_TIMES, 3.0, 9.9, REFUTED),
            (EQUAL, -0.01, 0.01, CONFIRMED), (EQUAL, -0.02, 0.005, UNDECIDED), (EQUAL, 0.011, 0.02, REFUTED),
            (EQUAL, -0.03, -0.011, REFUTED), (COMPETITIVE, -0.009, 0.009, CONFIRMED),
            (COMPETITIVE, 0.02, 0.04, CONFIRMED), (COMPETITIVE, 0.001, 0.04, CONFIRMED),
            (COMPETITIVE, -0.005, 0.04, UNDECIDED), (COMPETITIVE, -0.04, -0.011, REFUTED),
            (NO_POINT_BELOW, -0.009, 0.2, CONFIRMED), (NO_POINT_BELOW, -0.011, 0.2, UNDECIDED),
            (NO_POINT_BELOW, -0.2, -0.011, REFUTED), (about(100), 20.0, 31.0, CONFIRMED),
            (about(100), 299.0, 500.0, CONFIRMED), (about(100), 301.0, 500.0, REFUTED),
            (about(100), 2.0, 29.0, REFUTED), (about(1000), 200.0, 301.0, CONFIRMED),
        ],
    )  # fmt: skip
    def test_verdicts_of_intervals(self, rule, low, high, verdict):
        assert rule.verdict(Estimate((low + high) / 2, low, high, 5)) == verdict

    @given(some_of.lists(some_of.floats(-1, 1), min_size=2, max_size=2))
    def test_better_is_an_interval_without_0(self, ends):
        low, high = sorted(ends)
        verdict = MORE.verdict(Estimate(0.0, low, high, 5))
        assert (verdict == CONFIRMED) == (low > 0)
        assert (verdict == REFUTED) == (high < 0)

    def test_one_seed_decides_nothing_by_any_rule_of_a_difference(self):
        whole = Estimate(0.5, -inf, inf, 1)
        assert {rule.verdict(whole) for rule in (MORE, EQUAL, COMPETITIVE, NO_POINT_BELOW)} == {UNDECIDED}

    def test_verdicts_of_several_by_every_combination(self):
        kinds = (CONFIRMED, REFUTED, UNDECIDED, NOT_RUN)
        for verdicts in (one for n in range(4) for one in product(kinds, repeat=n)):
            run = [one for one in verdicts if one != NOT_RUN]
            n, yes, no = len(run), run.count(CONFIRMED), run.count(REFUTED)
            assert (combine(verdicts) == REFUTED) == (no > 0)
            assert (combine(verdicts) == CONFIRMED) == (n == yes == len(verdicts) > 0)
            assert (every(verdicts) == CONFIRMED) == (n == yes > 0)
            assert (every(verdicts) == REFUTED) == (no > 0)
            assert (most(verdicts) == CONFIRMED) == (yes > n / 2)
            assert (most(verdicts) == REFUTED) == (n > 0 and n - no <= n / 2)
            assert (some(verdicts) == CONFIRMED) == (yes > 0)
            assert (some(verdicts) == REFUTED) == (n == no > 0)
            for over in (combine, every, most, some):
                assert (over(verdicts) == NOT_RUN) == (n == 0)


class TestSamples:
    def test_a_difference_is_students_below_ten_seeds(self):
        values = [0.01, 0.03, -0.01, 0.02, 0.04]
        sample = SeedSample(dict(enumerate(values)), POINTS)
        low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
        assert (sample.effect.low, sample.effect.high) == pytest.approx((low, high))
        assert sample.p(0.0) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
        assert sample.p(-0.01) == pytest.approx(stats.ttest_1samp(values, -0.01).pvalue)

    def test_a_ratio_is_tested_on_its_logarithm(self):
        ratios = [90.0, 110.0, 100.0, 130.0, 80.0]
        sample = SeedSample({seed: log(ratio) for seed, ratio in enumerate(ratios)}, TIMES)
        assert sample.effect.mean == pytest.approx(stats.gmean(ratios))
        assert sample.p(10.0) == pytest.approx(stats.ttest_1samp(np.log(ratios), log(10)).pvalue)

    def test_accuracy_by_hand(self, true):
        (bench,) = gather_evidence(true.groups)
        ours, theirs = (bench.runs(name) for name in ("dgmg", "margin"))
        for when, cut in ((ALL, slice(0, 10)), (EARLY, slice(0, 4)), (LATE, slice(3, 10))):
            expected = {
                seed: area_under_curve(ours[seed].records[cut]) - area_under_curve(theirs[seed].records[cut])
                for seed in range(5)
            }
            assert bench.accuracy("dgmg", "margin", when).values == pytest.approx(expected)

    def test_seconds_by_hand(self, true):
        (bench,) = gather_evidence(true.groups)

        def mean(name, seed):
            return np.mean([r.query_seconds for r in bench.runs(name)[seed].records[:-1]])

        expected = {seed: log(mean("margin", seed) / mean("dgmg", seed)) for seed in range(5)}
        assert bench.speed("dgmg", "margin").values == pytest.approx(expected)
        totals = {seed: log(9 * mean("margin", seed) / (0.1 + 9 * mean("dgmg", seed))) for seed in range(5)}
        assert bench.total("dgmg", "margin").values == pytest.approx(totals)

    def test_thirds(self):
        assert thirds({0: 1.0, 1: 3.0, 2: 9.0, 3: 9.0, 4: 5.0, 5: 7.0}, rounds=6) == (2.0, 6.0)
        assert thirds({0: 1.0, 8: 2.0}, rounds=9) == (1.0, 2.0)
        assert thirds({0: 1.0, 1: 2.0}, rounds=9) is None

    def test_pairs_are_of_one_protocol(self, tmp_path):
        world = World(tmp_path).add("dgmg").add("margin")
        path = tmp_path / "all" / "mnist" / "margin" / "seed-2.jsonl"
        first, *rest = path.read_text().splitlines()
        told = json.loads(first)
        told["initial"] = [*told["initial"][:-1], 99]
        path.write_text("\n".join([json.dumps(told), *rest]) + "\n")
        (bench,) = gather_evidence(world.groups)
        assert list(bench.pairs("dgmg", "margin")) == [0, 1, 3, 4]


class TestWorlds:
    @pytest.mark.parametrize("number", BY_ROWS)
    def test_each_claim_is_confirmed_where_it_is_true(self, true, number):
        found = true.judge(number)
        wrong = [(one.words, one.verdict, one.effect) for one in found.findings if one.verdict != CONFIRMED]
        assert not wrong
        assert found.by_dataset == {"mnist": CONFIRMED}
        assert (found.over_all, found.of_the_paper) == (CONFIRMED, CONFIRMED)

    @pytest.mark.parametrize("number", BY_ROWS)
    def test_each_claim_is_refuted_where_it_is_false(self, false, number):
        found = false.judge(number)
        assert found.by_dataset == {"mnist": REFUTED}
        assert (found.over_all, found.of_the_paper) == (REFUTED, REFUTED)

    @pytest.mark.parametrize("number", BY_ROWS)
    def test_four_seeds_decide_nothing(self, true, number):
        groups = [replace(one, runs={k: logs[:4] for k, logs in one.runs.items()}) for one in true.groups]
        found = judge_claim(CLAIMS[number - 1], gather_evidence(groups))
        assert {one.verdict for one in found.findings} == {UNDECIDED}
        assert {one.p for one in found.findings} == {None}
        assert found.over_all == UNDECIDED

    def test_a_strategy_that_was_not_run_is_said_and_leaves_the_claim_undecided(self, tmp_path):
        world = World(tmp_path).add("dgmg", seconds=0.01)
        for name in BENCHMARKS[:-1]:
            world.add(name)
        found = world.judge(1)
        assert [one.verdict for one in found.findings] == [CONFIRMED] * 6 + [NOT_RUN]
        assert found.findings[-1].why == "not run: ganvae"
        assert found.by_dataset["mnist"] == UNDECIDED
        assert world.judge(9).over_all == NOT_RUN

    def test_who_is_slowest_is_not_known_while_one_is_missing(self, tmp_path):
        world = World(tmp_path).add("dgmg", seconds=0.01).add("random", early=0.3, late=0.5)
        for name in BENCHMARKS[:-1]:
            world.add(name)
        assert {one.why for one in world.judge(2).findings[:3]} == {"not run: ganvae"}
        assert [one.verdict for one in world.judge(2).findings] == [UNDECIDED] * 3 + [CONFIRMED]
        world.add("ganvae", seconds=2.0)
        assert [one.verdict for one in world.judge(2).findings] == [CONFIRMED, REFUTED, CONFIRMED, CONFIRMED]

    def test_what_is_about_all_data_sets_is_no_data_sets_own(self, tmp_path):
        """Margin is worse early on one of two: that is sometimes; and DGMG beats DGLC on one of two: not most."""
        for name, early in (("mnist", 0.6), ("svhn", 0.4)):
            world = World(tmp_path, name).add("dgmg", early=early, late=0.8, seconds=0.01)
            world.add("margin", early=0.5, late=0.8).add("rsmg", early=0.5, late=0.8, seconds=0.008)
            world.add("dglc", early=0.5, late=0.8)
        eight = world.judge(8)
        assert eight.by_dataset == {"mnist": CONFIRMED, "svhn": CONFIRMED}
        assert eight.over_all == CONFIRMED
        six = world.judge(6)
        assert six.by_dataset == {"mnist": CONFIRMED, "svhn": REFUTED}
        assert six.over_all == REFUTED

    def test_each_part_somewhere_is_not_yet_the_claim(self, tmp_path):
        """SEALS on one data set, all others on another: neither confirms claim 1, and nor do both."""
        world = World(tmp_path, "digits").add("dgmg", seconds=0.01)
        for name in BENCHMARKS:
            if name != "seals":
                world.add(name)
        found = World(tmp_path, "mnist").add("dgmg", seconds=0.01).add("seals").judge(1)
        assert {one.verdict for one in found.findings} == {CONFIRMED, NOT_RUN}
        assert (found.by_dataset, found.over_all) == ({"mnist": UNDECIDED, "digits": UNDECIDED}, UNDECIDED)

    def test_the_paper_s_own_are_judged_apart(self, tmp_path):
        papers_world(tmp_path, "svhn")
        world = contrary_world(tmp_path, "digits")
        found = world.judge(4)
        assert (found.by_dataset, found.over_all) == ({"svhn": CONFIRMED, "digits": REFUTED}, REFUTED)
        assert found.of_the_paper == CONFIRMED

    def test_mini_imagenet_has_a_part_of_its_own(self, tmp_path):
        world = papers_world(tmp_path, "mini_imagenet")
        words = {one.words for one in world.judge(7).findings}
        assert words == {"DGMG's accuracy is about RSMG's", "DGMG's accuracy is above random's early"}
        assert world.judge(7).by_dataset == {"mini_imagenet": REFUTED}  # 2 points apart there

    def test_holm_undoes_what_passes_alone_only(self, tmp_path):
        """Two tests of claim 7: with p = 0.03 and 0.04 neither holds after the correction, each would alone."""
        world = World(tmp_path, noise=0.0)
        world.add("dgmg", early=0.5).add("rsmg", early=0.5).add("random", early=0.5)
        sizes = {"rsmg": (0.0, 0.01, 0.02, 0.03, 0.03), "random": (0.0, 0.01, 0.02, 0.03, 0.04)}
        for name, gaps in sizes.items():
            for seed, gap in enumerate(gaps):
                path = tmp_path / "all" / "mnist" / name / f"seed-{seed}.jsonl"
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                for line in lines[1:]:
                    line["accuracy"] -= gap if line["round"] else 0
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = world.judge(7).findings
        assert all(one.effect.low > 0 for one in found)
        assert all(0.025 < one.p < 0.05 < one.holm_p for one in found)
        assert {one.verdict for one in found} == {UNDECIDED}
        assert {one.why for one in found} == {"not after Holm's correction"}


class TestBenches:
    def test_suites_are_put_together(self, tmp_path):
        World(tmp_path, suite="paper").add("dgmg", seconds=0.01)
        World(tmp_path, suite="ablation").add("dgbadge", seconds=0.02).add("dgmg", seeds=range(2))
        (bench,) = gather_evidence(group(read_results(tmp_path)))
        assert len(bench.runs("dgmg")) == 5
        assert bench.speed("dgmg", "dgbadge").n == 5

    def test_another_machines_runs_are_said_and_not_judged(self, tmp_path):
        world = World(tmp_path).add("dgmg").add("margin", seeds=range(3)).add("margin", seeds=(3, 4), cpu="Slide rule")
        (bench,) = gather_evidence(world.groups)
        assert list(bench.runs("margin")) == [0, 1, 2]
        assert bench.rows_left_out == "2 finished runs of another machine, data or version are not judged"
        assert bench.rows_left_out in claims_md(survey_claims(world.groups))

    def test_representations_are_counted_of_those_who_rest_on_one(self, tmp_path):
        world = World(tmp_path)
        for seed in range(5):
            world.add("dgmg", seeds=[seed], latents=f"l{seed}").add("margin", seeds=[seed], latents="another")
        (bench,) = gather_evidence(world.groups)
        found = [bench.representations(seeds, *of) for seeds, *of in
                 ((range(5), "dgmg", "margin"), (range(3), "dgmg"), (range(5), "margin"))]  # fmt: skip
        assert found == [5, 3, 0]

    def test_smoke_is_no_evidence_and_a_data_set_counts_once(self, tmp_path):
        world = World(tmp_path)
        for profile, seeds in (("cpu", range(5)), ("paper", range(2)), ("smoke", range(5))):
            world.add("dgmg", profile=profile, early=0.6, seeds=seeds).add("dglc", profile=profile, seeds=seeds)
        assert {bench.name for bench in gather_evidence(world.groups)} == {
            "mnist (profile cpu)",
            "mnist (profile paper)",
        }
        assert world.judge(6).over_all == CONFIRMED

    def test_other_trainings_are_not_compared(self, tmp_path):
        world = World(tmp_path).add("dgmg", config={"training": {"max_epochs": 5}}).add("margin")
        (bench,) = gather_evidence(world.groups)
        assert bench.pairs("dgmg", "margin") == {}
        assert world.judge(8).findings[0].verdict == NOT_RUN

    def test_nor_are_neighbours_in_other_latents(self, tmp_path):
        world = World(tmp_path).add("dgmg", latents="a").add("vae_seals", latents="b").add("rsmg", latents="b")
        (bench,) = gather_evidence(world.groups)
        assert bench.pairs("dgmg", "vae_seals") == {}
        assert len(bench.pairs("dgmg", "rsmg")) == 5  # which rests on none

    def test_replays_count_where_they_cover_every_pair(self, tmp_path):
        world = World(tmp_path).add("dgmg", seconds=0.02).add("margin", seconds=1.0)
        for seed in range(5):
            (bench,) = gather_evidence(world.groups)
            assert bench.speed("dgmg", "margin").n == 5
            assert bench.speed("dgmg", "margin").source == "rows"
            for name, seconds in (("dgmg", 0.01), ("margin", 3.0)):
                world.replay(name, seed, seconds)
        (bench,) = gather_evidence(world.groups)
        assert bench.speed("dgmg", "margin").source == bench.total("dgmg", "margin").source == "replay"
        assert bench.speed("dgmg", "margin").effect.mean == pytest.approx(300)
        assert bench.total("dgmg", "margin").effect.mean == pytest.approx(27 / 0.19)
        world.replay("margin", 4, 3.0, rounds=(0, 4))
        world.replay("dgmg", 4, 0.01, rounds=(0, 4))
        (bench,) = gather_evidence(world.groups)
        assert bench.speed("dgmg", "margin").source == "replay"
        assert bench.total("dgmg", "margin").source == "rows"  # the last round is missing


class TestGrowth:
    def file(self, tmp_path, seconds, kind="clustered"):
        sizes = [
            {
                "kind": kind, "points": n, "status": "measured", "steps": 4,
                "queries": [{"name": "dgmg", "how": "full", "phases": {"diffuse": 4 * took}}],
            }
            for n, took in seconds.items()
        ]  # fmt: skip
        path = tmp_path / "scaling.json"
        path.write_text(json.dumps({"sizes": sizes, "provenance": {"machine": {"cpu": "Abacus"}}}))
        return path

    SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)

    @pytest.mark.parametrize(("power", "verdict"), [(1.0, CONFIRMED), (1.3, REFUTED), (0.7, REFUTED)])
    def test_the_exponent_decides(self, tmp_path, power, verdict):
        rng = np.random.default_rng(0)
        path = self.file(tmp_path, {n: 1e-8 * n**power * rng.uniform(0.98, 1.02) for n in self.SIZES})
        (found,) = growth_findings(path)
        assert found.verdict == verdict
        assert found.effect.low < power < found.effect.high

    def test_few_sizes_decide_nothing(self, tmp_path):
        (found,) = growth_findings(self.file(tmp_path, {n: 1e-8 * n for n in self.SIZES[:4]}))
        assert (found.verdict, found.why, found.n) == (UNDECIDED, "fewer than 5 sizes", 4)
        assert growth_findings(self.file(tmp_path, {10_000: 1.0}))[0].effect is None

    def test_the_interval_is_that_of_least_squares(self):
        seconds = {10: 1.0, 100: 11.0, 1000: 90.0, 10_000: 1200.0}
        x, y = np.log(list(seconds)), np.log(list(seconds.values()))
        slope, cov = np.polyfit(x, y, 1, cov="unscaled")
        residual = y - np.polyval(slope, x)
        half = stats.t.ppf(0.975, 2) * np.sqrt(cov[0, 0] * (residual**2).sum() / 2)
        found = exponent(seconds)
        assert (found.mean, found.low, found.high) == pytest.approx((slope[0], slope[0] - half, slope[0] + half))

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"sizes": []}', '{"sizes": [{"status": "measured"}]}', "7"])
    def test_another_file_is_refused(self, tmp_path, text):
        path = tmp_path / "other.json"
        path.write_text(text)
        with pytest.raises(ResultsError, match=r"growth=.*other.json"):
            growth_findings(path)

    def test_no_file_is_not_run(self, true):
        assert survey_claims(true.groups).claims[10].over_all == NOT_RUN


class TestChoices:
    def other(self, world, title):
        (found,) = [one for one in choice_effects(gather_evidence(world.groups)) if one.choice.title == title]
        return {pair.here.claim.number: pair for pair in found.pairs}

    def test_ties_by_position_stand_in_for_dgmg(self, tmp_path):
        world = World(tmp_path).add("dgmg", early=0.6).add("rsmg", early=0.5).add("random", early=0.4)
        world.add("dgmg+strategy.restrict.tie_break=position", early=0.3)
        pair = self.other(world, "Ties of the diffusion")[7]
        assert pair.verdicts == (CONFIRMED, REFUTED)
        assert "claim 7 on mnist is refuted instead of confirmed" in claims_md(survey_claims(world.groups))

    def test_seals_at_as_many_candidates(self, tmp_path):
        world = World(tmp_path).add("dgmg").add("seals", early=0.3, late=0.6, slower=2, more=3).add("seals_matched")
        assert self.other(world, "How many candidates SEALS has")[4].verdicts == (CONFIRMED, UNDECIDED)

    def test_what_is_timed(self, tmp_path):
        """Half of SEALS' seconds are for embedding the pool: 10.5 times as long as DGMG's becomes 5.25 times."""
        world = World(tmp_path).add("dgmg", seconds=1.0).add("seals", seconds=10.5)
        pairs = self.other(world, "What of SEALS' query is timed")
        here, there = (
            next(one for one in side.findings if "seals" in one.words) for side in (pairs[1].here, pairs[1].other)
        )
        assert (here.effect.mean, here.verdict) == (pytest.approx(10.5, rel=0.01), CONFIRMED)
        assert (there.effect.mean, there.verdict) == (pytest.approx(5.25, rel=0.01), REFUTED)
        assert 9 not in pairs

    def test_the_one_off_cost_is_shared_out(self, tmp_path):
        """10 s over 9 queries of 0.01 s make a query of 1.12 s."""
        world = World(tmp_path).add("dgmg", seconds=0.01, setup=10.0).add("margin", seconds=1.0)
        pair = self.other(world, "The one-off cost")[1]
        margin = next(one for one in pair.other.findings if "margin" in one.words)
        assert margin.effect.mean == pytest.approx(1 / (0.01 + 10 / 9), rel=0.01)
        assert 10 not in self.other(world, "The one-off cost")  # which counts it in any case

    def test_another_representation_stands_in_for_all_that_rest_on_it(self, tmp_path):
        world = World(tmp_path).add("dgmg", early=0.6).add("rsmg", early=0.5).add("random", early=0.4)
        world.add("dgmg+representation.seed=1", early=0.45).add("rsmg+representation.seed=1", early=0.5)
        (found,) = [
            one for one in choice_effects(gather_evidence(world.groups)) if one.choice.title == "The representation"
        ]
        assert found.choice.alternative == "that of seed 1"
        assert 6 not in {pair.here.claim.number for pair in found.pairs}  # DGLC has none of it
        (pair,) = [pair for pair in found.pairs if pair.here.claim.number == 7]
        assert pair.verdicts == (CONFIRMED, REFUTED)

    def test_seconds_of_both_ways_are_of_one_source(self, tmp_path):
        """DGMG is replayed and its variant is not: a replay against rows would be a difference of its own."""
        other = "dgmg+strategy.restrict.tie_break=position"
        world = World(tmp_path).add("dgmg", seconds=0.02).add("margin").add(other, seconds=0.02, early=0.4)
        for seed in range(5):
            world.replay("dgmg", seed, 0.01)
            world.replay("margin", seed, 1.0)
        assert {one.source for one in world.judge(1).findings if one.effect} == {"replay"}
        pair = self.other(world, "Ties of the diffusion")[1]
        assert {one.source for side in (pair.here, pair.other) for one in side.findings if one.effect} == {"rows"}
        for seed in range(5):
            world.replay(other, seed, 0.02)
        pair = self.other(world, "Ties of the diffusion")[1]
        assert {one.source for side in (pair.here, pair.other) for one in side.findings if one.effect} == {"replay"}

    def test_what_was_not_run_is_said(self, tmp_path):
        text = claims_md(survey_claims(World(tmp_path).add("dgmg").add("margin").groups))
        assert "**Ties of the diffusion**: here broken by a seeded hash; the other way by position, as a sort" in text
        assert text.count("Not run.\n") >= 2


class TestDepartures:
    def test_every_difference_of_a_real_configuration_is_named(self, tmp_path):
        from benchmarks.generated import generate

        generate(tmp_path, ("mnist", "digits"), ("dgmg", "ganvae"), seeds=range(1), rounds=3)
        told = {bench.name: setting_differences(bench) for bench in gather_evidence(group(read_results(tmp_path)))}
        assert told["digits"] == ["digits is not one of the paper's data sets: every setting is ours."]
        text = "\n".join(told["mnist"])
        assert "representation.max_epochs: 15 instead of 300 (on a CPU the paper's 300 epochs" in text
        assert "max_steps: 200 instead of None (on a CPU" in text
        assert "rounds: 3 instead of 30" in text
        assert "threads" not in text

    def test_a_profile_of_the_paper_departs_in_nothing(self, tmp_path):
        from benchmarks.generated import generate

        generate(tmp_path, ("mnist",), ("dgmg",), seeds=range(1), rounds=30, overrides=["profile=paper"])
        (bench,) = gather_evidence(group(read_results(tmp_path)))
        assert setting_differences(bench) == []


class TestWords:
    def test_every_number_of_the_table_is_a_findings(self, true):
        found = survey_claims(true.groups)
        lines = list(csv.DictReader(io.StringIO(claims_csv(found))))
        parts = [line for line in lines if line["that"] != "the claim"]
        findings = [finding for one in found.claims for finding in one.findings]
        assert len(parts) == len(findings)
        for line, finding in zip(parts, findings, strict=True):
            assert (line["verdict"], line["that"]) == (finding.verdict, finding.words)
            if finding.effect:
                assert (float(line["effect"]), int(line["n_seeds"])) == (finding.effect.mean, finding.n)
                assert float(line["low"]) == finding.effect.low
        whole = {(line["claim"], line["data_set"]): line["verdict"] for line in lines if line["that"] == "the claim"}
        assert whole["4", "mnist"] == whole["4", "over all run"] == whole["4", "paper's own"] == CONFIRMED

    def test_all_twelve_are_told_with_what_is_not_run(self, true):
        text = claims_md(survey_claims(true.groups))
        assert re.findall(r"^## (\d+)\. ", text, re.MULTILINE) == [str(n) for n in range(1, 13)]
        assert "Not run yet: emnist, svhn, cifar10, cifar100, mini_imagenet." in text
        assert "paper's own (1 of 6)" in text

    def test_the_headline_says_above_below_and_neither(self, tmp_path):
        world = World(tmp_path, noise=0.02)
        world.add("dgmg", early=0.6, late=0.7, seconds=0.01).add("random", early=0.4, late=0.5)
        world.add("margin", early=0.61, late=0.71)
        (bench,) = gather_evidence(world.groups)
        said = headline(bench)
        assert re.search(r"On mnist DGMG ends at \d\d\.\d % with 100 labels; its mean accuracy", said)
        assert re.search(r"\d\d\.\d points \[.*\] above that of random, and not to be told", said)
        assert "that of the most accurate benchmark of those run, margin" in said
        assert re.search(r"a query takes (9\d|1\d\d)(\.\d)? times \[.*\] less time than margin's \(5 seeds\)\.", said)

    def test_the_headline_of_a_slow_dgmg_turns_the_ratio_and_its_ends(self, tmp_path):
        world = World(tmp_path).add("dgmg", seconds=4.0, early=0.4).add("margin", seconds=1.0, early=0.5)
        said = headline(gather_evidence(world.groups)[0])
        low, high = map(float, re.search(r"a query takes [\d.]+ times \[([\d.]+), ([\d.]+)\] more time", said).groups())
        assert 3.9 < low < 4.0 < high < 4.1
        assert re.search(r"points \[-.*, -.*\] below that of", said)

    def test_few_seeds_have_no_side_in_the_headline(self, tmp_path):
        world = World(tmp_path, seeds=range(3)).add("dgmg", early=0.7).add("random", early=0.4)
        assert re.search(
            r"not to be told \(\+.* points \[.*\], 3 seeds\) from that of", headline(gather_evidence(world.groups)[0])
        )

    def test_order_of_data_sets_is_the_papers(self, tmp_path):
        for name in ("digits", *reversed(PAPER_SETS)):
            world = World(tmp_path, name).add("dgmg", seeds=[0])
        assert [bench.name for bench in gather_evidence(world.groups)] == [*PAPER_SETS, "digits"]


class TestPage:
    def test_it_begins_with_the_claims(self, true, tmp_path, few_figures):
        write_report(true.root, tmp_path)
        page = (tmp_path / "report.html").read_text()
        assert page.index('id="claims"') < page.index('class="group"')
        rows = re.findall(r'<tr data-claim="(\d+)">(.*?)</tr>', page, re.DOTALL)
        assert [int(number) for number, _ in rows] == list(range(1, 13))
        for number, text in rows:
            assert ("✓ confirmed" in text) == (number != "11")
        assert "5 seeds, 1 representation" in page

    def test_none_where_no_row_is_of_a_claim(self, tmp_path, few_figures):
        World(tmp_path / "r").add("entropy").add("rsmg")
        write_report(tmp_path / "r", tmp_path / "out")
        assert 'id="claims"' not in (tmp_path / "out" / "report.html").read_text()


class TestCommand:
    def test_it_writes_and_says_it_in_short(self, true, tmp_path, capsys):
        assert main(["claims", str(true.root), f"--out={tmp_path}/out"]) == 0
        told = capsys.readouterr().out
        assert "4. SEALS lags, and slows down" in told
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"claims.md", "claims.csv"}

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ([], "claims takes one results folder"),
            (["r", "grwoth=x"], "grwoth= means nothing here"),
            (["nowhere"], "nowhere is not a folder of results"),
        ],
    )
    def test_mistakes(self, words, said, capsys):
        assert main(["claims", *words]) == 2
        assert said in capsys.readouterr().err

    def test_a_growth_file_that_is_none(self, true, tmp_path, capsys):
        assert main(["claims", str(true.root), "growth=nowhere.json", f"--out={tmp_path}"]) == 2
        assert "growth=nowhere.json cannot be read: No such file" in capsys.readouterr().err
