"""Verbs that run cells: ``bench`` a whole suite, ``run`` a single one."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from dgal_bench.arguments import Command
from dgal_bench.compose import group_names, read_group
from dgal_bench.config import to_dict
from dgal_bench.disk import below
from dgal_bench.errors import ConfigError, did_you_mean
from dgal_bench.verbs.reading import report_on
from dgal_bench.verbs.saying import say

if TYPE_CHECKING:
    from dgal_bench.record import CellLog
    from dgal_bench.sweep import Job, Settings
    from dgal_bench.tracking.settings import Tracking

    Logs = Mapping[Path, CellLog | None]


def bench(command: Command) -> int:
    from dgal_bench.request import axes_of, only_settings, settings_of, wants_report

    only_settings(command)
    content = OmegaConf.to_container(read_group("suite", command.one("suite", "paper")))
    assert isinstance(content, dict)
    suite = {str(key): value for key, value in content.items()}
    return _sweep(command, axes_of(command, suite), settings_of(command, "paper", suite), wants_report(command))


def run(command: Command) -> int:
    from dgal_bench.request import axes_of, only_settings, settings_of

    only_settings(command)
    settings = settings_of(command, "single")
    axes = axes_of(command, {})
    if "strategy" not in axes:
        raise ConfigError(f"run needs a strategy{did_you_mean('', group_names('strategy'))}: strategy=NAME")
    for key in axes:
        command.one(key, "")
    return _sweep(command, axes, settings, report=False)


def _sweep(command: Command, axes: Mapping[str, Sequence[str]], settings: "Settings", report: bool) -> int:
    from dgal_bench import sweep
    from dgal_bench.request import check_writable, tracking_of

    tracking = tracking_of(command)
    jobs = sweep.plan(axes, settings)
    if "--print-config" in command.flags:
        say(OmegaConf.to_yaml(OmegaConf.create(to_dict(jobs[0].config))).rstrip())
        return 0
    logs = sweep.scan(jobs, settings)
    todo = sweep.to_run(jobs, logs, settings)
    if "--dry-run" in command.flags:
        say("\n".join(_standing(jobs, logs)))
        for line in _estimate(jobs, todo, logs, settings):
            say(line)
        return 0
    check_writable(settings.results)
    failed = _execute(jobs, todo, logs, settings, tracking)
    before = ((job, logs[job.path]) for job in jobs if job not in todo)
    failed += [job for job, log in before if log is not None and log.status == "failed"]
    _conclude(jobs, failed, settings, report)
    return 1 if failed else 0


def _standing(jobs: "Sequence[Job]", logs: "Logs") -> Iterator[str]:
    """A line for each cell: what its rows say of it, or that it is to run."""
    for job in jobs:
        log = logs[job.path]
        yield f"{log.status if log else 'to run':8} {job.name}" + (f" ({len(log.records)} rows)" if log else "")


def _estimate(jobs: "Sequence[Job]", todo: "Sequence[Job]", logs: "Logs", settings: "Settings") -> list[str]:
    from dgal_bench.engines import side_by_side
    from dgal_bench.estimate import estimated, lines
    from dgal_bench.past import read_past

    return lines(jobs, logs, estimated(todo, logs, read_past(settings), *side_by_side(jobs, settings)))


def _execute(
    jobs: "Sequence[Job]", todo: "Sequence[Job]", logs: "Logs", settings: "Settings", tracking: "Tracking | None"
) -> "list[Job]":
    """Run what is to be run, and write what finished cells are to have beside their rows; returns those that failed."""
    from dgal_bench import engines, sweep
    from dgal_bench.progress import new_progress
    from dgal_bench.tracking.driver import mirrored

    finished = {job: log for job in jobs if (log := logs[job.path]) is not None and log.done and job.config.own_files}
    if not todo and not finished:
        return []
    progress = new_progress({job: sweep.evaluations_left(job, logs[job.path]) for job in todo})
    try:
        with mirrored(tracking, settings.results, [job.path for job in todo], progress.warn):
            return engines.execute(todo, settings, progress, finished)
    finally:
        progress.close()


def _conclude(jobs: "Sequence[Job]", failed: "Sequence[Job]", settings: "Settings", report: bool) -> None:
    """Say what failed and how to go on, then the report or where the rows are."""
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(jobs)} cells failed; retry=failed tries them again\n")
    folder = settings.results / settings.suite
    if report and below(folder, "seed-*.jsonl"):
        report_on(folder, folder / "report")
    elif not failed:
        say(f"{jobs[0].name}: {jobs[0].path}" if len(jobs) == 1 else f"Rows: {folder}")
