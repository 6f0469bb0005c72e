"""``dgal-bench status``: the progress of the runs of a results folder, the processes at work, and failures."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import lock_holder
from dgal_bench.results.reader import read_run, run_files
from dgal_bench.results.rows import RunLog

WIDTH = 110
"""Columns of a terminal that a table may take; more seeds go into a further table."""

LABEL_WIDTH = 42
"""A longer label has a line of its own, above its marks."""

AT_WORK = "*"

LEGEND = f"12/31: evaluations so far   {AT_WORK}: a process is at work on it now   -: not begun, though others were"

ORDER = ("done", "at work", "partial", "failed", "skipped", "damaged")


@dataclass(frozen=True, eq=False)
class RunStatus:
    """``log`` None: no complete header yet, or ``damage`` says what is wrong with the file."""

    path: Path
    log: RunLog | None
    holder: str | None = None
    damage: str | None = None

    @cached_property
    def place(self) -> tuple[str, str, str, str]:
        """Suite, data set, label, and seed, from the path."""
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
        """The run's entry in the table."""
        if self.damage is not None:
            return "damaged"
        working = AT_WORK if self.state == "at work" else ""
        if self.log is None:
            return f"begun{working}"
        rows = f"{len(self.log.records)}/{self.log.rounds + 1}"
        return {"done": "done", "failed": "FAILED", "skipped": "skipped"}.get(self.log.status, rows) + working

    @property
    def reference(self) -> bool:
        """Whether it is full supervision, which has the first seed alone."""
        return self.log is not None and self.log.header["config"]["initial_size"] is None


def scan_folder(root: Path) -> list[RunStatus]:
    """Every run under ``root``, a folder of results, a suite or a data set; damaged files too.

    Raises:
        ResultsError: there is no such folder, or it holds no run.
    """
    return [_run_status(path) for path in run_files(root)]


def _run_status(path: Path) -> RunStatus:
    holder = lock_holder(path)
    try:
        log = read_run(path)
    except ResultsError as error:
        return RunStatus(path, None, holder, str(error))
    return RunStatus(path, log, holder)


def any_damaged(runs: Iterable[RunStatus]) -> bool:
    return any(run.damage is not None for run in runs)


def status_table(runs: Sequence[RunStatus]) -> str:
    """Grids of strategies by seeds, failures with reasons, processes at work, and the number of runs in each state."""
    grids = _grids(runs)
    lines = [line for grid in grids.values() for line in (*_grid(grid), "")]
    for title, details in (
        ("failed; retry=failed tries them again", _failures(runs)),
        ("skipped", _skipped(runs)),
        ("damaged", [run.damage for run in runs if run.damage is not None]),
        ("at work now", _workers(runs)),
    ):
        lines += [f"{title}:", *(f"  {line}" for line in details), ""] if details else []
    return "\n".join([*lines, LEGEND, _totals(runs, sum(map(_n_missing, grids.values())))])


def _grids(runs: Sequence[RunStatus]) -> dict[tuple[str, str, str], list[RunStatus]]:
    """Runs by suite, data set and profile; without a header, the profile of the same label, else of the data set."""
    profiles: dict[tuple[str, ...], str] = {}
    for run in runs:
        if run.log is not None:
            suite, dataset, label, _ = run.place
            for key in ((suite, dataset, label), (suite, dataset)):
                profiles.setdefault(key, run.log.header["profile"])
    grids: dict[tuple[str, str, str], list[RunStatus]] = {}
    for run in runs:
        suite, dataset, label, _ = run.place
        likely = profiles.get((suite, dataset, label), profiles.get((suite, dataset), "?"))
        profile = run.log.header["profile"] if run.log is not None else likely
        grids.setdefault((suite, dataset, profile), []).append(run)
    return dict(sorted(grids.items()))


def _grid(runs: Sequence[RunStatus]) -> list[str]:
    """The tables of one grid, each with as many seeds as fit."""
    suite, dataset, *_ = runs[0].place
    profile = next((f", profile {run.log.header['profile']}" for run in runs if run.log is not None), "")
    labels, seeds = _labels(runs), _seeds(runs)
    marks = _marks(runs)
    label_width = max([len("seed"), *(len(label) for label in labels if len(label) <= LABEL_WIDTH)])
    width = max(map(len, [*marks.values(), *seeds])) + 2
    n_seeds = max(1, (WIDTH - label_width) // width)
    lines = [f"{suite}/{dataset}{profile}"]
    for first in range(0, len(seeds), n_seeds):
        columns = seeds[first : first + n_seeds]
        lines.append(f"{'seed':{label_width}}" + "".join(f"{seed:>{width}}" for seed in columns))
        for label in labels:
            row = "".join(f"{marks[label, seed]:>{width}}" for seed in columns)
            if row.strip():
                fits = len(label) <= label_width
                lines += [f"{label:{label_width}}{row}"] if fits else [label, f"{'':{label_width}}{row}"]
    return [line.rstrip() for line in lines]


def _labels(runs: Sequence[RunStatus]) -> list[str]:
    """By name, full supervision last."""
    references = _references(runs)
    return sorted({run.place[2] for run in runs}, key=lambda label: (label in references, label))


def _references(runs: Sequence[RunStatus]) -> set[str]:
    return {run.place[2] for run in runs if run.reference}


def _seeds(runs: Sequence[RunStatus]) -> list[str]:
    seeds = {run.place[3] for run in runs}
    return sorted(seeds, key=lambda seed: (not seed.isdecimal(), int(seed) if seed.isdecimal() else 0, seed))


def _marks(runs: Sequence[RunStatus]) -> dict[tuple[str, str], str]:
    """By label and seed; blank where full supervision has no run of a seed, as intended."""
    marks = {run.place[2:]: run.mark for run in runs}
    references = _references(runs)
    return {
        (label, seed): marks.get((label, seed), "" if label in references else "-")
        for label in _labels(runs)
        for seed in _seeds(runs)
    }


def _n_missing(runs: Sequence[RunStatus]) -> int:
    return sum(mark == "-" for mark in _marks(runs).values())


def _failures(runs: Sequence[RunStatus]) -> list[str]:
    failed = [(run.name, run.log.failure) for run in runs if run.state == "failed" and run.log]
    return [f"{name}: {_last_line(str((failure or {}).get('error', '')))}" for name, failure in failed]


def _skipped(runs: Sequence[RunStatus]) -> list[str]:
    skipped = [(run.name, run.log.skipped) for run in runs if run.state == "skipped" and run.log]
    return [f"{name}: {_last_line(str((why or {}).get('why', '')))}" for name, why in skipped]


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def _workers(runs: Sequence[RunStatus]) -> list[str]:
    """``process 12 of host: digits/dgmg/seed-0, ...``, a line for each process."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.holder is not None and run.state == "at work":
            names.setdefault(run.holder, []).append(run.name)
    return [f"{process}: {', '.join(at_work)}" for process, at_work in names.items()]


def _totals(runs: Sequence[RunStatus], n_missing: int) -> str:
    """``61 runs: 55 done, 2 at work, 1 partial, 2 failed, 1 skipped; 4 not begun``."""
    counts = Counter(run.state for run in runs)
    parts = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    return f"{len(runs)} runs: {parts}" + (f"; {n_missing} not begun" if n_missing else "")
