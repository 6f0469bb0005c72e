"""The verbs of the command line, each a function of a Command that returns the exit code; ``dgal_bench.run``."""

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
    only_keys,
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
    from dgal_bench.results.wandb_process import Tracking

    Logs = Mapping[Path, RunLog | None]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def warn(line: str) -> None:
    sys.stderr.write(f"warning: {line}\n")


def data(command: Command) -> int:
    from dgal_bench.data.datasets import DATASETS, describe_files, fetch
    from dgal_bench.engines.progress import new_progress

    only_flags(command)
    only_keys(command, "data", "offline")
    root, no_network = data_root(command), offline(command)
    for name in command.words:
        choose(DATASETS, name, "data set")
    progress = new_progress({})
    try:
        for name in command.words:
            fetch(name, root, partial(progress.setting_up, name), no_network)
    finally:
        progress.close()
    for name in command.words or DATASETS:
        say(f"{name:15} {describe_files(name, root)}")
    return 0


def check(command: Command) -> int:
    from dgal_bench.conformance import check_plugins, check_table

    only_flags(command)
    only_keys(command)
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
    only_keys(command, "data", "cache", "results")
    findings = examine_machine(data_root(command), cache_root(command), Path(command.single("results", "results/runs")))
    say(findings_table(findings))
    return 1 if any(finding.state == "trouble" for finding in findings) else 0


def report(command: Command) -> int:
    _write_report(*_report_folders(command, "report"))
    return 0


def claims(command: Command) -> int:
    from dgal_bench.report.claims.text import write_claims

    report = write_claims(*_report_folders(command, "claims"))
    say(report.overview)
    say(f"Written: {', '.join(map(str, report.files))}")
    return 0


def _report_folders(command: Command, verb: str) -> tuple[Path, Path, Path | None]:
    """The results folder, where to write, and the file of benchmarks/scaling.py, if one is named."""
    if len(command.words) != 1:
        raise ConfigError(f"{verb} takes one results folder: dgal-bench {verb} RESULTS growth=FILE --out DIR")
    only_flags(command, "--out")
    only_keys(command, "growth")
    results, growth = Path(command.words[0]), command.single("growth", "")
    return results, Path(command.flags.get("--out", results / "report")), Path(growth) if growth else None


def _write_report(results: Path, out: Path, growth: Path | None = None) -> None:
    from dgal_bench.engines.progress import new_progress
    from dgal_bench.report.write import write_report

    progress = new_progress({})
    try:
        report = write_report(results, out, progress.drawing, growth)
    finally:
        progress.close()
    say(report.summary)
    figures = [path for path in report.files if path.suffix == ".png"]
    say(f"Written: {', '.join(str(path) for path in report.files[:3])} and {len(figures)} figures as PNG and SVG")


def status(command: Command) -> int:
    from dgal_bench.results.status import any_damaged, scan_folder, status_table

    statuses = scan_folder(_results_folder(command, "status"))
    say(status_table(statuses))
    return 2 if any_damaged(statuses) else 0


def validate(command: Command) -> int:
    from dgal_bench.results.validate import validate as validate_folder

    report = validate_folder(_results_folder(command, "validate"))
    say(report.text)
    return 1 if report.n_problems else 0


def _results_folder(command: Command, verb: str) -> Path:
    if len(command.words) != 1 or command.values:
        raise ConfigError(f"{verb} takes one results folder: dgal-bench {verb} RESULTS")
    only_flags(command)
    return Path(command.words[0])


def push(command: Command) -> int:
    from dgal_bench.results.wandb import push as push_folder
    from dgal_bench.results.wandb_process import WANDB

    if len(command.words) != 1:
        raise ConfigError("push takes one results folder: dgal-bench push RESULTS")
    only_flags(command)
    only_keys(command, *WANDB, "data", "cache", "offline")
    strict = command.single("wandb.mode", "auto") == "online"
    outcome = push_folder(Path(command.words[0]), wandb_of(command), strict, warn)
    say(outcome.text)
    return outcome.exit_code


def dashboard(command: Command) -> int:
    from dgal_bench.results.reader import read_results

    only_flags(command, "--dry-run", "--push")
    only_keys(command, "wandb.project", "wandb.entity", "offline")
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
    scopes = [scope for results in command.words for scope in view_scopes(read_results(Path(results)))]
    if "--push" in command.flags:
        say("Saved: " + ", ".join(push_workspaces(project, entity, scopes)))
    else:
        files = write_workspaces(Path(command.flags["--dry-run"]), project, entity, scopes)
        say("Written: " + ", ".join(map(str, files)))
    return 0


def bench(command: Command) -> int:
    only_settings(command)
    content = OmegaConf.to_container(read_group("suite", command.single("suite", "paper")))
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
        command.single(key, "")
    return axes


def run_settings(*settings: str, results: str | Path | None = None) -> "list[RoundRecord]":
    """``dgal_bench.run``: execute one run, or finish it, and return its rows, the first evaluation first.

    Args:
        settings: as on the command line, such as ``"strategy=dgmg"``, ``"seed=0"``, ``"rounds=5"``.
        results: the folder of the rows, as ``results=DIR``; None: a temporary one.

    Raises:
        UserError: a setting is wrong, data are missing, or the run failed; with the command line's message.
    """
    from dgal_bench.engines import sweep
    from dgal_bench.results.reader import read_run

    with tempfile.TemporaryDirectory() as temporary:
        has_folder = any(setting.startswith("results=") for setting in settings) and results is None
        command = parse_arguments([*settings, *([] if has_folder else [f"results={results or temporary}"])], "run")
        only_settings(command)
        place = settings_of(command, "single")
        runs = sweep.plan_runs(_axes_of_one_run(command), place)
        logs = sweep.read_logs(runs, place)
        check_writable(place.results)
        _execute(runs, sweep.runs_to_do(runs, logs, place), logs, place, tracking_of(command))
        log = read_run(runs[0].path)
    if log is None or not log.done:
        end = {} if log is None else log.failure or log.skipped or {}
        raise StrategyError(f"{runs[0].name}: {end.get('error') or end.get('why') or 'the run did not finish'}")
    return list(log.records)


def _sweep(command: Command, axes: Mapping[str, Sequence[str]], settings: "SweepSettings", report: bool) -> int:
    from dgal_bench.engines import sweep

    tracking = tracking_of(command)
    runs = sweep.plan_runs(axes, settings)
    if "--print-config" in command.flags:
        say(OmegaConf.to_yaml(OmegaConf.create(to_dict(runs[0].config))).rstrip())
        return 0
    logs = sweep.read_logs(runs, settings)
    todo = sweep.runs_to_do(runs, logs, settings)
    if "--dry-run" in command.flags:
        say("\n".join(_status_lines(runs, logs)))
        for line in _estimate(runs, todo, logs, settings):
            say(line)
        return 0
    check_writable(settings.results)
    failed = _execute(runs, todo, logs, settings, tracking)
    not_tried = ((run, logs[run.path]) for run in runs if run not in todo)
    failed += [run for run, log in not_tried if log is not None and log.status == "failed"]
    _conclude(runs, failed, settings, report)
    return 1 if failed else 0


def _status_lines(runs: "Sequence[PlannedRun]", logs: "Logs") -> Iterator[str]:
    """A line for each run: its status in the results folder, or ``to run``."""
    for run in runs:
        log = logs[run.path]
        yield f"{log.status if log else 'to run':8} {run.name}" + (f" ({len(log.records)} rows)" if log else "")


def _estimate(
    runs: "Sequence[PlannedRun]", todo: "Sequence[PlannedRun]", logs: "Logs", settings: "SweepSettings"
) -> list[str]:
    from dgal_bench.engines import lanes_and_gpus
    from dgal_bench.engines.estimate import estimate_lines, estimate_time, read_past

    return estimate_lines(runs, logs, estimate_time(todo, logs, read_past(settings), *lanes_and_gpus(runs, settings)))


def _execute(
    runs: "Sequence[PlannedRun]",
    todo: "Sequence[PlannedRun]",
    logs: "Logs",
    settings: "SweepSettings",
    tracking: "Tracking | None",
) -> "list[PlannedRun]":
    """Execute the runs to do, and compare the users' own files of finished ones; returns those that failed."""
    from dgal_bench import engines
    from dgal_bench.engines import sweep
    from dgal_bench.engines.progress import new_progress
    from dgal_bench.results.wandb_process import mirror_sweep

    finished = {run: log for run in runs if (log := logs[run.path]) is not None and log.done and run.config.own_files}
    if not todo and not finished:
        return []
    progress = new_progress({run: sweep.evaluations_left(run, logs[run.path]) for run in todo})
    try:
        with mirror_sweep(tracking, settings.results, [run.path for run in todo], progress.warn):
            return engines.execute(todo, settings, progress, finished)
    finally:
        progress.close()


def _conclude(
    runs: "Sequence[PlannedRun]", failed: "Sequence[PlannedRun]", settings: "SweepSettings", report: bool
) -> None:
    """Tell what failed and how to go on; then make the report, or tell where the rows are."""
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(runs)} runs failed; retry=failed tries them again\n")
    folder = settings.results / settings.suite
    if report and find_files(folder, "seed-*.jsonl"):
        _write_report(folder, folder / "report")
    elif not failed:
        say(f"{runs[0].name}: {runs[0].path}" if len(runs) == 1 else f"Rows: {folder}")


def replay(command: Command) -> int:
    from dgal_bench.engines.progress import new_progress
    from dgal_bench.engines.replay import execute_replay, outcome_text, plan_replay

    options = replay_of(command)
    plan = plan_replay(options)
    progress = new_progress({item.job: len(item.rounds) for item in plan.items})
    try:
        outcome = execute_replay(plan, options, progress)
    finally:
        progress.close()
    if outcome.timings:
        say(outcome_text(outcome, plan))
    return 1 if outcome.problems else 0
