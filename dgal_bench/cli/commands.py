"""Verbs that run runs: ``bench`` a whole suite, ``run`` a single one."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from dgal_bench.cli.options import (
    Command,
    axes_of,
    cache_root,
    check_writable,
    data_root,
    offline,
    only_flags,
    only_places,
    only_settings,
    parse_arguments,
    project_of,
    replay_of,
    settings_of,
    tracking_of,
    wandb_of,
    wants_report,
)
from dgal_bench.config.compose import group_names, read_group
from dgal_bench.config.schema import to_dict
from dgal_bench.core.errors import ConfigError, StrategyError, choose, did_you_mean
from dgal_bench.core.files import find_files

if TYPE_CHECKING:
    from dgal_bench.engines.sweep import PlannedRun, SweepSettings
    from dgal_bench.results.rows import RoundRecord, RunLog
    from dgal_bench.results.tracking import Tracking

    Logs = Mapping[Path, RunLog | None]


# What a verb has to say: on stdout what was asked for, on stderr what to beware of.


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def warn(line: str) -> None:
    sys.stderr.write(f"warning: {line}\n")


# Verbs about what is on this machine: ``data`` sets, plugins to ``check``, and the ``doctor``.


def data(command: Command) -> int:
    from dgal_bench.data.datasets import DATASETS, describe_files, fetch
    from dgal_bench.engines.progress import new_progress

    only_flags(command)
    only_places(command, "data", "offline")
    root, alone = data_root(command), offline(command)
    for name in command.words:
        choose(DATASETS, name, "data set")
    progress = new_progress({})
    try:
        for name in command.words:
            fetch(name, root, partial(progress.setting_up, name), alone)
    finally:
        progress.close()
    for name in command.words or DATASETS:
        say(f"{name:15} {describe_files(name, root)}")
    return 0


def check(command: Command) -> int:
    from dgal_bench.conformance import check_plugins, check_table

    only_flags(command)
    only_places(command)
    if not command.words:
        raise ConfigError("check takes plugin files: dgal-bench check my_strategies.py")
    verdicts = check_plugins(command.words)
    say(check_table(verdicts))
    return 1 if any(verdict.broken for verdict in verdicts) else 0


def doctor(command: Command) -> int:
    from dgal_bench.cli.info import examine_machine, findings_table

    if command.words:
        raise ConfigError(f"doctor takes no '{command.words[0]}', only data=DIR, cache=DIR and results=DIR")
    only_flags(command)
    only_places(command, "data", "cache", "results")
    findings = examine_machine(data_root(command), cache_root(command), Path(command.one("results", "results/runs")))
    say(findings_table(findings))
    return 1 if any(finding.state == "trouble" for finding in findings) else 0


# Verbs that read a results folder: ``report``, ``claims``, ``status`` and ``validate``.


def report(command: Command) -> int:
    report_on(*_report_of(command, "report"))
    return 0


def claims(command: Command) -> int:
    from dgal_bench.report.claims.text import write_claims

    written = write_claims(*_report_of(command, "claims"))
    say(written.overview)
    say(f"Written: {', '.join(map(str, written.files))}")
    return 0


def _report_of(command: Command, verb: str) -> tuple[Path, Path, Path | None]:
    """The results folder, where to write, and the file of benchmarks/scaling.py, if one is named."""
    if len(command.words) != 1:
        raise ConfigError(f"{verb} takes one results folder: dgal-bench {verb} RESULTS growth=FILE --out DIR")
    only_flags(command, "--out")
    only_places(command, "growth")
    results, growth = Path(command.words[0]), command.one("growth", "")
    return results, Path(command.flags.get("--out", results / "report")), Path(growth) if growth else None


def report_on(results: Path, out: Path, growth: Path | None = None) -> None:
    from dgal_bench.engines.progress import new_progress
    from dgal_bench.report.write import write_report

    progress = new_progress({})
    try:
        written = write_report(results, out, progress.drawing, growth)
    finally:
        progress.close()
    say(written.summary)
    figures = [path for path in written.files if path.suffix == ".png"]
    say(f"Written: {', '.join(str(path) for path in written.files[:3])} and {len(figures)} figures as PNG and SVG")


def status(command: Command) -> int:
    from dgal_bench.results.status import any_damaged, scan_folder, status_table

    standings = scan_folder(_results_folder(command, "status"))
    say(status_table(standings))
    return 2 if any_damaged(standings) else 0


def validate(command: Command) -> int:
    from dgal_bench.results.validate import validate as examined

    verdict = examined(_results_folder(command, "validate"))
    say(verdict.text)
    return 1 if verdict.n_problems else 0


def _results_folder(command: Command, verb: str) -> Path:
    if len(command.words) != 1 or command.values:
        raise ConfigError(f"{verb} takes one results folder: dgal-bench {verb} RESULTS")
    only_flags(command)
    return Path(command.words[0])


# Verbs that bring a results folder to W&B: ``push`` its runs, and a ``dashboard`` to look at them.


def push(command: Command) -> int:
    from dgal_bench.results.tracking import WANDB
    from dgal_bench.results.wandb import push as pushed

    if len(command.words) != 1:
        raise ConfigError("push takes one results folder: dgal-bench push RESULTS")
    only_flags(command)
    only_places(command, *WANDB, "data", "cache", "offline")
    strict = command.one("wandb.mode", "auto") == "online"
    done = pushed(Path(command.words[0]), wandb_of(command), strict, warn)
    say(done.text)
    return done.exit_code


def dashboard(command: Command) -> int:
    from dgal_bench.results.reader import read_results

    only_flags(command, "--dry-run", "--push")
    only_places(command, "wandb.project", "wandb.entity", "offline")
    if len(command.flags) != 1 or len(command.words) > 1:
        raise ConfigError("dashboard takes one of two: dgal-bench dashboard [RESULTS] --dry-run FILE, or --push")
    if "--push" in command.flags and offline(command):
        raise ConfigError("--push contradicts offline=true (also in $DGAL_OFFLINE): use --dry-run FILE")
    try:
        from dgal_bench.results.dashboard import push_workspaces, view_scopes, write_workspaces
    except ImportError as error:
        if "wandb_workspaces" not in (error.name or ""):
            raise
        raise ConfigError("dashboard needs wandb-workspaces: pip install 'dgal-bench[dashboard]'") from error
    project, entity = project_of(command)
    found = [shelf for results in command.words for shelf in view_scopes(read_results(Path(results)))]
    if "--push" in command.flags:
        say("Saved: " + ", ".join(push_workspaces(project, entity, found)))
    else:
        files = write_workspaces(Path(command.flags["--dry-run"]), project, entity, found)
        say("Written: " + ", ".join(map(str, files)))
    return 0


def bench(command: Command) -> int:
    only_settings(command)
    content = OmegaConf.to_container(read_group("suite", command.one("suite", "paper")))
    assert isinstance(content, dict)
    suite = {str(key): value for key, value in content.items()}
    return _sweep(command, axes_of(command, suite), settings_of(command, "paper", suite), wants_report(command))


def run(command: Command) -> int:
    only_settings(command)
    settings = settings_of(command, "single")
    return _sweep(command, _axes_of_one_run(command), settings, report=False)


def _axes_of_one_run(command: Command) -> Mapping[str, Sequence[str]]:
    axes = axes_of(command, {})
    if "strategy" not in axes:
        raise ConfigError(f"run needs a strategy{did_you_mean('', group_names('strategy'))}: strategy=NAME")
    for key in axes:
        command.one(key, "")
    return axes


def run_settings(*settings: str, results: str | Path | None = None) -> "list[RoundRecord]":
    """``dgal_bench.run``: make one run, or finish it, and return its rows, the first evaluation first.

    Args:
        settings: those of the command line, such as ``"strategy=dgmg"``, ``"seed=0"``, ``"rounds=5"``.
        results: the folder that keeps the rows, as ``results=DIR`` does; None: nothing is kept.

    Raises:
        UserError: a setting is wrong, data are missing, or the run failed; the message is the command line's.
    """
    from dgal_bench.engines import sweep
    from dgal_bench.results.reader import read_run

    with tempfile.TemporaryDirectory() as nowhere:
        kept = any(one.startswith("results=") for one in settings) and results is None
        command = parse_arguments([*settings, *([] if kept else [f"results={results or nowhere}"])], "run")
        only_settings(command)
        where = settings_of(command, "single")
        jobs = sweep.plan_runs(_axes_of_one_run(command), where)
        logs = sweep.read_logs(jobs, where)
        check_writable(where.results)
        _execute(jobs, sweep.runs_to_do(jobs, logs, where), logs, where, tracking_of(command))
        log = read_run(jobs[0].path)
    if log is None or not log.done:
        end = {} if log is None else log.failure or log.skipped or {}
        raise StrategyError(f"{jobs[0].name}: {end.get('error') or end.get('why') or 'the run did not finish'}")
    return list(log.records)


def _sweep(command: Command, axes: Mapping[str, Sequence[str]], settings: "SweepSettings", report: bool) -> int:
    from dgal_bench.engines import sweep

    tracking = tracking_of(command)
    jobs = sweep.plan_runs(axes, settings)
    if "--print-config" in command.flags:
        say(OmegaConf.to_yaml(OmegaConf.create(to_dict(jobs[0].config))).rstrip())
        return 0
    logs = sweep.read_logs(jobs, settings)
    todo = sweep.runs_to_do(jobs, logs, settings)
    if "--dry-run" in command.flags:
        say("\n".join(_status_lines(jobs, logs)))
        for line in _estimate(jobs, todo, logs, settings):
            say(line)
        return 0
    check_writable(settings.results)
    failed = _execute(jobs, todo, logs, settings, tracking)
    before = ((job, logs[job.path]) for job in jobs if job not in todo)
    failed += [job for job, log in before if log is not None and log.status == "failed"]
    _conclude(jobs, failed, settings, report)
    return 1 if failed else 0


def _status_lines(jobs: "Sequence[PlannedRun]", logs: "Logs") -> Iterator[str]:
    """A line for each run: what its rows say of it, or that it is to run."""
    for job in jobs:
        log = logs[job.path]
        yield f"{log.status if log else 'to run':8} {job.name}" + (f" ({len(log.records)} rows)" if log else "")


def _estimate(
    jobs: "Sequence[PlannedRun]", todo: "Sequence[PlannedRun]", logs: "Logs", settings: "SweepSettings"
) -> list[str]:
    from dgal_bench.engines import side_by_side
    from dgal_bench.engines.estimate import estimate_lines, estimate_time, read_past

    return estimate_lines(jobs, logs, estimate_time(todo, logs, read_past(settings), *side_by_side(jobs, settings)))


def _execute(
    jobs: "Sequence[PlannedRun]",
    todo: "Sequence[PlannedRun]",
    logs: "Logs",
    settings: "SweepSettings",
    tracking: "Tracking | None",
) -> "list[PlannedRun]":
    """Run what is to be run, and write what finished runs are to have beside their rows; returns those that failed."""
    from dgal_bench import engines
    from dgal_bench.engines import sweep
    from dgal_bench.engines.progress import new_progress
    from dgal_bench.results.tracking import mirror_sweep

    finished = {job: log for job in jobs if (log := logs[job.path]) is not None and log.done and job.config.own_files}
    if not todo and not finished:
        return []
    progress = new_progress({job: sweep.evaluations_left(job, logs[job.path]) for job in todo})
    try:
        with mirror_sweep(tracking, settings.results, [job.path for job in todo], progress.warn):
            return engines.execute(todo, settings, progress, finished)
    finally:
        progress.close()


def _conclude(
    jobs: "Sequence[PlannedRun]", failed: "Sequence[PlannedRun]", settings: "SweepSettings", report: bool
) -> None:
    """Say what failed and how to go on, then the report or where the rows are."""
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(jobs)} runs failed; retry=failed tries them again\n")
    folder = settings.results / settings.suite
    if report and find_files(folder, "seed-*.jsonl"):
        report_on(folder, folder / "report")
    elif not failed:
        say(f"{jobs[0].name}: {jobs[0].path}" if len(jobs) == 1 else f"Rows: {folder}")


# The verb that times queries again: ``replay``.


def replay(command: Command) -> int:
    from dgal_bench.engines.progress import new_progress
    from dgal_bench.engines.replay import execute_replay, outcome_text, plan_replay

    wanted = replay_of(command)
    todo = plan_replay(wanted)
    progress = new_progress({item.job: len(item.rounds) for item in todo.items})
    try:
        outcome = execute_replay(todo, wanted, progress)
    finally:
        progress.close()
    if outcome.timings:
        say(outcome_text(outcome, todo))
    return 1 if outcome.trouble else 0
