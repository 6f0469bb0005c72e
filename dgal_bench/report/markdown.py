"""summary.md: what was run, a table, differences, the one-off ledger, and what to be wary of."""

from collections.abc import Sequence

from dgal_bench.report.cautions import cautions
from dgal_bench.report.groups import REFERENCE, Group
from dgal_bench.report.propagation import propagation_lines
from dgal_bench.report.protocol import ledger_lines, protocol, supervision_lines
from dgal_bench.report.replays import common_lines, marked, sources
from dgal_bench.report.summary import SummaryRow, summarise
from dgal_bench.report.tables import comparison_table, method
from dgal_bench.report.text import aligned, harmless, speedup, spread


def summary_md(groups: Sequence[Group]) -> str:
    """A section per group: what was run, the table, the one-off ledger, and what to be wary of."""
    return harmless("\n".join(_section(one) for one in groups))


def _section(group: Group) -> str:
    lines = [
        f"## {group.name}, profile {group.profile}, algorithm {group.algorithm_version}",
        "",
        *protocol(group),
        "",
    ]
    if group.strategies:
        rows = summarise(group)
        lines += _table(rows)
        lines += ["", f"Mean and 95 % interval over seeds ({method(group)}). Area: mean accuracy over the range of"]
        lines += [
            "labels. Query: mean seconds of one query, nothing else; speed-up: "
            f"{REFERENCE}'s query time over the strategy's, by seed.",
            *sources(group, rows),
            *common_lines(group),
            *propagation_lines(group),
            *_versus(group),
            "",
        ]
    lines += supervision_lines(group)
    return "\n".join([*lines, *ledger_lines(group), *cautions(group)]) + "\n"


def _table(rows: Sequence[SummaryRow]) -> list[str]:
    query = marked([spread(row.query_seconds, 1000, 2) for row in rows], [row.query.beside for row in rows])
    faster = marked([speedup(row.speedup) for row in rows], [row.speedup_beside for row in rows])
    return aligned(
        ["strategy", "seeds", "final accuracy %", "area under curve %", "query ms", "points scored", "speed-up"],
        [
            [
                row.strategy,
                str(row.final_accuracy.n),
                spread(row.final_accuracy, 100, 1),
                spread(row.area, 100, 1),
                query_ms,
                f"{row.n_scored:,.0f}",
                times_faster,
            ]
            for row, query_ms, times_faster in zip(rows, query, faster, strict=True)
        ],
    )


def _versus(group: Group) -> list[str]:
    """Every strategy against margin and random; nothing where no two met."""
    found = comparison_table(group)
    if found is None:
        return []
    rows = [[name, *(cell.text for cell in cells)] for name, cells in found.rows]
    return ["", *aligned(list(found.head), rows), "", *found.notes]
