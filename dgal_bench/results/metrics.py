"""Metrics of rows and costs, in plain Python: area under the curve, query time, classes seen, Pareto front, pay-off."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, log

from dgal_bench.results.rows import RoundRecord


def area_under_curve(records: Sequence[RoundRecord]) -> float:
    """Mean accuracy over the range of labels: the trapezoidal area divided by its width."""
    pairs = list(pairwise(records))
    area = sum((b.n_labeled - a.n_labeled) * (a.accuracy + b.accuracy) / 2 for a, b in pairs)
    return area / (records[-1].n_labeled - records[0].n_labeled)


def query_seconds(records: Sequence[RoundRecord]) -> list[float]:
    """Seconds of each query."""
    return [r.query_seconds for r in records if r.query_seconds is not None]


def mean_query_seconds(records: Sequence[RoundRecord]) -> float:
    seconds = query_seconds(records)
    return sum(seconds) / len(seconds)


def mean_scored(records: Sequence[RoundRecord]) -> float:
    """Points passed through the task network per query: a cost that does not depend on the machine."""
    scored = [r.n_scored for r in records if r.n_scored is not None]
    return sum(scored) / len(scored)


def cumulative_query_seconds(records: Sequence[RoundRecord]) -> list[float]:
    """For each row the query seconds of the rows before it: the cost of its accuracy (paper, Fig. 5)."""
    return cumulative([record.query_seconds or 0.0 for record in records[:-1]])


def cumulative(seconds: Sequence[float]) -> list[float]:
    """0, s0, s0 + s1, ...: one more value than ``seconds``."""
    return [0.0, *accumulate(seconds)]


def labels_to(records: Sequence[RoundRecord], target: float) -> int | None:
    """The number of labels of the first row whose accuracy is at least the target; None: not reached."""
    return next((r.n_labeled for r in records if r.accuracy >= target), None)


def accuracy_at(accuracies: Sequence[float], spent: Sequence[float], budget: float) -> float | None:
    """Accuracy of the last row that costs at most ``budget`` seconds; None where the first costs more."""
    within = [accuracy for accuracy, seconds in zip(accuracies, spent, strict=True) if seconds <= budget]
    return within[-1] if within else None


def total_seconds(one_off: float, seconds: Sequence[float]) -> list[float]:
    """Seconds of set-up and of the queries before each row: one more value than queries."""
    return [one_off + so_far for so_far in cumulative(seconds)]


def classes_seen(records: Sequence[RoundRecord], initial_classes: Sequence[int] | None) -> list[int] | None:
    """Number of different classes among the labels of each row; None where some are not recorded."""
    batches = [initial_classes, *(r.classes for r in records[:-1])]
    recorded = [set(batch) for batch in batches if batch is not None]
    if len(recorded) < len(batches):
        return None
    return [len(set().union(*recorded[: row + 1])) for row in range(len(batches))]


def batch_balance(classes: Sequence[int], n_classes: int) -> float:
    """Entropy of a batch's classes over the largest entropy of a batch of its size: 1 is the most even batch.

    The largest is exact, not log min(B, C): of 10 labels in 4 classes two have 3 and two have 2. It is 0 for one label
    or one class: then the result is 1.
    """
    size, extra = divmod(len(classes), n_classes)
    evenest = _entropy([size + 1] * extra + [size] * (n_classes - extra))
    return min(1.0, _entropy(Counter(classes).values()) / evenest) if evenest > 0 else 1.0


def _entropy(counts: Iterable[int]) -> float:
    """In nats."""
    positive = [count for count in counts if count]
    total = sum(positive)
    return sum(count * log(total / count) for count in positive) / total


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the (cost, quality) points that no other point dominates, by cost: equal points do not."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1] or points[name] == points[front[-1]]:
            front.append(name)
    return front


@dataclass(frozen=True)
class PayOff:
    """The number of queries after which a one-off cost has paid for itself; None: never.

    ``extrapolated``: beyond the recorded queries, at their mean seconds.
    """

    queries: int | None
    extrapolated: bool


def pay_off(one_off: float, ours: Sequence[float], theirs: Sequence[float]) -> PayOff:
    """When the one-off cost and our queries take at most the seconds of their queries, from then to the end.

    Only the queries that both have count.
    """
    n = min(len(ours), len(theirs))
    owed = [a - b for a, b in zip(total_seconds(one_off, ours[:n]), cumulative(theirs[:n]), strict=True)]
    unpaid = [n_queries for n_queries, seconds in enumerate(owed) if seconds > 0]
    if not unpaid or unpaid[-1] < n:
        return PayOff(unpaid[-1] + 1 if unpaid else 0, extrapolated=False)
    saved = sum(theirs[:n]) - sum(ours[:n])
    if saved <= 0:
        return PayOff(None, extrapolated=True)
    return PayOff(max(n + 1, ceil(one_off / (saved / n))), extrapolated=True)
