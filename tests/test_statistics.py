"""Intervals of means: scipy's, and laws that no sample may break."""

import warnings
from math import exp, inf, isfinite, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dgal_bench.report.statistics import MANY, bca_interval, mean_interval, mean_intervals, ratio_interval, t_interval

RNG = np.random.default_rng(3)
SAMPLES = {
    "normal": RNG.normal(0.9, 0.02, 10),
    "exponential": RNG.exponential(size=15),
    "lognormal": RNG.lognormal(0, 1.2, 25),
    "left": 1 - RNG.beta(1, 8, 12) ** 2,
    "ties": np.array([0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 0.75, 0.75, 1.0]),
    "one far out": np.array([0.9] * 11 + [0.1]),
}
INTERVALS = [t_interval, bca_interval]
seeds = st.lists(st.integers(-1000, 1000).map(lambda k: k / 1000), min_size=2, max_size=14)
few_examples = settings(max_examples=25, deadline=None)


def ends(estimate):
    return np.array([estimate.mean, estimate.low, estimate.high])


@pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_the_t_interval_is_scipys(values, level):
    wanted = stats.t.interval(level, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    assert ends(t_interval(values, level))[1:] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES)
def test_the_bca_interval_is_scipys_up_to_its_resamples(values):
    """Each end of ours lies among scipy's of several generators, or off their mean by less than 5 of their spreads."""
    found = [
        stats.bootstrap((values,), np.mean, n_resamples=9_999, method="BCa", rng=np.random.default_rng(k))
        for k in range(8)
    ]
    theirs = np.array([[one.confidence_interval.low, one.confidence_interval.high] for one in found])
    width = np.ptp(theirs.mean(axis=0))
    error = np.maximum(theirs.std(axis=0, ddof=1), 1e-3 * width)
    assert np.all(np.abs(ends(bca_interval(values))[1:] - theirs.mean(axis=0)) < 5 * error)


def test_a_bca_interval_leans_where_the_sample_does():
    skewed = bca_interval(SAMPLES["lognormal"])
    assert skewed.high - skewed.mean > 1.2 * (skewed.mean - skewed.low)
    assert skewed.high > t_interval(SAMPLES["lognormal"]).high


@pytest.mark.parametrize("interval", INTERVALS)
@few_examples
@given(values=seeds, shift=st.sampled_from([-3.0, 0.7, 40.0]), scale=st.sampled_from([0.05, 0.3, 60.0]))
def test_shifted_and_scaled_seeds_shift_and_scale_the_interval(interval, values, shift, scale):
    moved = interval([shift + scale * value for value in values])
    assert ends(moved) == pytest.approx(shift + scale * ends(interval(values)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("interval", INTERVALS)
@few_examples
@given(values=seeds)
def test_mirrored_seeds_mirror_the_interval(interval, values):
    mirrored, plain = interval([-value for value in values]), interval(values)
    assert ends(mirrored) == pytest.approx(-ends(plain)[[0, 2, 1]], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("interval", INTERVALS)
@few_examples
@given(values=seeds, data=st.data())
def test_the_order_of_seeds_does_not_matter(interval, values, data):
    assert interval(data.draw(st.permutations(values))) == interval(values)


@pytest.mark.parametrize("interval", INTERVALS)
@few_examples
@given(values=seeds)
def test_the_mean_lies_within_and_a_higher_level_is_wider(interval, values):
    narrow, wide = interval(values, 0.8), interval(values, 0.95)
    assert all(map(isfinite, ends(wide)))
    assert wide.low <= narrow.low <= narrow.high <= wide.high
    assert wide.low <= wide.mean <= wide.high
    assert narrow.n == len(values)


@pytest.mark.parametrize("n", [2, 9, 10, 30])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-300])
def test_equal_seeds_have_an_interval_of_no_width(n, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [interval([value] * n) for interval in (*INTERVALS, mean_interval)]
    assert {(one.mean, one.low, one.high, one.n) for one in found} == {(value, value, value, n)}


def test_the_normal_distribution_is_assumed_of_few_seeds_only():
    values = SAMPLES["lognormal"]
    for n in range(1, MANY):
        assert mean_interval(values[:n]) == t_interval(values[:n])
    for n in (MANY, MANY + 1, 25):
        assert mean_interval(values[:n]) == bca_interval(values[:n]) != t_interval(values[:n])
    assert MANY == 10


def test_one_seed_has_no_interval():
    for interval in (*INTERVALS, mean_interval):
        assert ends(interval([0.5])).tolist() == [0.5, -inf, inf]


@pytest.mark.parametrize("n", [1, 2, 5, 9, 10, 23])
def test_many_columns_at_once_are_each_columns_own(n):
    """More columns than are resampled at once, one of them all equal, one a single seed off."""
    values = RNG.exponential(size=(n, 530 if n == 10 else 7))
    values[:, 1] = 0.1
    values[:, 2] = 0.0
    values[-1, 2] = 1.0
    together = mean_intervals(values)
    assert len(together) == values.shape[1]
    for column in [0, 1, 2, 6, -1]:
        assert ends(together[column]) == pytest.approx(ends(mean_interval(values[:, column])), rel=1e-11)
        assert together[column].n == n
    assert mean_intervals(np.zeros((n, 0))) == []


@pytest.mark.parametrize("n", [1, 4, 12])
def test_a_ratios_interval_is_that_of_the_logarithms(n):
    ratios = RNG.lognormal(3, 1, n)
    found, logs = ratio_interval(ratios * 0.01, [0.01] * n), mean_interval([log(one) for one in ratios])
    assert found.mean == pytest.approx(stats.gmean(ratios))
    wanted = [exp(logs.low), inf if n == 1 else exp(logs.high)]
    assert [found.low, found.high] == pytest.approx(wanted)


def test_seeds_that_are_equal_but_for_rounding_have_no_width():
    """0.1 + 0.2 is not 0.3: deviations of one sign, of which there is no bias to correct."""
    for values in ([0.1 + 0.2] * 9 + [0.3], [0.3] * 9 + [0.1 + 0.2], [0.1 + 0.2] * 4 + [0.3]):
        found = mean_interval(values)
        assert (found.low, found.high) == (found.mean, found.mean)
