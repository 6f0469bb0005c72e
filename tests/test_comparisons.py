"""Paired over seeds: scipy's tests, every flip of signs in plain loops, and Holm by its definition."""

from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dgal_bench.report.comparisons import (
    EXACT,
    FLIPS,
    OPPONENTS,
    common_area,
    compare_with,
    counterpart,
    flip_test,
    holm,
    paired_differences,
    smallest_p,
    t_test,
)
from dgal_bench.report.groups import group
from dgal_bench.report.statistics import bca_interval, t_interval
from dgal_bench.results.metrics import area_under_curve
from dgal_bench.results.reader import read_results
from tests.test_report import row, run

RNG = np.random.default_rng(5)


def two(n, shift=0.5):
    """A seed's two numbers have the seed in common."""
    common = RNG.normal(0, 3, n)
    return [dict(enumerate((common + RNG.normal(to, 1, n)).tolist())) for to in (shift, 0)]


def differences(ours, theirs):
    return [ours[seed] - theirs[seed] for seed in ours]


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_under_ten_seeds_it_is_scipys_paired_t_test(n):
    ours, theirs = two(n)
    wanted = stats.ttest_rel(list(ours.values()), list(theirs.values()))
    found = paired_differences(ours, theirs)
    assert (found.p, found.method, found.n) == (pytest.approx(wanted.pvalue), "paired t", n)
    assert found.difference == t_interval(differences(ours, theirs))
    assert (found.difference.low, found.difference.high) == pytest.approx(wanted.confidence_interval(0.95))


@pytest.mark.parametrize("n", [2, 5, 10, 12])
@pytest.mark.parametrize("shift", [0, 0.5, 2])
def test_flipped_signs_are_scipys_permutation_test_exactly(n, shift):
    found = differences(*two(n, shift))
    wanted = stats.permutation_test((found,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert flip_test(found) == wanted.pvalue


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_the_flips_are_counted_with_their_ties(steps):
    """Whole numbers have no rounding to get wrong; thousandths, as accuracies are, have."""
    sums = [abs(sum(sign * step for sign, step in zip(signs, steps, strict=True))) for signs in
            product((-1, 1), repeat=len(steps))]  # fmt: skip
    share = sum(one >= abs(sum(steps)) for one in sums) / len(sums)
    assert flip_test(steps) == flip_test([step / 1000 for step in steps]) == share


@pytest.mark.parametrize("n", [EXACT + 1, 40])
def test_beyond_that_flips_are_drawn_near_the_normal_limit(n):
    found = differences(*two(n, 0.4))
    near = 2 * stats.norm.sf(abs(sum(found)) / np.sqrt(np.square(found).sum()))
    assert flip_test(found) == pytest.approx(near, rel=0.3, abs=2e-3)
    assert flip_test(found) == flip_test(found[::-1]) == flip_test([-one for one in found])
    assert flip_test([1.0 + 0.01 * seed for seed in range(60)]) == smallest_p(60) == 1 / (FLIPS + 1)


@pytest.mark.parametrize("n", [10, 14])
def test_from_ten_seeds_on_no_normal_distribution_is_assumed(n):
    ours, theirs = two(n)
    found = paired_differences(ours, theirs)
    assert (found.method, found.n) == ("BCa, permutation", n)
    assert found.difference == bca_interval(differences(ours, theirs))
    assert found.p == flip_test(differences(ours, theirs))


@pytest.mark.parametrize("n", [1, 2, 6, 10, 13, EXACT])
def test_the_smallest_p_is_that_of_equal_signs(n):
    assert flip_test(RNG.uniform(1, 2, n).tolist()) == pytest.approx(smallest_p(n))
    assert smallest_p(n) == 2 ** (1 - n)
    assert smallest_p(n) > smallest_p(n + 1) >= smallest_p(1000) == 1 / (FLIPS + 1)


def test_only_seeds_of_both_count_in_any_order():
    ours, theirs = two(6)
    some = {seed: theirs[seed] for seed in (4, 1, 3)} | {77: 0.0}
    assert paired_differences(ours, some) == paired_differences({seed: ours[seed] for seed in (1, 3, 4)}, theirs)
    assert paired_differences(ours, {77: 1.0}) is None
    assert paired_differences(ours, theirs).p == paired_differences(theirs, ours).p
    assert paired_differences(ours, theirs).difference.low == pytest.approx(
        -paired_differences(theirs, ours).difference.high
    )


def test_one_seed_tests_nothing():
    found = paired_differences({3: 0.9}, {3: 0.7})
    assert (found.difference.low, found.difference.high, found.p, found.smallest_p, found.n) == (-inf, inf, None, 1, 1)


@pytest.mark.parametrize("n", [2, 9, 10, 30])
def test_the_same_numbers_on_both_sides_differ_in_nothing(n):
    ours = dict(enumerate(RNG.uniform(size=n).tolist()))
    found = paired_differences(ours, ours)
    assert (found.p, found.difference.low, found.difference.high) == (1, 0, 0)


def test_the_same_difference_on_every_seed_leaves_a_t_test_no_doubt():
    assert t_test([0.25, 0.25, 0.25]) == 0


@settings(max_examples=100, deadline=None)
@given(ps=st.lists(st.none() | st.floats(0, 1), max_size=7))
def test_holm_is_its_definition(ps):
    """The least level at which the step-down procedure rejects: the largest (m - rank) p of those no larger."""
    tests = sorted(p for p in ps if p is not None)
    weighed = [min(1.0, (len(tests) - rank) * p) for rank, p in enumerate(tests)]
    wanted = [None if p is None else max(w for w, q in zip(weighed, tests, strict=True) if q <= p) for p in ps]
    found = holm(ps)
    assert found == pytest.approx(wanted)
    assert all(f >= p for f, p in zip(found, ps, strict=True) if p is not None)


def test_holm_by_hand():
    assert holm([0.04, None, 0.01, 0.03]) == pytest.approx([0.06, None, 0.03, 0.06], nan_ok=False)
    assert holm([0.5]) == [0.5]
    assert holm([]) == holm([None])[1:] == []


def rows(*pairs):
    """(labels, accuracy) of each row; every one but the last has made a query of a second."""
    last = len(pairs) - 1
    return [row(n, *pair, *((1.0, 9) if n < last else ())) for n, pair in enumerate(pairs)]


def test_areas_are_taken_where_both_were_evaluated():
    ours = rows((10, 0.2), (20, 0.6), (30, 0.7), (50, 0.8))
    theirs = rows((20, 0.4), (40, 1.0), (50, 0.6), (60, 0.9))
    assert common_area(ours, theirs) == pytest.approx((0.7, 0.5))
    assert common_area(ours, ours) == (area_under_curve(ours),) * 2
    assert common_area(ours, theirs[1:2]) is common_area(ours, theirs[:2]) is None


@pytest.fixture
def one(tmp_path):
    """Margin, random and dgmg on three seeds, margin again under another K, lc on a seed nobody else has."""
    for seed in (0, 1, 2):
        for strategy, above in {"margin": 0.1, "random": 0.0, "dgmg": 0.1 + 0.01 * (seed + 1)}.items():
            run(tmp_path, strategy, seed, rows((10, 0.2), (20, 0.5 + above), (30, 0.6 + above)))
        for strategy in ("margin+graph.graph_k=5", "dgmg+graph.graph_k=5"):
            run(tmp_path, strategy, seed, rows((10, 0.2), (20, 0.3), (30, 0.4 + 0.1 * seed)))
    run(tmp_path, "lc", 7, rows((10, 0.2), (20, 0.5), (30, 0.6)))
    run(tmp_path, "dgmg", 3, rows((10, 0.2), (20, 0.9)))  # unfinished
    (found,) = group(read_results(tmp_path))
    return found


def test_every_strategy_is_held_against_margin_under_its_own_settings(one):
    found = compare_with(one, "margin")
    assert {name: compared.opponent for name, compared in found.items()} == {
        "dgmg": "margin", "random": "margin", "dgmg+graph.graph_k=5": "margin+graph.graph_k=5",
    }  # fmt: skip
    assert found["dgmg"].paired.n == 3
    # by 0.01, 0.02 and 0.03 in two of three rows: three quarters of the range's height
    assert found["dgmg"].paired.difference.mean == pytest.approx(0.015)
    assert found["dgmg+graph.graph_k=5"].paired.p == 1
    assert found["random"].paired.difference.mean == pytest.approx(-0.075)
    assert [compared.holm_p for compared in found.values()] == holm([c.paired.p for c in found.values()])


def test_the_other_opponent_and_other_measures(one):
    def last(ours, theirs):
        return ours[-1].accuracy, theirs[-1].accuracy

    found = compare_with(one, "random", last)
    assert set(found) == {"margin", "dgmg", "margin+graph.graph_k=5", "dgmg+graph.graph_k=5"}
    assert {compared.opponent for compared in found.values()} == {"random"}
    assert found["margin"].paired.difference.mean == pytest.approx(0.1)
    assert compare_with(one, "random", lambda ours, theirs: None) == compare_with(one, "badge") == {}
    assert counterpart("lc", "random", one) == "random"
    assert set(OPPONENTS) == {"margin", "random"}
