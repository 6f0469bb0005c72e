"""What the page says of a group, in plain values, and the way from a row back to its cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgal_bench.record import CellLog
from dgal_bench.report.cautions import cautions, not_counted
from dgal_bench.report.groups import Group
from dgal_bench.report.looks import Look, looks
from dgal_bench.report.protocol import ledger_lines, protocol, supervision_lines
from dgal_bench.report.replays import common_lines
from dgal_bench.report.rerun import command
from dgal_bench.report.summary import summarise
from dgal_bench.report.tables import (
    Table,
    budget_table,
    comparison_table,
    ledger_table,
    machine_table,
    main_table,
    target_table,
)
from dgal_bench.report.times import hardware


@dataclass(frozen=True)
class Origin:
    """The cells behind a row of the table: their configuration once, and what tells one from the other."""

    strategy: str
    config: Mapping[str, Any]
    cells: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class View:
    """A section of the page, in plain values: it may have been made in another process."""

    name: str
    dataset: str
    slug: str
    profile: str
    algorithm_version: int
    looks: Mapping[str, Look]
    n_cells: int
    n_finished: int
    protocol: Sequence[str]
    supervision: Sequence[str]
    main: Table | None
    more: Sequence[Table]
    trouble: Sequence[str]
    ledger: Sequence[str]
    common: Sequence[str]
    cautions: Sequence[str]
    origins: Sequence[Origin]


def view(group: Group) -> View:
    trouble = not_counted(group)
    rows = summarise(group)
    said = [line for line in cautions(group) if line and line not in trouble]
    logs = [*group.logs, *group.references, *group.unbegun]
    return View(
        group.name,
        group.dataset,
        group.slug,
        group.profile,
        group.algorithm_version,
        looks(group),
        len(logs),
        sum(log.done for log in logs),
        [line for line in protocol(group) if line],
        [line for line in supervision_lines(group) if line],
        main_table(group, rows) if rows else None,
        [table for make in _MORE if rows and (table := make(group)) is not None],
        trouble,
        ledger_lines(group),
        common_lines(group),
        said,
        origins(group),
    )


_MORE = (comparison_table, budget_table, target_table, ledger_table, machine_table)


def origins(group: Group) -> list[Origin]:
    """Of every strategy with a cell, finished or not, and of full supervision."""
    sets = {**group.cells}
    for log in [*group.references, *group.unbegun]:
        sets[log.path.parent.name] = [*sets.get(log.path.parent.name, []), log]
    return [Origin(name, logs[0].header["config"], [_cell(log) for log in logs]) for name, logs in sets.items()]


def _cell(log: CellLog) -> dict[str, Any]:
    header = log.header
    return {
        "seed": header["config"]["seed"],
        "status": log.status,
        "rows": f"{len(log.records)} of {log.rounds + 1}",
        "path": "/".join(log.path.parts[-4:]),
        "fingerprint": {key: str(value)[:12] for key, value in header["fingerprint"].items() if value is not None},
        "machine": hardware(header) if log.begun else "",
        "command": command(log),
    }
