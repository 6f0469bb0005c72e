"""The tables of a report: each cell has its text and the number that the text was rounded from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgal_bench.report.comparisons import OPPONENTS, Comparison, compare_with
from dgal_bench.report.costs import at_budget, budgets, ledger, ledger_text, reach_target, sums_note, targets
from dgal_bench.report.formatting import (
    align_table,
    difference,
    mark_values,
    numbers,
    p_value,
    speedup,
    spread,
    three_digits,
)
from dgal_bench.report.groups import Group
from dgal_bench.report.notes import sources
from dgal_bench.report.plots.style import short_name
from dgal_bench.report.statistics import MANY, Estimate, mean_interval
from dgal_bench.report.summary import SummaryRow, summarise
from dgal_bench.report.times import machine
from dgal_bench.results.rows import RoundRecord, RunLog


@dataclass(frozen=True)
class TableCell:
    """``value`` is the number behind the text, and ``measure`` its name."""

    text: str
    value: float | None = None
    measure: str = ""


@dataclass(frozen=True)
class ResultTable:
    """``rows``: each a strategy and its cells; ``notes`` stand under the table."""

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[TableCell]]]
    notes: Sequence[str] = ()


def _estimate(measure: str, one: Estimate, factor: float, digits: int, mark: str = "") -> TableCell:
    return TableCell(spread(one, factor, digits) + mark, one.mean, measure)


def main_table(group: Group, rows: Sequence[SummaryRow]) -> ResultTable:
    query = mark_values([spread(row.query_seconds, 1000, 2) for row in rows], [row.query.busy for row in rows])
    faster = mark_values([speedup(row.speedup) for row in rows], [row.speedup_busy for row in rows])
    lines = [
        (
            row.strategy,
            [
                TableCell(str(row.final_accuracy.n), row.final_accuracy.n, "n_seeds"),
                _estimate("final_accuracy", row.final_accuracy, 100, 1),
                _estimate("area", row.area, 100, 1),
                TableCell(milliseconds.strip(), row.query_seconds.mean, "query_seconds"),
                TableCell(f"{row.n_scored:,.0f}", row.n_scored, "n_scored"),
                TableCell(times.strip(), row.speedup.mean if row.speedup else None, "speedup"),
                TableCell(f"{row.setup_seconds:.1f}" if row.setup_seconds else "", row.setup_seconds, "setup_seconds"),
            ],
        )
        for row, milliseconds, times in zip(rows, query, faster, strict=True)
    ]
    head = ("strategy", "seeds", "final accuracy %", "area %", "query ms", "points scored", "speed-up", "set-up s")
    notes = [
        f"Mean and 95 % interval over seeds ({interval_note(group)}). Area: mean accuracy over the range of labels. "
        "Query: mean seconds of one query and nothing else. Speed-up: margin's query time over the strategy's, by "
        "seed. Set-up: what the queries rest on, once. A strategy's name leads to its runs.",
        *[line for line in sources(group, rows) if line],
    ]
    return ResultTable("main", "", head, lines, notes)


def interval_note(group: Group) -> str:
    """The method of the intervals, which depends on the number of seeds."""
    sizes = {len(group.finished(strategy)) for strategy in group.strategies}
    names = {"Student's t" if n < MANY else "BCa bootstrap" for n in sizes if n > 1}
    return " / ".join(sorted(names)) or "one seed: none"


def comparison_table(group: Group) -> ResultTable | None:
    """Every strategy against margin and random, paired over seeds."""
    found = {opponent: compare_with(group, opponent) for opponent in OPPONENTS}
    found = {opponent: compared for opponent, compared in found.items() if compared}
    if not found:
        return None
    rows = [
        (
            row.strategy,
            [cell for opponent, by in found.items() for cell in _comparison_cells(opponent, by.get(row.strategy))],
        )
        for row in summarise(group)
    ]
    head = ["strategy"]
    for opponent in found:
        head += [f"n, with {opponent}", f"area minus {opponent}'s, points", "p", "p (Holm)"]
    every = [one.paired for by in found.values() for one in by.values()]
    return ResultTable("comparisons", "Against margin and random", head, rows, comparison_notes(every))


def _comparison_cells(opponent: str, one: Comparison | None) -> list[TableCell]:
    if one is None:
        return [TableCell("")] * 4
    gap = one.paired.difference
    return [
        TableCell(str(one.paired.n), one.paired.n, f"area_vs_{opponent}_n"),
        TableCell(difference(gap, 100, 1), gap.mean, f"area_vs_{opponent}"),
        TableCell(p_value(one.paired.p), one.paired.p, f"area_vs_{opponent}_p"),
        TableCell(p_value(one.holm_p), one.holm_p, f"area_vs_{opponent}_p_holm"),
    ]


def comparison_notes(every: Sequence[Any]) -> list[str]:
    """How the differences were tested, and what so few seeds can show."""
    sizes = sorted({one.n for one in every})
    least = "; ".join(f"{max(one.smallest_p for one in every if one.n == n):.3g} with {n}" for n in sizes)
    methods = " / ".join(sorted({one.method for one in every}))
    return [
        f"Differences of areas over the labels both have, paired over n seeds ({methods}); intervals and p for 95 %. "
        "Under 10 seeds Student's t, which takes differences to be normally distributed; from 10 BCa's bootstrap and "
        f"flips of signs, which give no p below 2 in 2^n: {least} seeds. Holm's correction is for all tests of a "
        "column."
    ]


def budget_table(group: Group) -> ResultTable | None:
    """Strategies at equal total time, set-up included."""
    found = budgets(group)
    if not found:
        return None
    rows = []
    for row in summarise(group):
        cells = []
        for name, seconds in found:
            one = at_budget(group, row.strategy, seconds)
            measure = f"accuracy_at_{name}"
            cells.append(TableCell("", None, measure) if one is None else _estimate(measure, one, 100, 1))
        rows.append((row.strategy, cells))
    head = ["strategy", *(f"{three_digits(seconds)} s ({short_name(name)}'s total)" for name, seconds in found)]
    note = (
        "Test accuracy in % when so many seconds of set-up and queries have been spent, over the seeds of the first "
        "table; empty: not set up by then."
    )
    return ResultTable("budgets", "At equal total time, set-up included", head, rows, _costs(group, note))


def target_table(group: Group) -> ResultTable:
    goals = targets(group)
    rows = []
    for row in summarise(group):
        cells = []
        for goal in goals:
            one = reach_target(group, row.strategy, goal)
            few = "" if one.n_reached in (0, one.n) else f" ({one.n_reached} of {one.n})"
            cells.append(
                TableCell("" if one.labels is None else f"{one.labels:,.0f}{few}", one.labels, f"labels_to_{goal:.2f}")
            )
        rows.append((row.strategy, cells))
    note = (
        "Mean labels of the first evaluation at or above the accuracy, over the seeds that reach it: all of the first "
        "table's, or so many as are said in brackets."
    )
    return ResultTable("targets", "Labels needed", ["strategy", *(f"{goal:.0%}" for goal in goals)], rows, [note])


def ledger_table(group: Group) -> ResultTable | None:
    found = ledger(group)
    if found is None:
        return None
    rows = [
        (
            one.strategy,
            [
                TableCell(f"{one.seconds:,.1f}", one.seconds, "setup_seconds"),
                *(
                    TableCell(ledger_text(point), point.queries, f"paid_against_{rival}")
                    for rival, point in zip(found.rivals, one.pay_offs, strict=True)
                ),
            ],
        )
        for one in found.investments
    ]
    note = (
        "After how many queries the set-up and the strategy's own queries have cost less than the rival's queries, and "
        f"stay so; in brackets: beyond the {found.n_queries} that were made, at their mean seconds."
    )
    head = ["strategy", "set-up s", *map(short_name, found.rivals)]
    return ResultTable("ledger", "When representation and graph have paid", head, rows, _costs(group, note))


def _costs(group: Group, note: str) -> list[str]:
    """The note, then the source of summed seconds, and what the sums leave out."""
    source = sums_note(group)
    index = any("graph_neighbors" in str(log.header["config"]["strategy"]) for log in group.logs)
    left_out = "An index over the latents that a strategy searches is built before its first clock, and is in no sum."
    return [note, *([source.capitalize() + "."] if source else []), *([left_out] if index else [])]


def machine_table(group: Group) -> ResultTable:
    """The machine of every timing, its load and threads."""
    rows = []
    for row in summarise(group):
        logs = group.finished(row.strategy).values()
        records = [record for log in logs for record in log.records]
        replayed = group.replays(row.strategy)
        where = sorted({machine(one.header) for one in (replayed or group.finished(row.strategy)).values()})
        busy = [record.busy_elsewhere for record in records if record.busy_elsewhere is not None]
        alone = {True: "no", False: "yes", None: "not known"}[row.query.busy]
        rows.append(
            (
                row.strategy,
                [
                    TableCell(row.query.source),
                    TableCell(alone),
                    TableCell("; ".join(where)),
                    TableCell(numbers(sorted({record.threads for record in records}))),
                    TableCell(numbers(sorted({record.jobs for record in records}))),
                    TableCell(f"{max(busy):.2f}" if busy else "not known"),
                ],
            )
        )
    head = ["strategy", "times of", "alone", "machine", "threads", "runs side by side", "cores busy elsewhere, most"]
    note = "Threads, runs side by side and busy cores are of the rows; a replay's are in its file of timings."
    return ResultTable("machines", "The machine under every timing", head, rows, [note])


_HEAD = ["strategy", "labels", "network %", "T steps %", "converged %"]


def propagation_lines(group: Group) -> list[str]:
    """Accuracy of the network and of propagated labels at rounds 0, R/2 and R, for rows that have both."""
    rounds = [
        (name, records)
        for name in group.strategies
        for records in _logs_with_propagation(list(group.finished(name).values()))
    ]
    if not rounds:
        return []
    starts = [(name, records) for name, records in rounds if records[0].round == 0]
    lines = [(name, _cells(records)) for name, records in rounds if records[0].round > 0]
    same = {tuple(_cells(records)) for _, records in starts}
    common = [("(all)", list(*same))] if len(same) == 1 else [(name, _cells(records)) for name, records in starts]
    return [
        "",
        "Labels propagated over the graph alone, test images classified by the pool points nearest to them: after the",
        "diffusion's own T steps, and converged. Images that no label reaches count as wrong (their share behind).",
        "",
        *align_table(_HEAD, [[name, *cells] for name, cells in common + lines]),
    ]


def _logs_with_propagation(logs: Sequence[RunLog]) -> list[list[RoundRecord]]:
    """The records of all seeds at 0, R/2 and R, where each has propagated labels."""
    last = len(logs[0].records) - 1
    rounds = [[log.records[round_] for log in logs] for round_ in sorted({0, last // 2, last})]
    return [records for records in rounds if all(record.propagated for record in records)]


def _cells(records: Sequence[RoundRecord]) -> list[str]:
    """Labels, then the accuracy over seeds in % of the network, after T steps, and converged."""
    facts = [record.propagated or {} for record in records]

    def percent(accuracy: str, unreached: str) -> str:
        if any(accuracy not in fact for fact in facts):
            return ""  # a directed graph has no harmonic limit to solve for
        lost = sum(fact[unreached] for fact in facts) / len(facts)
        behind = f" ({100 * lost:.1f} unreached)" if lost > 0 else ""
        return spread(mean_interval([fact[accuracy] for fact in facts]), 100, 1) + behind

    network = spread(mean_interval([record.accuracy for record in records]), 100, 1)
    graph = [percent("accuracy", "unreached"), percent("converged_accuracy", "converged_unreached")]
    return [str(records[0].n_labeled), network, *graph]
