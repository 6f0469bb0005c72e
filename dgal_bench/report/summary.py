"""One row per strategy with intervals over seeds, and summary.csv."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dgal_bench.report.comparisons import OPPONENTS, Comparison, compare_with, counterpart
from dgal_bench.report.costs import one_off
from dgal_bench.report.groups import BASELINE, Group
from dgal_bench.report.statistics import Estimate, mean_interval, ratio_interval
from dgal_bench.report.times import (
    CountSeconds,
    Times,
    all_phases,
    comparable,
    either_busy,
    from_replay,
    from_rows,
    hardware,
)
from dgal_bench.results.metrics import area_under_curve, mean_scored

_SOURCES = ("query_source", "query_beside", "speedup_source", "speedup_beside")


@dataclass(frozen=True)
class SummaryRow:
    """One strategy: shares in 0..1, seconds, points; ``speedup`` is None without a finished reference run."""

    strategy: str
    final_accuracy: Estimate
    area: Estimate
    query_seconds: Estimate
    n_scored: float
    speedup: Estimate | None
    query: Times
    speedup_source: str
    speedup_busy: bool | None
    setup_seconds: float
    """One-off, of the representation and graph that its queries need."""


@lru_cache(maxsize=64)
def summarise(group: Group) -> Sequence[SummaryRow]:
    """A row per strategy, the largest area under the curve first. Cached: several parts of a report use them."""
    rows = [_row(group, strategy) for strategy in group.strategies]
    return sorted(rows, key=lambda row: -row.area.mean)


def _row(group: Group, strategy: str) -> SummaryRow:
    runs = group.finished(strategy)
    query = from_replay(group.replays(strategy)) or from_rows(runs)
    pair = times_of_both(group, strategy, counterpart(strategy, BASELINE, group))
    seeds = sorted(pair[0].seconds) if pair else []
    return SummaryRow(
        strategy,
        final_accuracy=mean_interval([log.records[-1].accuracy for log in runs.values()]),
        area=mean_interval([area_under_curve(log.records) for log in runs.values()]),
        query_seconds=mean_interval(list(query.seconds.values())),
        n_scored=sum(mean_scored(log.records) for log in runs.values()) / len(runs),
        speedup=ratio_interval([pair[1].seconds[seed] for seed in seeds], [pair[0].seconds[seed] for seed in seeds])
        if pair
        else None,
        query=query,
        speedup_source=pair[0].source if pair else "",
        speedup_busy=either_busy(*(times.busy for times in pair or ())),
        setup_seconds=one_off(group, strategy),
    )


def times_of_both(
    group: Group, ours: str, theirs: str, count_seconds: CountSeconds = all_phases
) -> tuple[Times, Times] | None:
    """The times of two strategies, of the same seeds and from the same source; None without any."""
    mine, other = group.replays(ours), group.replays(theirs)
    both = [seed for seed in mine.keys() & other.keys() if comparable(mine[seed], other[seed])]
    replays = [from_replay({seed: timings[seed] for seed in both}, count_seconds) for timings in (mine, other)]
    if replays[0] and replays[1]:
        return replays[0], replays[1]
    runs = [group.finished(strategy) for strategy in (ours, theirs)]
    seeds = runs[0].keys() & runs[1].keys()
    if not seeds:
        return None
    first, second = (from_rows({seed: logs[seed] for seed in seeds}, count_seconds) for logs in runs)
    return first, second


MEASURES = ("final_accuracy", "area", "query_seconds", "speedup")
_IDENTITY = ("suite", "dataset", "profile", "algorithm_version", "machine", "strategy", "n_seeds", "n_scored")
_SIDES = ("", "_low", "_high", "_n", "_p", "_p_holm")


def summary_csv(groups: Iterable[Group]) -> str:
    """Full precision, one line per strategy; an interval's ends are empty with one seed.

    Then the source of times (replay or rows) and whether other work ran meanwhile (yes, no or unknown); then the area
    minus an opponent's, over the labels both have and paired over n seeds, with its p and Holm's.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{measure}{end}" for measure in MEASURES for end in ("", "_low", "_high")]
    versus = [f"area_vs_{opponent}{side}" for opponent in OPPONENTS for side in _SIDES]
    writer.writerow([*_IDENTITY, *ends, *_SOURCES, "setup_seconds", *versus])
    for one in groups:
        comparisons = [compare_with(one, opponent) for opponent in OPPONENTS]
        for row in summarise(one):
            values = [value for measure in MEASURES for value in _ends(getattr(row, measure))]
            differences = [value for by in comparisons for value in _versus(by.get(row.strategy))]
            writer.writerow([*_identity(one, row), *values, *_sources(row), row.setup_seconds, *differences])
    return text.getvalue()


def _identity(group: Group, row: SummaryRow) -> list[str | int | float]:
    where = " / ".join(sorted({hardware(log.header) for log in group.finished(row.strategy).values()}))
    keys: list[str | int | float] = [group.suite, group.dataset_label, group.profile, group.algorithm_version, where]
    return [*keys, row.strategy, row.final_accuracy.n, row.n_scored]


def _sources(row: SummaryRow) -> list[str]:
    answers = {True: "yes", False: "no", None: "unknown"}
    speedup = [row.speedup_source, answers[row.speedup_busy]] if row.speedup else ["", ""]
    return [row.query.source, answers[row.query.busy], *speedup]


def _versus(one: Comparison | None) -> list[float | str]:
    if one is None:
        return [""] * len(_SIDES)
    tests = ["" if p is None else p for p in (one.paired.p, one.holm_p)]
    return [*_ends(one.paired.difference), one.paired.n, *tests]


def _ends(estimate: Estimate | None) -> list[float | str]:
    if estimate is None:
        return ["", "", ""]
    return [estimate.mean, *((estimate.low, estimate.high) if estimate.n > 1 else ("", ""))]
