"""What the rows of one cell mean: the area under its curve, its query time. Plain Python, which costs no import."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from dgal_bench.record import RoundRecord


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
