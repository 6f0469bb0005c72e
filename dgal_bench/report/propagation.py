"""The table of propagated accuracy: what the graph knows of the test images without any network."""

from collections.abc import Sequence

from dgal_bench.record import CellLog
from dgal_bench.report.statistics import t_interval
from dgal_bench.report.summary import Group
from dgal_bench.report.text import aligned, spread


def propagation_lines(group: Group) -> list[str]:
    """Network and graph side by side at the rounds 0, R/2 and R where the rows have it; nothing where none has."""
    told = {strategy: list(group.finished(strategy).values()) for strategy in group.strategies}
    told = {strategy: logs for strategy, logs in told.items() if all(log.records[0].propagated for log in logs)}
    if not told:
        return []
    some = next(iter(told.values()))
    first, *later = _rounds(some)
    head = ["strategy"]
    for round_ in later:
        head += [f"{some[0].records[round_].n_labeled} labels: network %", "T steps %", "converged %"]
    rows = [[name, *(cell for round_ in later for cell in _cells(logs, round_))] for name, logs in told.items()]
    network, steps, converged = _cells(some, first)
    return [
        "",
        "Labels propagated over the graph alone, test images classified by the pool points nearest to them: after the",
        "diffusion's own T steps, and converged. Images that no label reaches count as wrong (their share behind).",
        f"At {some[0].records[first].n_labeled} labels, all strategies: network {network}, T steps {steps}, "
        f"converged {converged}.",
        "",
        *aligned(head, rows),
    ]


def _rounds(logs: Sequence[CellLog]) -> list[int]:
    """Of 0, R/2 and R those that were looked at, 0 first."""
    last = len(logs[0].records) - 1
    return [r for r in sorted({0, last // 2, last}) if all(log.records[r].propagated for log in logs)]


def _cells(logs: Sequence[CellLog], round_: int) -> list[str]:
    """Network, T steps and converged, in % over seeds."""
    records = [log.records[round_] for log in logs]
    facts = [record.propagated or {} for record in records]

    def told(accuracy: str, unreached: str) -> str:
        if any(accuracy not in fact for fact in facts):
            return ""  # a directed graph has no harmonic limit to solve for
        lost = sum(fact[unreached] for fact in facts) / len(facts)
        behind = f" ({100 * lost:.1f} unreached)" if lost > 0 else ""
        return spread(t_interval([fact[accuracy] for fact in facts]), 100, 1) + behind

    network = spread(t_interval([record.accuracy for record in records]), 100, 1)
    return [network, told("accuracy", "unreached"), told("converged_accuracy", "converged_unreached")]
