"""What rows mean: means with intervals, areas under curves, cumulative query time. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import exp, inf, log, sqrt

import numpy as np
from scipy.stats import t as student

from dgal_bench.record import RoundRecord


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and its 95 % interval; with one seed the interval is the whole line."""

    mean: float
    low: float
    high: float
    n: int


def t_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Student's interval for the mean of independent seeds; normality is assumed."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return Estimate(mean, -inf, inf, n)
    deviation = sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(student.ppf((1 + level) / 2, n - 1)) * deviation / sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Geometric mean of paired ratios, its interval taken on their logarithms. All values must be positive."""
    on_logs = t_interval([log(a / b) for a, b in zip(numerators, denominators, strict=True)])
    high = inf if on_logs.high == inf else exp(on_logs.high)
    return Estimate(exp(on_logs.mean), exp(on_logs.low), high, on_logs.n)


def area_under_curve(records: Sequence[RoundRecord]) -> float:
    """Mean accuracy over the range of labels: the trapezoidal area divided by its width."""
    pairs = list(pairwise(records))
    area = sum((b.n_labeled - a.n_labeled) * (a.accuracy + b.accuracy) / 2 for a, b in pairs)
    return area / (records[-1].n_labeled - records[0].n_labeled)


def query_seconds(records: Sequence[RoundRecord]) -> list[float]:
    """Seconds of each query made."""
    return [r.query_seconds for r in records if r.query_seconds is not None]


def mean_query_seconds(records: Sequence[RoundRecord]) -> float:
    seconds = query_seconds(records)
    return sum(seconds) / len(seconds)


def mean_scored(records: Sequence[RoundRecord]) -> float:
    """Points passed through the task network per query: the cost that no machine changes."""
    scored = [r.n_scored for r in records if r.n_scored is not None]
    return sum(scored) / len(scored)


def cumulative_query_seconds(records: Sequence[RoundRecord]) -> list[float]:
    """For each row the query seconds of the rows before it: what its accuracy has cost (paper, Fig. 5)."""
    return cumulative([record.query_seconds or 0.0 for record in records[:-1]])


def cumulative(seconds: Sequence[float]) -> list[float]:
    """0, s0, s0 + s1, ...: one more than there are."""
    return [0.0, *accumulate(seconds)]


def interpolated(known: Mapping[int, float], n_rounds: int) -> list[float]:
    """A value for every round 0..n-1 from those of some, 0 and n-1 among them: linear between them."""
    rounds = sorted(known)
    found: list[float] = np.interp(np.arange(n_rounds), rounds, [known[round_] for round_ in rounds]).tolist()
    return found
