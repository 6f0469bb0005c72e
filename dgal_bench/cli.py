"""The console script: ``dgal-bench VERB key=value ... [--flag]``, one function per verb."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from dgal_bench import __version__
from dgal_bench.arguments import Command, parse
from dgal_bench.compose import GROUPS, group_names, read_group
from dgal_bench.config import available_cores, to_dict
from dgal_bench.errors import ConfigError, ResultsError, UserError, choose, did_you_mean

if TYPE_CHECKING:
    from dgal_bench.sweep import Settings

USAGE = """\
    dgal-bench VERB key=value ... [--flag]

    verbs
      bench     run every cell of a suite, then report; the same command goes on where it was stopped
      run       run one cell: dgal-bench run strategy=dgmg seed=0
      report    tables and figures of a results folder: dgal-bench report RESULTS --out DIR

    groups (one name, or several with commas: they make a grid)
    {groups}
    where and how
      results=DIR     where rows go and are looked for (results/runs)
      data=DIR        where data sets are ($DGAL_DATA, or ./data)
      cache=DIR       where representations and graphs are kept ($DGAL_CACHE, or ~/.cache/dgal_bench)
      jobs=N          cells side by side (all cores)
      resume=anyway   go on with rows begun by another git revision, torch or CPU

    anything else     a setting of the configuration: rounds=5 graph.graph_k=10,20 strategy.restrict.score=margin

    flags
      --print-config  show the resolved configuration of the first cell, and stop
      --dry-run       show the cells that would run and those already done, and stop
      --out DIR       report: where to write (RESULTS/report)
      --version, --help

    exit codes: 0 done, 1 some cells failed, 2 a mistake in the command or a file, 3 data missing, 130 interrupted
"""

DEFAULTS = {"dataset": "digits", "representation": "vae", "profile": "cpu", "seed": "0"}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# Keys that say where and how to run. They change no result, so they are in no configuration.
PLACES = ("results", "suite", "data", "cache", "jobs", "resume")


def settings_of(command: Command, default_suite: str) -> "Settings":
    from dgal_bench.sweep import Settings

    resume = command.one("resume", "")
    if resume not in ("", "anyway"):
        raise ConfigError(f"resume={resume}: the only choice is resume=anyway")
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dgal_bench"
    return Settings(
        results=Path(command.one("results", "results/runs")),
        suite=command.one("suite", default_suite),
        data=Path(command.one("data", os.environ.get("DGAL_DATA", "data"))),
        cache=Path(command.one("cache", os.environ.get("DGAL_CACHE", str(home)))),
        jobs=_positive("jobs", command.one("jobs", str(available_cores()))),
        resume_anyway=resume == "anyway",
    )


def _positive(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{key}={text}: use a whole number of 1 or more")
    return int(text)


def axes_of(command: Command, suite: Mapping[str, object]) -> dict[str, list[str]]:
    """The grid: defaults, then the suite's axes, then the command line's."""
    axes = {key: [value] for key, value in DEFAULTS.items()}
    for key, values in suite.items():
        axes[key] = [str(value) for value in values] if isinstance(values, list) else [str(values)]
    axes |= {key: values for key, values in command.values.items() if key not in PLACES}
    _check_keys(axes)
    return axes


def _check_keys(axes: Mapping[str, Sequence[str]]) -> None:
    """A misspelt place or group has no dot and may be near a name that the configuration does not know."""
    from dgal_bench.compose import check_key, compose

    sample = to_dict(compose({**DEFAULTS, "strategy": "random"}))
    for key in axes:
        if key not in GROUPS:
            check_key(key, sample, extra=PLACES)


def _only_settings(command: Command) -> None:
    """Refuse what the verb would ignore: bare words, and flags that are another's."""
    if command.words:
        word = command.words[0]
        raise ConfigError(f"'{word}' is no key=value: this verb takes settings, as in strategy={word}")
    _only_flags(command, "--print-config", "--dry-run")


def _only_flags(command: Command, *known: str) -> None:
    if other := [flag for flag in command.flags if flag not in known]:
        raise ConfigError(f"{other[0]} means nothing here: the flags of this verb are {', '.join(known)}")


def bench(command: Command) -> int:
    _only_settings(command)
    settings = settings_of(command, "simple")
    suite = OmegaConf.to_container(read_group("suite", settings.suite))
    assert isinstance(suite, dict)
    return _sweep(command, axes_of(command, {str(key): value for key, value in suite.items()}), settings, report=True)


def run(command: Command) -> int:
    _only_settings(command)
    settings = settings_of(command, "single")
    axes = axes_of(command, {})
    if "strategy" not in axes:
        raise ConfigError(f"run needs a strategy{did_you_mean('', group_names('strategy'))}: strategy=NAME")
    for key in axes:
        command.one(key, "")
    return _sweep(command, axes, settings, report=False)


def _sweep(command: Command, axes: Mapping[str, Sequence[str]], settings: "Settings", report: bool) -> int:
    from dgal_bench import engine, sweep
    from dgal_bench.progress import new_progress

    jobs = sweep.plan(axes, settings)
    if "--print-config" in command.flags:
        say(OmegaConf.to_yaml(OmegaConf.create(to_dict(jobs[0].config))).rstrip())
        return 0
    logs = sweep.scan(jobs, settings)
    todo = [job for job in jobs if (log := logs[job.path]) is None or not log.done]
    if "--dry-run" in command.flags:
        for job in jobs:
            log = logs[job.path]
            say(f"{log.status if log else 'to run':8} {job.name}" + (f" ({len(log.records)} rows)" if log else ""))
        say(f"{len(jobs)} cells: {len(jobs) - len(todo)} done, {len(todo)} to run, {settings.jobs} side by side")
        return 0
    _check_writable(settings.results)
    failed = []
    if todo:
        done_rounds = sum(len(log.records) for job in todo if (log := logs[job.path]) is not None)
        progress = new_progress(todo, done_rounds)
        try:
            failed = engine.execute(todo, settings, progress)
        finally:
            progress.close()
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(jobs)} cells failed; the same command tries them again\n")
    folder = settings.results / settings.suite
    if report and any(folder.rglob("seed-*.jsonl")):
        _report(folder, folder / "report")
    elif not failed:
        say(f"{jobs[0].name}: {jobs[0].path}")
    return 1 if failed else 0


def _check_writable(results: Path) -> None:
    """Say so before hours of work, not after."""
    try:
        results.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ResultsError(f"results={results} is a file, not a folder: set another results=DIR") from error
    except OSError as error:
        raise ResultsError(f"results={results} cannot be written: {error.strerror}: set results=DIR") from error
    if not os.access(results, os.W_OK):
        raise ResultsError(f"results={results} cannot be written: set results=DIR")


def report(command: Command) -> int:
    if len(command.words) != 1 or command.values:
        raise ConfigError("report takes one results folder: dgal-bench report RESULTS --out DIR")
    _only_flags(command, "--out")
    results = Path(command.words[0])
    _report(results, Path(command.flags.get("--out", results / "report")))
    return 0


def _report(results: Path, out: Path) -> None:
    from dgal_bench.report.write import write_report

    written = write_report(results, out)
    say(written.summary)
    say("Written: " + ", ".join(str(path) for path in written.files if path.suffix != ".svg"))


VERBS: dict[str, Callable[[Command], int]] = {"bench": bench, "run": run, "report": report}


def usage() -> str:
    groups = "".join(f"  {group:15} {', '.join(group_names(group))}\n" for group in ("suite", *GROUPS))
    return dedent(USAGE).replace("{groups}\n", groups)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; a user's mistake is one line on stderr and its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] == "help" or {"-h", "--help"} & set(words):
            say(usage())
            return 0 if words else 2
        if "--version" in words:
            say(f"dgal-bench {__version__}")
            return 0
        return choose(VERBS, words[0], "verb")(parse(words[1:]))
    except UserError as error:
        sys.stderr.write(f"dgal-bench: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("dgal-bench: stopped; what was finished is kept, and the same command goes on from there\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
