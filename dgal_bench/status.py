"""``dgal-bench status``: how far the cells of a results folder are, who works on them now, and what failed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dgal_bench.errors import ResultsError
from dgal_bench.lease import at_work, name_of
from dgal_bench.record import CellLog, cell_files, read_cell

WIDTH = 110
"""Columns of a terminal that a table may take; seeds that do not fit go into a further one."""

LABEL_WIDTH = 42
"""A longer label stands on a line of its own, above its marks."""

AT_WORK = "*"

LEGEND = f"12/31: evaluations so far   {AT_WORK}: somebody is at work on it now   -: not begun, though others were"

ORDER = ("done", "at work", "partial", "failed", "skipped", "damaged")


@dataclass(frozen=True, eq=False)
class Standing:
    """Where a cell stands. ``log`` None: no whole header yet, or ``damage`` says what is wrong with the file."""

    path: Path
    log: CellLog | None
    holder: Mapping[str, Any] | None = None
    damage: str | None = None

    @cached_property
    def place(self) -> tuple[str, str, str, str]:
        """Suite, data set, label, and the seed as the file's name has it."""
        suite, dataset, label, name = ("", "", "", *self.path.resolve().parts)[-4:]
        return suite, dataset, label, name.removeprefix("seed-").removesuffix(".jsonl")

    @property
    def name(self) -> str:
        return "/".join((*self.place[:3], f"seed-{self.place[3]}"))

    @property
    def state(self) -> str:
        """One of ORDER."""
        if self.damage is not None:
            return "damaged"
        status = self.log.status if self.log else "partial"
        return "at work" if self.holder is not None and status != "done" else status

    @property
    def mark(self) -> str:
        """What the cell's place in the table says."""
        if self.damage is not None:
            return "damaged"
        working = AT_WORK if self.state == "at work" else ""
        if self.log is None:
            return f"begun{working}"
        rows = f"{len(self.log.records)}/{self.log.rounds + 1}"
        return {"done": "done", "failed": "FAILED", "skipped": "skipped"}.get(self.log.status, rows) + working

    @property
    def reference(self) -> bool:
        """Whether it is of full supervision, which has the first seed alone."""
        return self.log is not None and self.log.header["config"]["initial_size"] is None


def survey(root: Path) -> list[Standing]:
    """Every cell under ``root``, the root of results, a suite's folder or a data set's; damaged files are told, too.

    Raises:
        ResultsError: there is no such folder, or no cell in it.
    """
    return [_standing(path) for path in cell_files(root)]


def _standing(path: Path) -> Standing:
    holder = at_work(path)
    try:
        log = read_cell(path)
    except ResultsError as error:
        return Standing(path, None, holder, str(error))
    return Standing(path, log, holder)


def any_damaged(standings: Iterable[Standing]) -> bool:
    return any(standing.damage is not None for standing in standings)


def table(standings: Sequence[Standing]) -> str:
    """Grids of strategies by seeds, what failed and why, who works on what, and how many there are of each."""
    grids = _grids(standings)
    lines = [line for grid in grids.values() for line in (*_grid(grid), "")]
    for title, said in (
        ("failed; retry=failed tries them again", _failures(standings)),
        ("skipped", _skipped(standings)),
        ("damaged", [f"{one.damage}" for one in standings if one.damage is not None]),
        ("at work now", _workers(standings)),
    ):
        lines += [f"{title}:", *(f"  {line}" for line in said), ""] if said else []
    return "\n".join([*lines, LEGEND, _totals(standings, sum(map(_n_missing, grids.values())))])


def _grids(standings: Sequence[Standing]) -> dict[tuple[str, str, str], list[Standing]]:
    """Standings by suite, data set and profile; a file that does not tell its profile is put with its label's others.

    Failing those with the data set's.
    """
    known: dict[tuple[str, ...], str] = {}
    for one in standings:
        if one.log is not None:
            suite, dataset, label, _ = one.place
            for key in ((suite, dataset, label), (suite, dataset)):
                known.setdefault(key, one.log.header["profile"])
    grids: dict[tuple[str, str, str], list[Standing]] = {}
    for one in standings:
        suite, dataset, label, _ = one.place
        likely = known.get((suite, dataset, label), known.get((suite, dataset), "?"))
        profile = one.log.header["profile"] if one.log is not None else likely
        grids.setdefault((suite, dataset, profile), []).append(one)
    return dict(sorted(grids.items()))


def _grid(cells: Sequence[Standing]) -> list[str]:
    """The tables of one grid: as many seeds side by side as fit."""
    suite, dataset, *_ = cells[0].place
    profile = next((f", profile {one.log.header['profile']}" for one in cells if one.log is not None), "")
    labels, seeds = _labels(cells), _seeds(cells)
    marks = _marks(cells)
    wide = max([len("seed"), *(len(label) for label in labels if len(label) <= LABEL_WIDTH)])
    cell = max(map(len, [*marks.values(), *seeds])) + 2
    at_once = max(1, (WIDTH - wide) // cell)
    lines = [f"{suite}/{dataset}{profile}"]
    for first in range(0, len(seeds), at_once):
        some = seeds[first : first + at_once]
        lines.append(f"{'seed':{wide}}" + "".join(f"{seed:>{cell}}" for seed in some))
        for label in labels:
            row = "".join(f"{marks[label, seed]:>{cell}}" for seed in some)
            if not row.strip():
                continue
            lines += [f"{label:{wide}}{row}"] if len(label) <= wide else [label, f"{'':{wide}}{row}"]
    return [line.rstrip() for line in lines]


def _labels(cells: Sequence[Standing]) -> list[str]:
    """In order of name, full supervision last, as it runs."""
    return sorted({one.place[2] for one in cells}, key=lambda label: (label in _references(cells), label))


def _references(cells: Sequence[Standing]) -> set[str]:
    return {one.place[2] for one in cells if one.reference}


def _seeds(cells: Sequence[Standing]) -> list[str]:
    seeds = {one.place[3] for one in cells}
    return sorted(seeds, key=lambda seed: (not seed.isdecimal(), int(seed) if seed.isdecimal() else 0, seed))


def _marks(cells: Sequence[Standing]) -> dict[tuple[str, str], str]:
    """By label and seed; blank where full supervision has no cell of that seed, nor should it."""
    found = {one.place[2:]: one.mark for one in cells}
    references = _references(cells)
    return {
        (label, seed): found.get((label, seed), "" if label in references else "-")
        for label in _labels(cells)
        for seed in _seeds(cells)
    }


def _n_missing(cells: Sequence[Standing]) -> int:
    return sum(mark == "-" for mark in _marks(cells).values())


def _failures(standings: Sequence[Standing]) -> list[str]:
    failed = [(one.name, one.log.failure) for one in standings if one.state == "failed" and one.log]
    return [f"{name}: {_last_line(str((failure or {}).get('error', '')))}" for name, failure in failed]


def _skipped(standings: Sequence[Standing]) -> list[str]:
    skipped = [(one.name, one.log.skipped) for one in standings if one.state == "skipped" and one.log]
    return [f"{name}: {_last_line(str((why or {}).get('why', '')))}" for name, why in skipped]


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def _workers(standings: Sequence[Standing]) -> list[str]:
    """``process 12 of host: digits/dgmg/seed-0, ...``, a line for each process."""
    cells: dict[str, list[str]] = {}
    for one in standings:
        if one.holder is not None and one.state == "at work":
            cells.setdefault(name_of(one.holder), []).append(one.name)
    return [f"{who}: {', '.join(names)}" for who, names in cells.items()]


def _totals(standings: Sequence[Standing], n_missing: int) -> str:
    """``61 cells: 55 done, 2 at work, 1 partial, 2 failed, 1 skipped; 4 not begun``."""
    counts = Counter(one.state for one in standings)
    parts = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    return f"{len(standings)} cells: {parts}" + (f"; {n_missing} not begun" if n_missing else "")
