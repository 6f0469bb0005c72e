"""Means over seeds with their 95 % intervals. Pure functions; S seeds, R columns (rows of a run), B resamples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, inf, log, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from scipy.stats import t as student

from dgal_bench.core.seeding import rng_for

MANY = 10
"""From so many seeds on no normal distribution is assumed: a bootstrap interval, a permutation test."""

RESAMPLES = 9_999
TIE = (
    1e-9  # of the largest value: smaller differences are rounding, in accuracies near 1 that differ by 1 in 10,000 say
)
_CHUNK = 512  # columns resampled at once: 40 MB

Floats = NDArray[np.float64]
_Offsets = Callable[[Floats, float], tuple[Floats, Floats]]


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and its 95 % interval; with one seed the interval is the whole line."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: Sequence[float]) -> Estimate:
    """The mean of independent seeds: Student's interval under 10 of them, BCa's from 10."""
    return _mean_interval(tuple(values))


@lru_cache(maxsize=1 << 14)
def _mean_interval(values: tuple[float, ...]) -> Estimate:
    """Cached: a report uses the same numbers in several places."""
    return mean_intervals(_column(values))[0]


def mean_intervals(values_SR: ArrayLike) -> list[Estimate]:
    """``mean_interval`` of each of R columns of S seeds."""
    values = np.asarray(values_SR, dtype=np.float64)
    return list(_intervals(values, _t_offsets if len(values) < MANY else _bca_offsets, 0.95))


def t_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Student's interval for the mean of independent seeds; normality is assumed."""
    return next(_intervals(_column(values), _t_offsets, level))


def bca_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The bias-corrected and accelerated bootstrap interval of the mean (Efron 1987), 9,999 resamples.

    The resamples are the same for any n seeds in any order, so the same values have the same interval everywhere.
    """
    return next(_intervals(_column(values), _bca_offsets, level))


def _column(values: Sequence[float]) -> Floats:
    return np.array(values, dtype=np.float64)[:, None]


def _intervals(values_SR: Floats, offsets: _Offsets, level: float) -> Iterator[Estimate]:
    """Of each column; ``offsets`` computes the ends relative to the mean."""
    n = len(values_SR)
    sorted_RS = np.sort(np.ascontiguousarray(values_SR.T), axis=1)  # resampling must not depend on the order of seeds
    # equal but for rounding: that must give neither a width nor a side
    equal_R = sorted_RS[:, -1] - sorted_RS[:, 0] <= TIE * np.abs(sorted_RS).max(axis=1)
    means_R = np.where(equal_R, sorted_RS[:, 0], sorted_RS.mean(axis=1))
    deviations_RS = np.where(equal_R[:, None], 0.0, sorted_RS - means_R[:, None])
    lows_R, highs_R = offsets(deviations_RS, level) if n > 1 else (-inf, inf)
    ends = (means_R, means_R + lows_R, means_R + highs_R)
    for mean, low, high in zip(*(end.tolist() for end in ends), strict=True):
        yield Estimate(mean, low, high, n)


def _t_offsets(deviations_RS: Floats, level: float) -> tuple[Floats, Floats]:
    n = deviations_RS.shape[1]
    deviation_R = np.sqrt((deviations_RS**2).sum(axis=1) / (n - 1))
    half_R = float(student.ppf((1 + level) / 2, n - 1)) * deviation_R / sqrt(n)
    return -half_R, half_R


def _bca_offsets(deviations_RS: Floats, level: float) -> tuple[Floats, Floats]:
    chunks = [deviations_RS[at : at + _CHUNK] for at in range(0, max(len(deviations_RS), 1), _CHUNK)]
    lows, highs = zip(*(_bca(chunk, level) for chunk in chunks), strict=True)
    return np.concatenate(lows), np.concatenate(highs)


def _bca(deviations_RS: Floats, level: float) -> tuple[Floats, Floats]:
    """The ends: resampled means at two ranks, moved by their bias and by the acceleration.

    For a mean the jackknife's deviations are the seeds' own over 1 - n, so the acceleration is a sixth of their
    skewness over the root of n. If all deviations are 0 the interval has no width.
    """
    largest_R = np.abs(deviations_RS).max(axis=1)
    scale_R = np.where(largest_R > 0, largest_R, 1.0)
    scaled_RS = deviations_RS / scale_R[:, None]
    # no BLAS product: its threads wait for each other on a busy machine, and its bits depend on R
    resampled_RB = np.einsum("rs,sb->rb", scaled_RS, _weights(scaled_RS.shape[1]))
    below_R = ((resampled_RB < -TIE).sum(axis=1) + (resampled_RB <= TIE).sum(axis=1)) / (2 * RESAMPLES)
    bias_R = norm.ppf(below_R)
    squares_R = np.maximum(
        (scaled_RS**2).sum(axis=1), 1.0
    )  # the largest scaled square is 1, so the sum is below 1 only if all are 0
    acceleration_R = (scaled_RS**3).sum(axis=1) / (6 * squares_R**1.5)

    def end(share: float) -> Floats:
        moved_R = bias_R + norm.ppf(share)
        ranks_R = norm.cdf(bias_R + moved_R / (1 - acceleration_R * moved_R)) * (RESAMPLES - 1)
        return _at(resampled_RB, ranks_R) * scale_R

    return end((1 - level) / 2), end((1 + level) / 2)


@lru_cache(maxsize=4)
def _weights(n: int) -> Floats:
    """(n, RESAMPLES): the share of each seed in each resample.

    Half of the resamples mirror the others and the last is the sample itself: so mirrored values have the mirrored
    interval.
    """
    counts_BS = rng_for(0, "bootstrap", n).multinomial(n, np.full(n, 1 / n), size=RESAMPLES // 2)
    weights_BS = np.concatenate([counts_BS, counts_BS[:, ::-1], np.ones((1, n))]) / n
    weights_SB: Floats = np.ascontiguousarray(weights_BS.T)
    weights_SB.setflags(write=False)
    return weights_SB


def _at(values_RB: Floats, ranks_R: Floats) -> Floats:
    """The value of each row at a fractional rank, linear between whole ones; rows need not be sorted."""
    whole_R = np.minimum(ranks_R.astype(np.int64), values_RB.shape[1] - 2)
    pairs = [np.partition(row, (at, at + 1))[at : at + 2] for row, at in zip(values_RB, whole_R.tolist(), strict=True)]
    low_R, high_R = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    values_R: Floats = low_R + (ranks_R - whole_R) * (high_R - low_R)
    return values_R


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Geometric mean of paired ratios, ``mean_interval`` of their logarithms. All values must be positive."""
    logs = mean_interval([log(a / b) for a, b in zip(numerators, denominators, strict=True)])
    high = inf if logs.high == inf else exp(logs.high)
    return Estimate(exp(logs.mean), exp(logs.low), high, logs.n)


def interpolate(known: Mapping[int, float], n_rounds: int) -> list[float]:
    """A value for every round 0..n-1 from ``known`` ones, 0 and n-1 among them: linear between these."""
    rounds = sorted(known)
    values: list[float] = np.interp(np.arange(n_rounds), rounds, [known[round_] for round_ in rounds]).tolist()
    return values
