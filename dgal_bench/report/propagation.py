"""The table of propagated accuracy: what the graph knows of the test images without any network."""

from collections.abc import Sequence

from dgal_bench.record import CellLog, RoundRecord
from dgal_bench.report.groups import Group
from dgal_bench.report.statistics import mean_interval
from dgal_bench.report.text import aligned, spread

_HEAD = ["strategy", "labels", "network %", "T steps %", "converged %"]


def propagation_lines(group: Group) -> list[str]:
    """Network and graph side by side at the rounds 0, R/2 and R where rows have it; nothing where none has."""
    looked_at = [(name, seen) for name in group.strategies for seen in _seen(list(group.finished(name).values()))]
    if not looked_at:
        return []
    starts = [(name, records) for name, records in looked_at if records[0].round == 0]
    lines = [(name, _cells(records)) for name, records in looked_at if records[0].round > 0]
    same = {tuple(_cells(records)) for _, records in starts}
    shared = [("(all)", list(*same))] if len(same) == 1 else [(name, _cells(records)) for name, records in starts]
    return [
        "",
        "Labels propagated over the graph alone, test images classified by the pool points nearest to them: after the",
        "diffusion's own T steps, and converged. Images that no label reaches count as wrong (their share behind).",
        "",
        *aligned(_HEAD, [[name, *cells] for name, cells in shared + lines]),
    ]


def _seen(logs: Sequence[CellLog]) -> list[list[RoundRecord]]:
    """The records of all seeds at 0, R/2 and R, where each has looked."""
    last = len(logs[0].records) - 1
    rounds = [[log.records[round_] for log in logs] for round_ in sorted({0, last // 2, last})]
    return [records for records in rounds if all(record.propagated for record in records)]


def _cells(records: Sequence[RoundRecord]) -> list[str]:
    """Labels, and network, T steps and converged in % over seeds."""
    facts = [record.propagated or {} for record in records]

    def told(accuracy: str, unreached: str) -> str:
        if any(accuracy not in fact for fact in facts):
            return ""  # a directed graph has no harmonic limit to solve for
        lost = sum(fact[unreached] for fact in facts) / len(facts)
        behind = f" ({100 * lost:.1f} unreached)" if lost > 0 else ""
        return spread(mean_interval([fact[accuracy] for fact in facts]), 100, 1) + behind

    network = spread(mean_interval([record.accuracy for record in records]), 100, 1)
    graph = [told("accuracy", "unreached"), told("converged_accuracy", "converged_unreached")]
    return [str(records[0].n_labeled), network, *graph]
