"""The console script: ``dgal-bench VERB key=value ... [--flag]``, one function per verb."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import dedent
from types import FrameType
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from dgal_bench import __version__
from dgal_bench.arguments import Command, parse
from dgal_bench.compose import GROUPS, group_names, read_group
from dgal_bench.config import to_dict
from dgal_bench.errors import ConfigError, UserError, choose, did_you_mean

if TYPE_CHECKING:
    from dgal_bench.record import CellLog
    from dgal_bench.sweep import Job, Settings

USAGE = """\
    dgal-bench VERB key=value ... [--flag]

    verbs
      bench     run every cell of a suite, then report; the same command goes on where it was stopped
      run       run one cell: dgal-bench run strategy=dgmg seed=0
      report    tables and figures of a results folder: dgal-bench report RESULTS --out DIR
      status    what is done, at work, failed or missing, as a grid: dgal-bench status RESULTS
      validate  check every line of a results folder: dgal-bench validate RESULTS
      replay    time the queries of finished cells again, alone: dgal-bench replay RESULTS seed=0 rounds=0,7,14
      data      find, download and check data sets: dgal-bench data mnist (none named: say what is there)
      check     put your own strategies to the law tests: dgal-bench check my_strategies.py
      doctor    is this machine fit to run, and if not, what mends it

    groups (one name, or several with commas: they make a grid; strategies: dg* restrict the pool by diffusion, rs* at
    random, mg, lc and ent are margin, least confidence and entropy)
    {groups}
    where and how
      results=DIR     where rows go and are looked for (results/runs)
      data=DIR        where published data sets are ($DGAL_DATA, or ./data); your own: dataset=folder dataset.path=DIR
      cache=DIR       where representations and graphs are kept ($DGAL_CACHE, or ~/.cache/dgal_bench)
      engine=NAME     local (processes here, the default), ray or slurm; their settings: docs/cluster.md
      jobs=N          cells side by side (as many as cores and GPUs have room for)
      gpus=N          GPUs to use (all), gpus_per_cell=0.5 puts two cells on each
      retry=failed    try failed cells again (or retry=skipped)
      resume=anyway   go on with rows begun by another git revision, torch or CPU
      offline=true    never touch the network ($DGAL_OFFLINE)
      past=DIR,...    dry run: where the rows are that it reckons by (the results folder)
      plugins=FILE    your own strategies: .py files, or entry points of the group dgal_bench.plugins
      full_supervision=true|false   one training on the whole labeled pool, too (the suite's choice)

    anything else     a setting of the configuration: rounds=5 graph.graph_k=10,20 strategy.restrict.score=margin

    flags
      --print-config  show the resolved configuration of the first cell, and stop
      --dry-run       show the cells that would run and those already done, and stop
      --out DIR       report: where to write (RESULTS/report)
      --common CELL   replay: every strategy's query on the states of one cell, as in digits/margin/seed-0
      --again         replay: also what has been timed already
      --version, --help

    exit codes: 0 done, 1 cells failed (check: laws broken; doctor: trouble found; validate: problems; replay: a cell
    could not be timed, or picked otherwise), 2 a mistake in a command or file, 3 data missing or damaged,
    130 interrupted, 143 terminated
"""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def bench(command: Command) -> int:
    from dgal_bench.request import axes_of, only_settings, settings_of

    only_settings(command)
    content = OmegaConf.to_container(read_group("suite", command.one("suite", "paper")))
    assert isinstance(content, dict)
    suite = {str(key): value for key, value in content.items()}
    return _sweep(command, axes_of(command, suite), settings_of(command, "paper", suite), report=True)


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
    from dgal_bench import engines, sweep
    from dgal_bench.progress import new_progress
    from dgal_bench.request import check_writable

    jobs = sweep.plan(axes, settings)
    if "--print-config" in command.flags:
        say(OmegaConf.to_yaml(OmegaConf.create(to_dict(jobs[0].config))).rstrip())
        return 0
    logs = sweep.scan(jobs, settings)
    todo = sweep.to_run(jobs, logs, settings)
    if "--dry-run" in command.flags:
        for job in jobs:
            log = logs[job.path]
            say(f"{log.status if log else 'to run':8} {job.name}" + (f" ({len(log.records)} rows)" if log else ""))
        for line in _estimate(jobs, todo, logs, settings):
            say(line)
        return 0
    check_writable(settings.results)
    failed = []
    finished = {job: log for job in jobs if (log := logs[job.path]) is not None and log.done and job.config.own_files}
    if todo or finished:
        progress = new_progress({job: sweep.evaluations_left(job, logs[job.path]) for job in todo})
        try:
            failed = engines.execute(todo, settings, progress, finished)
        finally:
            progress.close()
    before = ((job, logs[job.path]) for job in jobs if job not in todo)
    failed += [job for job, log in before if log is not None and log.status == "failed"]
    if failed:
        again = "retry=failed tries them again"
        sys.stderr.write(f"{len(failed)} of {len(jobs)} cells failed; {again}\n")
    folder = settings.results / settings.suite
    if report and any(folder.rglob("seed-*.jsonl")):
        _report(folder, folder / "report")
    elif not failed:
        say(f"{jobs[0].name}: {jobs[0].path}")
    return 1 if failed else 0


def _estimate(
    jobs: "Sequence[Job]", todo: "Sequence[Job]", logs: "Mapping[Path, CellLog | None]", settings: "Settings"
) -> list[str]:
    from dgal_bench.engines import side_by_side
    from dgal_bench.estimate import estimated, lines
    from dgal_bench.past import read_past

    return lines(jobs, logs, estimated(todo, logs, read_past(settings), *side_by_side(jobs, settings)))


def report(command: Command) -> int:
    from dgal_bench.request import only_flags

    if len(command.words) != 1 or command.values:
        raise ConfigError("report takes one results folder: dgal-bench report RESULTS --out DIR")
    only_flags(command, "--out")
    results = Path(command.words[0])
    _report(results, Path(command.flags.get("--out", results / "report")))
    return 0


def _report(results: Path, out: Path) -> None:
    from dgal_bench.report.write import write_report

    written = write_report(results, out)
    say(written.summary)
    say("Written: " + ", ".join(str(path) for path in written.files if path.suffix != ".svg"))


def status(command: Command) -> int:
    from dgal_bench.status import any_damaged, survey, table

    standings = survey(_results_folder(command, "status"))
    say(table(standings))
    return 2 if any_damaged(standings) else 0


def validate(command: Command) -> int:
    from dgal_bench.validate import validate as examined

    verdict = examined(_results_folder(command, "validate"))
    say(verdict.text)
    return 1 if verdict.n_problems else 0


def _results_folder(command: Command, verb: str) -> Path:
    from dgal_bench.request import only_flags

    if len(command.words) != 1 or command.values:
        raise ConfigError(f"{verb} takes one results folder: dgal-bench {verb} RESULTS")
    only_flags(command)
    return Path(command.words[0])


def replay(command: Command) -> int:
    from dgal_bench.progress import new_progress
    from dgal_bench.request import replay_of
    from dgal_bench.retiming import plan, work

    wanted = replay_of(command)
    todo = plan.plan(wanted)
    progress = new_progress({item.job: len(item.rounds) for item in todo.items})
    try:
        outcome = work.execute(todo, wanted, progress)
    finally:
        progress.close()
    if outcome.timings:
        say(work.told(outcome, todo))
    return 1 if outcome.trouble else 0


def data(command: Command) -> int:
    from dgal_bench.data.datasets import DATASETS, fetch, whereabouts
    from dgal_bench.progress import new_progress
    from dgal_bench.request import data_root, offline, only_flags, only_places

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
        say(f"{name:15} {whereabouts(name, root)}")
    return 0


def check(command: Command) -> int:
    from dgal_bench.judge import check_plugins, table
    from dgal_bench.request import only_flags, only_places

    only_flags(command)
    only_places(command)
    if not command.words:
        raise ConfigError("check takes plugin files: dgal-bench check my_strategies.py")
    verdicts = check_plugins(command.words)
    say(table(verdicts))
    return 1 if any(verdict.broken for verdict in verdicts) else 0


def doctor(command: Command) -> int:
    from dgal_bench.doctor import examine, table
    from dgal_bench.request import cache_root, data_root, only_flags, only_places

    if command.words:
        raise ConfigError(f"doctor takes no '{command.words[0]}', only data=DIR, cache=DIR and results=DIR")
    only_flags(command)
    only_places(command, "data", "cache", "results")
    findings = examine(data_root(command), cache_root(command), Path(command.one("results", "results/runs")))
    say(table(findings))
    return 1 if any(finding.state == "trouble" for finding in findings) else 0


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


def _on_signal(signum: int, frame: FrameType | None) -> None:
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # to stop takes a moment, and is over soon: nothing may cut it short
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


VERBS: dict[str, Callable[[Command], int]] = {
    "bench": bench, "run": run, "report": report, "status": status, "validate": validate, "replay": replay,
    "data": data, "check": check, "doctor": doctor,
}  # fmt: skip


def usage() -> str:
    groups = "".join(f"  {group:15} {', '.join(group_names(group))}\n" for group in ("suite", *GROUPS))
    return dedent(USAGE).replace("{groups}\n", groups + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; a user's mistake is one line on stderr and its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _stoppable(for_good=arguments is None):
            return _obey(words)
    except UserError as error:
        sys.stderr.write(f"dgal-bench: {error}\n")
        return error.exit_code
    except BrokenPipeError:  # | head: who was told has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        sys.stderr.write("dgal-bench: stopped; what was finished is kept, and the same command goes on from there\n")
        return 143 if isinstance(stop, Terminated) else 130


def _obey(words: Sequence[str]) -> int:
    if not words or words[0] == "help" or {"-h", "--help"} & set(words):
        say(usage())
        return 0 if words else 2
    if "--version" in words:
        say(f"dgal-bench {__version__}")
        return 0
    return choose(VERBS, words[0], "verb")(parse(words[1:]))


@contextmanager
def _stoppable(for_good: bool) -> Iterator[None]:
    """Ctrl-C and SIGTERM end what goes on in here, once; whoever called has his own handlers back afterwards.

    ``for_good``: the process ends with it, and a second Ctrl-C does not change its exit code on the way out.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, stopped = {one: signal.signal(one, _on_signal) for one in (signal.SIGINT, signal.SIGTERM)}, False
    try:
        yield
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        if not (stopped and for_good):
            for one, handler in before.items():
                signal.signal(one, handler)


if __name__ == "__main__":
    sys.exit(main())
