"""What rows and their costs say beyond a mean: labels to a target, classes seen, Pareto fronts, when a cost is paid."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, log

from dgal_bench.results.rows import RoundRecord

# What the rows of one run mean: the area under its curve, its query time. Plain Python, which costs no import.


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


def labels_to(records: Sequence[RoundRecord], target: float) -> int | None:
    """The number of labels of the first row whose accuracy is at least the target; None where it was never reached."""
    return next((one.n_labeled for one in records if one.accuracy >= target), None)


def accuracy_at(accuracies: Sequence[float], spent: Sequence[float], budget: float) -> float | None:
    """Of the last row that the budget of seconds has paid for; None where it does not pay for the first."""
    paid = [accuracy for accuracy, seconds in zip(accuracies, spent, strict=True) if seconds <= budget]
    return paid[-1] if paid else None


def total_seconds(one_off: float, seconds: Sequence[float]) -> list[float]:
    """What each row has cost in seconds, set-up and the queries before it: one more than there are queries."""
    return [one_off + so_far for so_far in cumulative(seconds)]


def classes_seen(records: Sequence[RoundRecord], initial_classes: Sequence[int] | None) -> list[int] | None:
    """The different classes among the labels that each row was trained on; None where some are not recorded."""
    batches = [initial_classes, *(one.classes for one in records[:-1])]
    known = [set(batch) for batch in batches if batch is not None]
    if len(known) < len(batches):
        return None
    return [len(set().union(*known[: row + 1])) for row in range(len(known))]


def batch_balance(classes: Sequence[int], n_classes: int) -> float:
    """The entropy of a batch's classes, over the largest that a batch of its size can have: 1 where as even as can be.

    That largest is exact, not log min(B, C): of 10 labels in 4 classes two have 3 and two have 2. A batch of one label,
    and any batch of one class where there is only one, is as even as can be.
    """
    size, extra = divmod(len(classes), n_classes)
    evenest = _entropy([size + 1] * extra + [size] * (n_classes - extra))
    return min(1.0, _entropy(Counter(classes).values()) / evenest) if evenest > 0 else 1.0


def _entropy(counts: Iterable[int]) -> float:
    """In nats."""
    some = [count for count in counts if count]
    return sum(count * log(sum(some) / count) for count in some) / sum(some)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Of (cost, quality) the names that no other is both as cheap and as good as and better in one; by cost."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1] or points[name] == points[front[-1]]:
            front.append(name)
    return front


@dataclass(frozen=True)
class PayOff:
    """The number of queries from which on a one-off cost has paid; None: never.

    ``extrapolated`` beyond the queries that there were, at their mean seconds.
    """

    queries: int | None
    extrapolated: bool


def pay_off(one_off: float, ours: Sequence[float], theirs: Sequence[float]) -> PayOff:
    """When the one-off cost and our queries' seconds are no more than theirs, and stay so; as far as both have queries.

    A cost that is paid for once and not at the end has not paid for itself.
    """
    n = min(len(ours), len(theirs))
    owed = [a - b for a, b in zip(total_seconds(one_off, ours[:n]), cumulative(theirs[:n]), strict=True)]
    unpaid = [made for made, seconds in enumerate(owed) if seconds > 0]
    if not unpaid or unpaid[-1] < n:
        return PayOff(unpaid[-1] + 1 if unpaid else 0, extrapolated=False)
    saved = sum(theirs[:n]) - sum(ours[:n])
    if saved <= 0:
        return PayOff(None, extrapolated=True)
    return PayOff(max(n + 1, ceil(one_off / (saved / n))), extrapolated=True)
