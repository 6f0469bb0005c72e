"""``dgal-bench status``: how far the runs of a results folder are, who works on them now, and what failed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import holder_name, live_holder
from dgal_bench.results.reader import read_run, run_files
from dgal_bench.results.rows import RunLog

WIDTH = 110
"""Columns of a terminal that a table may take; seeds that do not fit go into a further one."""

LABEL_WIDTH = 42
"""A longer label stands on a line of its own, above its marks."""

AT_WORK = "*"

LEGEND = f"12/31: evaluations so far   {AT_WORK}: somebody is at work on it now   -: not begun, though others were"

ORDER = ("done", "at work", "partial", "failed", "skipped", "damaged")


@dataclass(frozen=True, eq=False)
class RunStatus:
    """Where a run stands. ``log`` None: no whole header yet, or ``damage`` says what is wrong with the file."""

    path: Path
    log: RunLog | None
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
        """What the run's place in the table says."""
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


def scan_folder(root: Path) -> list[RunStatus]:
    """Every run under ``root``, the root of results, a suite's folder or a data set's; damaged files are told, too.

    Raises:
        ResultsError: there is no such folder, or no run in it.
    """
    return [_run_status(path) for path in run_files(root)]


def _run_status(path: Path) -> RunStatus:
    holder = live_holder(path)
    try:
        log = read_run(path)
    except ResultsError as error:
        return RunStatus(path, None, holder, str(error))
    return RunStatus(path, log, holder)


def any_damaged(standings: Iterable[RunStatus]) -> bool:
    return any(standing.damage is not None for standing in standings)


def status_table(standings: Sequence[RunStatus]) -> str:
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


def _grids(standings: Sequence[RunStatus]) -> dict[tuple[str, str, str], list[RunStatus]]:
    """Standings by suite, data set and profile; a file that does not tell its profile is put with its label's others.

    Failing those with the data set's.
    """
    known: dict[tuple[str, ...], str] = {}
    for one in standings:
        if one.log is not None:
            suite, dataset, label, _ = one.place
            for key in ((suite, dataset, label), (suite, dataset)):
                known.setdefault(key, one.log.header["profile"])
    grids: dict[tuple[str, str, str], list[RunStatus]] = {}
    for one in standings:
        suite, dataset, label, _ = one.place
        likely = known.get((suite, dataset, label), known.get((suite, dataset), "?"))
        profile = one.log.header["profile"] if one.log is not None else likely
        grids.setdefault((suite, dataset, profile), []).append(one)
    return dict(sorted(grids.items()))


def _grid(runs: Sequence[RunStatus]) -> list[str]:
    """The tables of one grid: as many seeds side by side as fit."""
    suite, dataset, *_ = runs[0].place
    profile = next((f", profile {one.log.header['profile']}" for one in runs if one.log is not None), "")
    labels, seeds = _labels(runs), _seeds(runs)
    marks = _marks(runs)
    wide = max([len("seed"), *(len(label) for label in labels if len(label) <= LABEL_WIDTH)])
    run = max(map(len, [*marks.values(), *seeds])) + 2
    at_once = max(1, (WIDTH - wide) // run)
    lines = [f"{suite}/{dataset}{profile}"]
    for first in range(0, len(seeds), at_once):
        some = seeds[first : first + at_once]
        lines.append(f"{'seed':{wide}}" + "".join(f"{seed:>{run}}" for seed in some))
        for label in labels:
            row = "".join(f"{marks[label, seed]:>{run}}" for seed in some)
            if not row.strip():
                continue
            lines += [f"{label:{wide}}{row}"] if len(label) <= wide else [label, f"{'':{wide}}{row}"]
    return [line.rstrip() for line in lines]


def _labels(runs: Sequence[RunStatus]) -> list[str]:
    """In order of name, full supervision last, as it runs."""
    return sorted({one.place[2] for one in runs}, key=lambda label: (label in _references(runs), label))


def _references(runs: Sequence[RunStatus]) -> set[str]:
    return {one.place[2] for one in runs if one.reference}


def _seeds(runs: Sequence[RunStatus]) -> list[str]:
    seeds = {one.place[3] for one in runs}
    return sorted(seeds, key=lambda seed: (not seed.isdecimal(), int(seed) if seed.isdecimal() else 0, seed))


def _marks(runs: Sequence[RunStatus]) -> dict[tuple[str, str], str]:
    """By label and seed; blank where full supervision has no run of that seed, nor should it."""
    found = {one.place[2:]: one.mark for one in runs}
    references = _references(runs)
    return {
        (label, seed): found.get((label, seed), "" if label in references else "-")
        for label in _labels(runs)
        for seed in _seeds(runs)
    }


def _n_missing(runs: Sequence[RunStatus]) -> int:
    return sum(mark == "-" for mark in _marks(runs).values())


def _failures(standings: Sequence[RunStatus]) -> list[str]:
    failed = [(one.name, one.log.failure) for one in standings if one.state == "failed" and one.log]
    return [f"{name}: {_last_line(str((failure or {}).get('error', '')))}" for name, failure in failed]


def _skipped(standings: Sequence[RunStatus]) -> list[str]:
    skipped = [(one.name, one.log.skipped) for one in standings if one.state == "skipped" and one.log]
    return [f"{name}: {_last_line(str((why or {}).get('why', '')))}" for name, why in skipped]


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def _workers(standings: Sequence[RunStatus]) -> list[str]:
    """``process 12 of host: digits/dgmg/seed-0, ...``, a line for each process."""
    runs: dict[str, list[str]] = {}
    for one in standings:
        if one.holder is not None and one.state == "at work":
            runs.setdefault(holder_name(one.holder), []).append(one.name)
    return [f"{who}: {', '.join(names)}" for who, names in runs.items()]


def _totals(standings: Sequence[RunStatus], n_missing: int) -> str:
    """``61 runs: 55 done, 2 at work, 1 partial, 2 failed, 1 skipped; 4 not begun``."""
    counts = Counter(one.state for one in standings)
    parts = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    return f"{len(standings)} runs: {parts}" + (f"; {n_missing} not begun" if n_missing else "")
