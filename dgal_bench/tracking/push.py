"""Whole runs made from result files: after a crash, or from a machine that had no network."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from dgal_bench.lease import at_work
from dgal_bench.record import CellLog, read_results
from dgal_bench.tracking.folders import results_of
from dgal_bench.tracking.runs import Mirror
from dgal_bench.tracking.settings import Tracking, runs_folder


@dataclass
class Pushed:
    """What became of the cells of a results folder."""

    mode: str
    pushed: int = 0
    there: int = 0
    refused: int = 0
    not_begun: list[str] = field(default_factory=list)
    at_work: list[str] = field(default_factory=list)
    folders: set[Path] = field(default_factory=set)

    @property
    def exit_code(self) -> int:
        """1 where W&B keeps rows of an earlier making in place of the file's."""
        return 1 if self.refused else 0

    @property
    def text(self) -> str:
        n_runs = self.pushed + self.there + self.refused
        where = "online" if self.mode == "online" else f"offline, in {', '.join(map(str, sorted(self.folders)))}"
        counts = f"{n_runs} run{'s' * (n_runs != 1)}: {self.pushed} pushed, {self.there} already there"
        counts += f", {self.refused} refused" if self.refused else ""
        lines = [f"{counts}; {where}"]
        if self.mode == "offline" and self.folders:
            paths = " ".join(f"{folder}/offline-run-*" for folder in sorted(self.folders))
            lines[0] += f"; 'wandb sync {paths}' sends them"
        if self.not_begun:
            lines.append(f"Not begun, and so no runs: {_some(self.not_begun)}")
        if self.at_work:
            lines.append(f"At work now, push again later: {_some(self.at_work)}")
        return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def push(results: Path, tracking: Tracking, strict: bool, warn: Callable[[str], None]) -> Pushed:
    """Bring the runs of all cells up to their files; a run that is there with all of it is not touched.

    Raises:
        ResultsError: no results there, or one of them is damaged.
        UnreachableError: W&B cannot be reached, and ``strict``.
    """
    logs = read_results(results)
    mirror, outcome = Mirror(tracking, warn, strict), Pushed(tracking.mode)
    for log in _with_progress(logs):
        if not log.begun:
            outcome.not_begun.append(log.header["cell"])
        elif at_work(log.path) is not None:
            outcome.at_work.append(log.header["cell"])
        elif mirror.has(log):
            outcome.there += 1
        else:
            taken = mirror.update(log)
            mirror.finish(log)
            outcome.pushed += taken
            outcome.refused += not taken
        if log.begun:
            outcome.folders.add(runs_folder(results_of(log)))
    outcome.mode = mirror.tracking.mode
    return outcome


def _with_progress(logs: list[CellLog]) -> Iterable[CellLog]:
    """A bar on a terminal, nothing elsewhere."""
    shown: Iterable[CellLog] = tqdm(logs, desc="push", unit="run", file=sys.stderr, leave=False, disable=None)
    return shown
