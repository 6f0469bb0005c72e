"""The rules that claims are judged by, fixed before any row existed, and the samples of seeds they apply to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log

from dgal_bench.report.comparisons import zero_test
from dgal_bench.report.statistics import Estimate, mean_interval

CONFIRMED, REFUTED, UNDECIDED, NOT_RUN = "confirmed", "refuted", "undecided", "not run"

MIN_SEEDS = 5
"""With fewer seeds every verdict is undecided."""

ALPHA = 0.05
"""A part whose p exceeds this after Holm's correction within its claim is undecided."""

POINTS, TIMES, EXPONENT = "points", "times", "exponent"
POINT = 0.01
"""A point of accuracy, as a share."""


@dataclass(frozen=True)
class SeedSample:
    """One number per seed: a difference of shares (POINTS) or the logarithm of a ratio (TIMES)."""

    values: Mapping[int, float]
    unit: str
    source: str = ""
    """Where seconds come from: replay or rows."""
    busy: bool | None = False
    """Whether seconds were taken beside other work; None: not known."""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def effect(self) -> Estimate:
        """The mean and its 95 % interval, as a difference or as a ratio."""
        found = mean_interval(self._column)
        if self.unit != TIMES:
            return found
        return Estimate(exp(found.mean), exp(found.low), inf if found.high == inf else exp(found.high), found.n)

    def p(self, bound: float) -> float | None:
        """Of the two-sided test that the mean equals the bound."""
        at = log(bound) if self.unit == TIMES else bound
        return zero_test([value - at for value in self._column])

    @property
    def _column(self) -> list[float]:
        return [self.values[seed] for seed in sorted(self.values)]


@dataclass(frozen=True)
class Rule:
    """Confirmed where ``low``..``high`` contains the effect's interval (with ``meets``: overlaps it), refuted outside.

    Where only ``low`` is finite, it is also the bound of a test.
    """

    words: str
    low: float
    high: float = inf
    meets: bool = False

    @property
    def bound(self) -> float | None:
        """Of the test reported with the interval; None for a band, which has no test of one value."""
        return self.low if self.high == inf else None

    def verdict(self, effect: Estimate) -> str:
        outside = effect.high < self.low or effect.low > self.high
        if self.meets:
            return REFUTED if outside else CONFIRMED
        within = effect.low >= self.low and effect.high <= self.high
        if self.low in (0.0, 1.0) and self.high == inf:  # "more than" excludes an end that is exactly no difference
            within = effect.low > self.low
        return CONFIRMED if within else REFUTED if outside else UNDECIDED


@dataclass(frozen=True)
class Competitive(Rule):
    """Within a point either way, or better; refuted where the interval lies below both."""

    def verdict(self, effect: Estimate) -> str:
        if effect.low > 0 or (effect.low >= -self.high and effect.high <= self.high):
            return CONFIRMED
        return REFUTED if effect.high < -self.high else UNDECIDED


MORE = Rule("the interval of the difference lies above 0", 0.0)
MORE_TIMES = Rule("the interval of the ratio lies above 1", 1.0)
TEN_TIMES = Rule("the interval of the ratio lies at or above 10", 10.0)
NO_POINT_BELOW = Rule("the interval of the difference lies at or above -1 point", -POINT)
EQUAL = Rule("the interval of the difference lies within +-1 point", -POINT, POINT)
COMPETITIVE = Competitive("the interval lies within +-1 point, or above 0", -POINT, POINT)
LINEAR = Rule("the interval of the exponent lies within 0.1 of 1", 0.9, 1.1)


def about(times: float) -> Rule:
    """About 100 times: the interval of the ratio meets [30, 300]."""
    return Rule(f"the interval of the ratio meets [{0.3 * times:g}, {3 * times:g}]", 0.3 * times, 3 * times, meets=True)


def combine(verdicts: Sequence[str]) -> str:
    """One verdict from those of a claim's parts: one refuted part refutes, all confirmed confirm."""
    if REFUTED in verdicts:
        return REFUTED
    if not verdicts or all(one == NOT_RUN for one in verdicts):
        return NOT_RUN
    return CONFIRMED if all(one == CONFIRMED for one in verdicts) else UNDECIDED


def every(verdicts: Iterable[str]) -> str:
    """Confirmed if confirmed on each data set that was run."""
    return combine([one for one in verdicts if one != NOT_RUN])


def most(verdicts: Iterable[str]) -> str:
    """Confirmed if confirmed on more than half of the data sets that were run."""
    run = [one for one in verdicts if one != NOT_RUN]
    if 2 * run.count(CONFIRMED) > len(run):
        return CONFIRMED
    if run and 2 * run.count(REFUTED) >= len(run):
        return REFUTED  # the rest cannot be more than half
    return UNDECIDED if run else NOT_RUN


def some(verdicts: Iterable[str]) -> str:
    """Confirmed if confirmed on one data set that was run; refuted if refuted on all of them."""
    run = [one for one in verdicts if one != NOT_RUN]
    if CONFIRMED in run:
        return CONFIRMED
    if run and all(one == REFUTED for one in run):
        return REFUTED
    return UNDECIDED if run else NOT_RUN
