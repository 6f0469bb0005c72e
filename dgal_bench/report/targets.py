"""Accuracies to reach, and what each strategy needs for them; strategies at equal total time."""

from dataclasses import dataclass
from math import floor

from dgal_bench.report.groups import Group
from dgal_bench.report.measures import accuracy_at, labels_to
from dgal_bench.report.spending import spent
from dgal_bench.report.statistics import Estimate, mean_interval

SHARES = (0.6, 0.8, 0.95)
"""Of the best mean final accuracy of a group: so every target is reached by somebody."""


def targets(group: Group) -> list[float]:
    """Accuracies in whole percents, the lowest first."""
    finals = [
        sum(log.records[-1].accuracy for log in logs.values()) / len(logs)
        for strategy in group.strategies
        if (logs := group.finished(strategy))
    ]
    return sorted({floor(100 * share * max(finals)) / 100 for share in SHARES})


@dataclass(frozen=True)
class Reached:
    """``labels``: the mean over the ``n_reached`` of ``n`` seeds that reach the target; None where none does."""

    labels: float | None
    n_reached: int
    n: int


def reached(group: Group, strategy: str, target: float) -> Reached:
    logs = group.finished(strategy).values()
    found = [labels for log in logs if (labels := labels_to(log.records, target)) is not None]
    return Reached(sum(found) / len(found) if found else None, len(found), len(logs))


def budgets(group: Group) -> list[tuple[str, float]]:
    """Seconds of set-up and queries to compare strategies at, each named by whose whole spending it is.

    The restricted strategies, the reference and the slowest: what a user of one of them has paid in the end.
    """
    totals = {name: spent(group, name)[-1] for name in group.strategies}
    slowest = max(totals, key=lambda name: totals[name])
    wanted = {name: totals[name] for name in totals if name in ("rsmg", "dgmg", "margin", slowest)}
    return sorted(wanted.items(), key=lambda item: item[1])


def at_budget(group: Group, strategy: str, seconds: float) -> Estimate | None:
    """Accuracy of the last evaluation that is paid for, set-up included; None where not even the first query is."""
    seconds_spent = spent(group, strategy)
    logs = group.finished(strategy).values()
    found = [accuracy_at([record.accuracy for record in log.records], seconds_spent, seconds) for log in logs]
    known = [one for one in found if one is not None]
    return mean_interval(known) if known else None
