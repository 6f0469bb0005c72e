"""The verb ``replay``: plans which queries of finished runs to time again, and shows their times.

A worker times them, by ``replay_task``.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from dgal_bench.config.schema import SECTIONS, RunConfig, from_dict, to_dict, without_paths
from dgal_bench.core.errors import ConfigError, ResultsError, UserError, did_you_mean
from dgal_bench.core.system import provenance
from dgal_bench.engines.base import Event, Listener
from dgal_bench.engines.process import ForkServers, WorkerProcess, worker_environment
from dgal_bench.engines.sweep import PlannedRun
from dgal_bench.report.formatting import align_table, mark_values
from dgal_bench.report.notes import LEGEND
from dgal_bench.report.times import is_disturbed, is_usable, same_code_and_machine
from dgal_bench.results.reader import read_results, read_timings
from dgal_bench.results.resume import ALGORITHM_VERSION, check_resumable
from dgal_bench.results.rows import COMMON, RunLog, Timing, Timings, timings_path
from dgal_bench.results.writer import write_timings
from dgal_bench.strategies import resolve_parts


@dataclass(frozen=True)
class ReplayOptions:
    """Options of the command. ``rounds``: None for 0, R/2 and R - 1, empty for all."""

    results: Path
    data: Path
    cache: Path
    seed: int | None = None
    rounds: Sequence[int] | None = None
    repeats: int = 3
    common: str | None = None
    again: bool = False
    offline: bool = False
    plugins: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class ReplayItem:
    """A timings file to write: the run whose states are used, the strategies to time (its own first), the rounds."""

    log: RunLog
    config: RunConfig
    strategies: Mapping[str, Mapping[str, Any]]
    rounds: Sequence[int]
    path: Path

    @cached_property
    def job(self) -> PlannedRun:
        return PlannedRun(self.config, self.log.path)


@dataclass(frozen=True, eq=False)
class ReplayPlan:
    """Items to time, timings that exist already, and a line for each run that is refused or left out."""

    items: Sequence[ReplayItem]
    done: Sequence[Timings]
    refused: Sequence[str]
    left_out: Sequence[str]


def plan_replay(options: ReplayOptions) -> ReplayPlan:
    """Plan from the results folder; nothing is executed.

    Raises:
        ResultsError: no results, a damaged file, or no matching finished run.
        ConfigError: a run does not have the round, or there is no such run.
    """
    logs = read_results(options.results)
    logs = [log for log in logs if log.rounds and log.header["config"]["initial_size"] is not None]
    chosen, left_out = _find_common(logs, options) if options.common else _choose_seed(logs, options)
    items, done, refused = [], [], []
    for log in chosen:
        rounds = _rounds(log, options.rounds)
        try:
            item, others = _item(log, logs, rounds, options.common is not None)
        except (UserError, OmegaConfBaseException) as error:
            older = f"its configuration is another version's ({str(error).splitlines()[0]})"
            reason = error if isinstance(error, UserError) else older
            refused.append(f"{run_name(log)} is not replayed: {reason}")
            continue
        left_out += others
        timings = None if options.again else _existing_timings(item, options.repeats)
        if timings is None:
            items.append(item)
        else:
            done.append(timings)
    return ReplayPlan(items, done, refused, left_out)


def run_name(log: RunLog) -> str:
    """``digits/dgmg/seed-0``."""
    return "/".join([*log.path.resolve().parts[-3:-1], log.path.stem])


def _choose_seed(logs: Sequence[RunLog], options: ReplayOptions) -> tuple[list[RunLog], list[str]]:
    """The finished runs of one seed in each data set's folder: the given seed, or the one most strategies have."""
    chosen, left_out = [], []
    for folder in dict.fromkeys(log.path.parent.parent for log in logs):
        here = [log for log in logs if log.path.parent.parent == folder]
        seeds = [log.header["config"]["seed"] for log in here if log.done]
        seed = options.seed if options.seed is not None else max(sorted(set(seeds)), key=seeds.count, default=None)
        of_seed = [log for log in here if log.header["config"]["seed"] == seed]
        chosen += [log for log in of_seed if log.done]
        left_out += [f"{run_name(log)} is {log.status}: left out" for log in of_seed if not log.done]
        absent = {log.path.parent for log in here} - {log.path.parent for log in of_seed}
        left_out += [f"{folder.name}/{path.name} has no seed {seed}: left out" for path in sorted(absent)]
    if not chosen:
        of = "" if options.seed is None else f" of seed {options.seed}"
        raise ResultsError(f"{options.results} has no finished run{of} to replay: run 'dgal-bench bench' first")
    return chosen, left_out


def _find_common(logs: Sequence[RunLog], options: ReplayOptions) -> tuple[list[RunLog], list[str]]:
    parts = Path(str(options.common).removesuffix(".jsonl")).parts
    matches = [log for log in logs if log.path.resolve().with_suffix("").parts[-len(parts) :] == parts]
    if not matches:
        near = did_you_mean(str(options.common), [run_name(log) for log in logs])
        raise ConfigError(f"--common {options.common}: {options.results} holds no such run{near}")
    if len(matches) > 1:
        example = "/".join(matches[0].path.resolve().with_suffix("").parts[-4:])
        raise ConfigError(f"--common {options.common} is {len(matches)} runs: name the suite too, as in {example}")
    if not matches[0].done:
        raise ResultsError(f"--common {options.common} is {matches[0].status}: only a finished run's states are known")
    return matches, []


def _item(log: RunLog, logs: Sequence[RunLog], rounds: Sequence[int], common: bool) -> tuple[ReplayItem, list[str]]:
    """What to time on a run's states, and a line for each strategy left out.

    Raises:
        ResultsError: the rows are of another algorithm version.
        ConfigError: the plugin of a strategy is not loaded.
        OmegaConfBaseException: the configuration has other keys than this version.
    """
    config = from_dict(log.header["config"])
    now = {"algorithm_version": ALGORITHM_VERSION, "config": config.hash}
    check_resumable(log, {"fingerprint": {**log.header["fingerprint"], **now}, "config": to_dict(config)}, anyway=True)
    if not common:
        return ReplayItem(log, config, _strategies([log]), rounds, timings_path(log.path)), []
    folder = log.path.parent.parent
    siblings = [
        other
        for other in logs
        if other.done and other.path.parent.parent == folder and other.path.parent != log.path.parent
    ]
    others = {other.path.parent: other for other in siblings if _common_settings(other) == _common_settings(log)}
    left_out = [
        f"{folder.name}/{path.name} has another configuration or content: left out"
        for path in dict.fromkeys(other.path.parent for other in siblings)
        if path not in others
    ]
    return ReplayItem(log, config, _strategies([log, *others.values()]), rounds, folder / COMMON), left_out


def _strategies(logs: Sequence[RunLog]) -> dict[str, dict[str, Any]]:
    """By label; raises ConfigError if the plugin of one is not loaded."""
    for log in logs:
        resolve_parts(from_dict(log.header["config"]).strategy)
    return {log.path.parent.name: dict(log.header["config"]["strategy"]) for log in logs}


def _common_settings(log: RunLog) -> dict[str, Any]:
    """All settings but seed, strategy and the paths of a user's files; the hashes of the content."""
    config, fingerprint = log.header["config"], log.header["fingerprint"]
    common = {k: without_paths(v) if k in SECTIONS else v for k, v in config.items() if k not in ("seed", "strategy")}
    return common | {name: fingerprint[name] for name in ("data", "weights", "files")}


def _rounds(log: RunLog, rounds: Sequence[int] | None) -> list[int]:
    if rounds is None:
        return sorted({0, log.rounds // 2, log.rounds - 1})
    if outside := [round_ for round_ in rounds if round_ >= log.rounds]:
        raise ConfigError(f"rounds={outside[0]}, but {run_name(log)} has queries in rounds 0 to {log.rounds - 1}")
    return sorted(set(rounds)) or list(range(log.rounds))


def _existing_timings(item: ReplayItem, repeats: int) -> Timings | None:
    """Timings of the same rows, rounds and repeats, by this revision on this machine without other load; else None."""
    timings = read_timings(item.path)
    if timings is None or not is_usable(timings, item.log) or not same_code_and_machine(timings.header, provenance()):
        return None
    strategies = {timing.strategy for timing in timings.timings}
    same = timings.rounds == item.rounds and timings.repeats == repeats and strategies == item.strategies.keys()
    return timings if same and not is_disturbed(timings.timings) else None


SendJob = Callable[[Mapping[str, Any], RunConfig], Iterator[Event]]
"""Sends a job to a process with the environment of the configuration; yields the events up to the final one."""


@dataclass(eq=False)
class ReplayOutcome:
    """All timings, old and new, and a line for each problem."""

    timings: list[Timings]
    problems: list[str] = field(default_factory=list)


def execute_replay(
    plan: ReplayPlan, options: ReplayOptions, listener: Listener, send: SendJob | None = None
) -> ReplayOutcome:
    """Time one run after the other; each file is written as soon as its run is done.

    ``send``: executes the jobs; a worker process if None.

    Raises:
        ResultsError: a timings file cannot be written.
        UserError: no run could be timed; the first error.
    """
    outcome = ReplayOutcome(list(plan.done), list(plan.refused))
    for line in [*plan.left_out, *plan.refused]:
        listener.warn(line)
    first_error: UserError | None = None
    with ReplayWorker() as worker:
        for item in sorted(plan.items, key=lambda item: item.job.setup_key):  # one data set in memory at a time
            event = _replay_item(item, options, listener, send or worker)
            if event["event"] != "done":
                listener.failed(item.job, event["error"])
                outcome.problems.append(f"{run_name(item.log)} is not replayed: {event['error']}")
                if first_error is None:
                    first_error = UserError(event["error"])
                    first_error.exit_code = event["exit_code"]
                continue
            write_timings(item.path, event["header"], [Timing(**line) for line in event["timings"]])
            listener.done(item.job, event["seconds"])
            timings = read_timings(item.path)
            assert timings is not None
            outcome.timings.append(timings)
            if unequal := [timing.round for timing in timings.own if not timing.picks_equal]:
                line = _unequal_picks(timings, unequal)
                listener.warn(line)
                outcome.problems.append(line)
    if first_error is not None and not outcome.timings:
        raise first_error
    return outcome


def _unequal_picks(timings: Timings, rounds: Sequence[int]) -> str:
    header = timings.header
    where = "; ".join(header["changed"][:3]) or "its rows were changed"
    which = ", ".join(map(str, rounds))
    return f"{header['cell']} picks others than its rows say in round {which} ({where}): no report uses its times"


def _replay_item(item: ReplayItem, options: ReplayOptions, listener: Listener, send: SendJob) -> Event:
    event: Event = {}
    for event in send(_message(item, options), item.config):
        if event["event"] == "begun":
            listener.begun(item.job)
        elif event["event"] == "progress":
            listener.setting_up(item.config.dataset.name, event["what"], event["n"], event["of"])
        elif event["event"] == "warning":
            listener.warn(event["text"])
        elif event["event"] == "round":
            listener.round(item.job, event["accuracy"])
    return event


def _message(item: ReplayItem, options: ReplayOptions) -> dict[str, Any]:
    """A job as a worker reads it."""
    return {
        "job": "replay",
        "algorithm_version": ALGORITHM_VERSION,
        "config": to_dict(item.config),
        "path": str(item.log.path),
        "setup_key": item.job.setup_key,
        "data": str(options.data),
        "cache": str(options.cache),
        "offline": options.offline,
        "plugins": list(options.plugins),
        "strategies": item.strategies,
        "rounds": list(item.rounds),
        "repeats": options.repeats,
    }


class ReplayWorker:
    """One worker process at a time, with the environment of a configuration: thread counts and device."""

    def __init__(self) -> None:
        self._servers = ForkServers()
        self._worker: WorkerProcess | None = None

    def __call__(self, job: Mapping[str, Any], config: RunConfig) -> Iterator[Event]:
        self._worker = self._servers.fit(self._worker, worker_environment(config))
        yield from self._worker.run(job)

    def __enter__(self) -> "ReplayWorker":
        return self

    def __exit__(self, *reason: object) -> None:
        if self._worker is not None:
            self._worker.close()
        self._servers.close()


def outcome_text(outcome: ReplayOutcome, plan: ReplayPlan) -> str:
    """The last output of the command: the times, how many are older, and where the files are."""
    lines = [replay_table(outcome), ""]
    if any(is_disturbed(timings.timings) for timings in outcome.timings):
        lines.append(LEGEND)
    if plan.done:
        lines.append(f"{len(plan.done)} of {len(outcome.timings)} were timed already: --again times them anew.")
    files = ", ".join(dict.fromkeys(timings.path.name for timings in outcome.timings))
    return "\n".join([*lines, f"In {files} beside the rows; dgal-bench report uses and names them."]).strip()


def replay_table(outcome: ReplayOutcome) -> str:
    """Milliseconds of each run's query, by round; one table for each set of rounds."""
    by_rounds: dict[tuple[int, ...], list[tuple[str, list[Timing]]]] = {}
    for file in outcome.timings:
        run = file.header["cell"]
        for strategy in dict.fromkeys(timing.strategy for timing in file.timings):
            label = f"{strategy} on {run}" if file.header["common"] else run
            timings = [timing for timing in file.timings if timing.strategy == strategy]
            by_rounds.setdefault(tuple(file.rounds), []).append((label, timings))
    lines: list[str] = []
    for rounds, rows in by_rounds.items():
        head = ["query ms", *(f"round {round_}" for round_ in rounds), "mean", "picks"]
        means = [1000 * statistics.fmean(timing.median_seconds for timing in timings) for _, timings in rows]
        marked = mark_values([f"{mean:.2f}" for mean in means], [is_disturbed(timings) for _, timings in rows])
        table = [
            [label, *(f"{1000 * timing.median_seconds:.2f}" for timing in timings), mean, _picks(timings)]
            for (label, timings), mean in zip(rows, marked, strict=True)
        ]
        lines += ["", *align_table(head, table)]
    return "\n".join(lines).strip()


def _picks(timings: Sequence[Timing]) -> str:
    """Whether the picks are those of the rows; empty where no rows can be compared."""
    compared = [timing.picks_equal for timing in timings if timing.picks_equal is not None]
    return ("equal" if all(compared) else "others") if compared else ""
