"""One strategy against another, paired over the seeds that both have; a family of such tests corrected by Holm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from scipy.stats import t as student

from dgal_bench.core.seeding import rng_for
from dgal_bench.report.groups import BASELINE, Group
from dgal_bench.report.statistics import MANY, TIE, Estimate, Floats, mean_interval
from dgal_bench.results.metrics import area_under_curve
from dgal_bench.results.rows import RoundRecord

OPPONENTS = (BASELINE, "random")
"""What every strategy is compared with."""

EXACT = 17
"""Up to so many seeds all flips of signs are counted: half of 2^17 is fewer than FLIPS."""

FLIPS = 99_999

Records = Sequence[RoundRecord]
Measure = Callable[[Records, Records], tuple[float, float] | None]
"""A number for each of two runs, ours first; None if they have too little in common."""


@dataclass(frozen=True)
class PairedValues:
    """Ours minus theirs over the n seeds of both, and the two-sided test of no difference.

    ``p`` is None with one seed. ``smallest_p`` is the least p of flipping the signs of n differences, all that n seeds
    can show without assuming a normal distribution: a t test's p may be below it.
    """

    difference: Estimate
    p: float | None
    smallest_p: float
    method: str
    n: int


@dataclass(frozen=True)
class Comparison:
    """A strategy against ``opponent``; ``holm_p`` is corrected over all strategies compared with it."""

    opponent: str
    paired: PairedValues
    holm_p: float | None


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedValues | None:
    """Over the seeds in both: Student's interval and test under 10, BCa's interval and sign flips from 10."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    n = len(differences)
    if n == 0:
        return None
    method = "BCa, permutation" if n >= MANY else "paired t"
    return PairedValues(mean_interval(differences), zero_test(differences), smallest_p(n), method, n)


def zero_test(differences: Sequence[float]) -> float | None:
    """The p of no difference: Student's under 10 seeds, sign flips from 10; None with one seed."""
    if len(differences) < 2:
        return None
    return flip_test(differences) if len(differences) >= MANY else t_test(differences)


def smallest_p(n: int) -> float:
    """The smallest p that n differences can reach: 2 / 2^n where all flips are counted, else 1 / (FLIPS + 1)."""
    return max(2.0 ** (1 - n), 1 / (FLIPS + 1))


def t_test(differences: Sequence[float]) -> float:
    """Student's two-sided test of mean 0; if all differences are equal, p is 0, or 1 where they are 0."""
    n, mean = len(differences), sum(differences) / len(differences)
    error = sqrt(sum((one - mean) ** 2 for one in differences) / (n - 1) / n)
    t = abs(mean) / error if error else inf if mean else 0.0
    return float(2 * student.sf(t, n - 1))


def flip_test(differences: Sequence[float]) -> float:
    """The share of flips of signs whose mean is as far from 0 as that of the differences.

    All of them up to 17 seeds; beyond, 99,999 drawn ones and the differences themselves (Phipson and Smyth 2010).
    """
    sizes_S = np.sort(np.abs(differences))  # flips depend on neither their signs nor their order
    n, largest = len(sizes_S), float(sizes_S.sum())
    observed = abs(sum(differences)) - TIE * largest
    sums = np.abs(_all_flips(sizes_S) if n <= EXACT else _drawn_flips(sizes_S))
    n_as_far = int((sums >= observed).sum())
    return n_as_far / len(sums) if n <= EXACT else (n_as_far + 1) / (len(sums) + 1)


def _all_flips(sizes_S: Floats) -> Floats:
    """The sums under every choice of signs but the last: the others mirror them."""
    sums = sizes_S[-1:]
    for size in sizes_S[:-1]:
        sums = np.concatenate([sums + size, sums - size])
    return sums


def _drawn_flips(sizes_S: Floats) -> Floats:
    """One seed at a time: a matrix of all signs would take much memory."""
    rng, sums = rng_for(0, "flips", len(sizes_S)), np.zeros(FLIPS)
    for size in sizes_S:
        sums += np.where(rng.integers(0, 2, FLIPS, dtype=np.int8), size, -size)
    return sums


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over the tests that were made; None stays None."""
    tests = sorted((p, at) for at, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, at) in enumerate(tests):
        adjusted[at] = largest = max(largest, min(1.0, (len(tests) - rank) * p))
    return adjusted


def common_area(ours: Records, theirs: Records) -> tuple[float, float] | None:
    """Areas under the curve over the numbers of labels at which both were evaluated; None with fewer than two."""
    shared = {one.n_labeled for one in ours} & {one.n_labeled for one in theirs}
    if len(shared) < 2:
        return None
    areas = [area_under_curve([one for one in records if one.n_labeled in shared]) for records in (ours, theirs)]
    return areas[0], areas[1]


def counterpart(strategy: str, opponent: str, group: Group) -> str:
    """The opponent under the same varied settings (``random+graph.graph_k=10``) where there is one."""
    variant = "+".join([opponent, *strategy.split("+")[1:]])
    return variant if variant in group.runs else opponent


def compare_with(group: Group, opponent: str, measure: Measure = common_area) -> dict[str, Comparison]:
    """Every other strategy that shares a finished seed with the opponent, corrected by Holm over all of them."""
    opponents = [(strategy, counterpart(strategy, opponent, group)) for strategy in group.strategies]
    found = {
        ours: (theirs, _compare_pair(group, ours, theirs, measure)) for ours, theirs in opponents if ours != theirs
    }
    shared = {strategy: (theirs, pair) for strategy, (theirs, pair) in found.items() if pair is not None}
    corrected = zip(shared.items(), holm([pair.p for _, pair in shared.values()]), strict=True)
    return {strategy: Comparison(theirs, pair, p) for (strategy, (theirs, pair)), p in corrected}


def _compare_pair(group: Group, ours: str, theirs: str, measure: Measure) -> PairedValues | None:
    runs, others = group.finished(ours), group.finished(theirs)
    measured = {seed: measure(runs[seed].records, others[seed].records) for seed in runs.keys() & others.keys()}
    known = {seed: both for seed, both in measured.items() if both is not None}
    return paired_differences(*({seed: both[side] for seed, both in known.items()} for side in (0, 1)))
