"""The one-off cost, and the query after which it has paid: against every strategy whose queries rest on no set-up."""

from collections.abc import Sequence
from dataclasses import dataclass

from dgal_bench.report.groups import Group
from dgal_bench.report.measures import PaidOff, paid_after
from dgal_bench.report.spending import one_off, query_seconds


@dataclass(frozen=True)
class Investment:
    """A strategy's set-up in seconds, and when it has paid against each rival, in the order of ``rivals``."""

    strategy: str
    seconds: float
    paid: Sequence[PaidOff]


@dataclass(frozen=True)
class Ledger:
    rivals: Sequence[str]
    investments: Sequence[Investment]
    n_queries: int


def ledger(group: Group) -> Ledger | None:
    """None where nothing rests on a set-up, or everything does."""
    costs = {name: one_off(group, name) for name in group.strategies}
    rivals = [name for name in group.strategies if costs[name] == 0]
    owing = [name for name in group.strategies if costs[name] > 0]
    if not rivals or not owing:
        return None
    seconds = {name: query_seconds(group, name) for name in costs}
    rivals.sort(key=lambda name: -sum(seconds[name]))
    made = [
        Investment(name, costs[name], [paid_after(costs[name], seconds[name], seconds[rival]) for rival in rivals])
        for name in sorted(owing, key=lambda name: sum(seconds[name]))
    ]
    return Ledger(rivals, made, max(map(len, seconds.values())))


def told(paid: PaidOff) -> str:
    """``12``: after so many queries; ``(60)``: beyond those that were made, at their mean seconds."""
    return "never" if paid.queries is None else f"({paid.queries:,})" if paid.extrapolated else f"{paid.queries:,}"
