"""Timings files, whose queries were asked again: against their shape, and the cell whose state they are of."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgal_bench.errors import ResultsError
from dgal_bench.record import PHASES, CellLog, read_cell
from dgal_bench.timings import COMMON, Timing, Timings, read_timings
from dgal_bench.validate.cells import Found, Report
from dgal_bench.validate.rows import SLICE_SECONDS
from dgal_bench.validate.shapes import Fingerprint, misfits


@dataclass(frozen=True)
class TimingLine(Timing):
    kind: str = "timing"


@dataclass(frozen=True)
class TimingsHeader:
    kind: str
    schema_version: int
    cell: str
    common: str | None
    picks: str
    rounds: list[int]
    repeats: int
    when: str
    changed: list[str]
    fingerprint: Fingerprint
    provenance: dict[str, Any]


def examine_timings(path: Path) -> Report:
    """Every problem of a timings file; raises nothing."""
    report = Report(path)
    try:
        found = read_timings(path)
    except ResultsError as error:
        report.problems.append((0, str(error).removeprefix(str(path)).lstrip(", :")))
        return report
    if found is None:
        return report  # gone meanwhile
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    hints: list[type] = [TimingsHeader, *[TimingLine] * (len(lines) - 1)]
    for number, (line, hint) in enumerate(zip(lines, hints, strict=True), start=1):
        report.problems += [(number, what) for what in misfits(line, hint)]
    if not report.problems:
        report.problems += _problems(found)
        _check_cell(found, report)
    return report


def _problems(found: Timings) -> Iterator[Found]:
    asked = [(timing.strategy, timing.round) for timing in found.timings]
    if n_twice := len(asked) - len(set(asked)):
        yield 0, f"{n_twice} of {len(asked)} timings are of a strategy and round that stand there twice"
    for number, timing in enumerate(found.timings, start=2):
        yield from ((number, what) for what in _timing(timing, found.repeats))


def _timing(timing: Timing, repeats: int) -> Iterator[str]:
    if len(timing.query_seconds) != repeats:
        yield f"{len(timing.query_seconds)} query_seconds, where repeats={repeats}"
    if unknown := sorted(timing.seconds.keys() - PHASES):
        yield f"phase '{unknown[0]}' is none of {', '.join(sorted(PHASES))}"
    if min(timing.seconds.values(), default=0.0) < 0:
        yield "a phase has negative seconds"
    total = sorted(timing.query_seconds)[(len(timing.query_seconds) - 1) // 2]  # the repeat whose phases these are
    gap, allowed = total - sum(timing.seconds.values()), max(0.02 * total, 2e-4)
    if gap < -allowed or gap > max(allowed, SLICE_SECONDS):
        yield f"the median repeat took {total:.6f} s, but its phases make {total - gap:.6f}: more than 2 % apart"
    if timing.jobs < 1 or timing.n_candidates < 1 or timing.n_scored < 0:
        yield f"jobs {timing.jobs}, n_candidates {timing.n_candidates}, n_scored {timing.n_scored}: too few"


def _check_cell(found: Timings, report: Report) -> None:
    """The cell whose state it is must be there; where its rows have changed since, a report does not use these."""
    try:
        log = _cell_of(found)
    except ResultsError:
        return  # said of that file
    if log is None or not log.begun:
        report.problems.append((1, f"timings of {found.header['cell']}, which has no rows here: replay again"))
        return
    beyond = [round_ for round_ in found.rounds if not 0 <= round_ < log.rounds]
    if beyond:
        report.problems.append((1, f"round {beyond[0]} of a cell of {log.rounds} queries"))
    if not found.of(log):
        report.notes.append((1, f"of other rows than {log.path} has now: replay again"))
    elif not found.picks_equal:
        report.notes.append((0, "the replay picked otherwise than the rows: its times are of another network's query"))


def _cell_of(found: Timings) -> CellLog | None:
    if found.path.name == COMMON:
        label, name = ("", "", *str(found.header["cell"]).split("/"))[-2:]
        return read_cell(found.path.parent / label / f"{name}.jsonl")
    return read_cell(found.path.with_name(found.path.name.removeprefix("timings-")))
