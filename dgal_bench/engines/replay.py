"""Which queries of a results folder a replay is to time, and which it cannot, or has timed already."""

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
from dgal_bench.engines.process import WorkerProcess, worker_environment
from dgal_bench.engines.sweep import PlannedRun
from dgal_bench.report.formatting import align_table, mark_values
from dgal_bench.report.notes import LEGEND
from dgal_bench.report.times import is_disturbed, is_usable, same_code_and_machine
from dgal_bench.results.reader import read_results, read_timings, timings_path
from dgal_bench.results.resume import ALGORITHM_VERSION, check_resumable
from dgal_bench.results.rows import COMMON, RunLog, Timing, Timings, check_content_facts
from dgal_bench.results.writer import write_timings
from dgal_bench.strategies import resolve_parts


@dataclass(frozen=True)
class ReplayOptions:
    """What a command asks for. ``rounds``: None for 0, R/2 and R - 1, empty for all."""

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
    """One timings file to be: the run whose state it is, the strategies to time on it (its own first), the rounds."""

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
    """What is to do, what is done already, what cannot be (in a line each), and what was not asked of."""

    items: Sequence[ReplayItem]
    done: Sequence[Timings]
    refused: Sequence[str]
    left_out: Sequence[str]


def plan_replay(wanted: ReplayOptions) -> ReplayPlan:
    """Look at the results folder; nothing is run.

    Raises:
        ResultsError: no results, a damaged file, or no finished run as asked for.
        ConfigError: a round that a run does not have, or no such run.
    """
    found = read_results(wanted.results)
    for log in found:
        check_content_facts(log)
    logs = [log for log in found if log.rounds and log.header["config"]["initial_size"] is not None]
    chosen, left_out = _one_named(logs, wanted) if wanted.common else _of_one_seed(logs, wanted)
    items, done, refused = [], [], []
    for log in chosen:
        rounds = _rounds(log, wanted.rounds)
        try:
            item, others = _item(log, logs, rounds, wanted.common is not None)
        except (UserError, OmegaConfBaseException) as error:
            reason = error if isinstance(error, UserError) else _older(error)
            refused.append(f"{run_name(log)} is not replayed: {reason}")
            continue
        left_out += others
        made = None if wanted.again else _is_done(item, wanted.repeats)
        if made is None:
            items.append(item)
        else:
            done.append(made)
    return ReplayPlan(items, done, refused, left_out)


def run_name(log: RunLog) -> str:
    """``digits/dgmg/seed-0``."""
    return "/".join([*log.path.resolve().parts[-3:-1], log.path.stem])


def _older(error: Exception) -> str:
    return f"its configuration is another version's ({str(error).splitlines()[0]})"


def _of_one_seed(logs: Sequence[RunLog], wanted: ReplayOptions) -> tuple[list[RunLog], list[str]]:
    """Of each data set's folder the finished runs of one seed: the one given, or that which most strategies have."""
    chosen, left_out = [], []
    for folder in dict.fromkeys(log.path.parent.parent for log in logs):
        here = [log for log in logs if log.path.parent.parent == folder]
        seeds = [log.header["config"]["seed"] for log in here if log.done]
        seed = wanted.seed if wanted.seed is not None else max(sorted(set(seeds)), key=seeds.count, default=None)
        of_seed = [log for log in here if log.header["config"]["seed"] == seed]
        chosen += [log for log in of_seed if log.done]
        left_out += [f"{run_name(log)} is {log.status}: left out" for log in of_seed if not log.done]
        absent = {log.path.parent for log in here} - {log.path.parent for log in of_seed}
        left_out += [f"{folder.name}/{path.name} has no seed {seed}: left out" for path in sorted(absent)]
    if not chosen:
        of = "" if wanted.seed is None else f" of seed {wanted.seed}"
        raise ResultsError(f"{wanted.results} has no finished run{of} to replay: run 'dgal-bench bench' first")
    return chosen, left_out


def _one_named(logs: Sequence[RunLog], wanted: ReplayOptions) -> tuple[list[RunLog], list[str]]:
    asked = tuple(Path(str(wanted.common).removesuffix(".jsonl")).parts)
    found = [log for log in logs if log.path.resolve().with_suffix("").parts[-len(asked) :] == asked]
    if not found:
        names = [run_name(log) for log in logs]
        near = did_you_mean(str(wanted.common), names)
        raise ConfigError(f"--common {wanted.common}: {wanted.results} holds no such run{near}")
    if len(found) > 1:
        one = "/".join(found[0].path.resolve().with_suffix("").parts[-4:])
        raise ConfigError(f"--common {wanted.common} is {len(found)} runs: name the suite too, as in {one}")
    if not found[0].done:
        raise ResultsError(f"--common {wanted.common} is {found[0].status}: only a finished run's states are known")
    return found, []


def _item(log: RunLog, logs: Sequence[RunLog], rounds: Sequence[int], common: bool) -> tuple[ReplayItem, list[str]]:
    """What is to be timed on a run's states, and who is left out.

    Raises:
        ResultsError: its rows are of another algorithm.
        ConfigError: a strategy is of a plugin that is not loaded.
        OmegaConfBaseException: its configuration has other keys than this version's.
    """
    config = from_dict(log.header["config"])
    now = {"algorithm_version": ALGORITHM_VERSION, "config": config.hash}
    check_resumable(log, {"fingerprint": {**log.header["fingerprint"], **now}, "config": to_dict(config)}, anyway=True)
    if not common:
        return ReplayItem(log, config, _strategies([log]), rounds, timings_path(log.path)), []
    folder = log.path.parent.parent
    beside = [
        one for one in logs if one.done and one.path.parent.parent == folder and one.path.parent != log.path.parent
    ]
    others = {one.path.parent: one for one in beside if _setting(one) == _setting(log)}
    left_out = [
        f"{folder.name}/{path.name} has another configuration or content: left out"
        for path in dict.fromkeys(one.path.parent for one in beside)
        if path not in others
    ]
    return ReplayItem(log, config, _strategies([log, *others.values()]), rounds, folder / COMMON), left_out


def _strategies(logs: Sequence[RunLog]) -> dict[str, dict[str, Any]]:
    """By label; raises ConfigError for one of a plugin that is not loaded."""
    for log in logs:
        resolve_parts(from_dict(log.header["config"]).strategy)
    return {log.path.parent.name: dict(log.header["config"]["strategy"]) for log in logs}


def _setting(log: RunLog) -> dict[str, Any]:
    """All but seed and strategy, and where a user's files lie."""
    config, print_ = log.header["config"], log.header["fingerprint"]
    common = {k: without_paths(v) if k in SECTIONS else v for k, v in config.items() if k not in ("seed", "strategy")}
    return common | {name: print_[name] for name in ("data", "weights", "files")}


def _rounds(log: RunLog, wanted: Sequence[int] | None) -> list[int]:
    if wanted is None:
        return sorted({0, log.rounds // 2, log.rounds - 1})
    if outside := [round_ for round_ in wanted if round_ >= log.rounds]:
        raise ConfigError(f"rounds={outside[0]}, but {run_name(log)} has queries in rounds 0 to {log.rounds - 1}")
    return sorted(set(wanted)) or list(range(log.rounds))


def _is_done(item: ReplayItem, repeats: int) -> Timings | None:
    """The timings of these very rows, rounds and repeats, made by this revision on this machine, alone on it."""
    made = read_timings(item.path)
    if made is None or not is_usable(made, item.log) or not same_code_and_machine(made.header, provenance()):
        return None
    strategies = {timing.strategy for timing in made.timings}
    same = made.rounds == item.rounds and made.repeats == repeats and strategies == item.strategies.keys()
    return made if same and not is_disturbed(made.timings) else None


# A replay carried out: one run after the other by a process of its own, each file written as soon as it is done.


AskWorker = Callable[[Mapping[str, Any], RunConfig], Iterator[Event]]
"""Sends a job to a process fit for that configuration; its events, the last an ending."""


@dataclass(eq=False)
class ReplayOutcome:
    """The timings there are now, and what went wrong, in a line each."""

    timings: list[Timings]
    trouble: list[str] = field(default_factory=list)


def execute_replay(
    plan: ReplayPlan, wanted: ReplayOptions, listener: Listener, ask: AskWorker | None = None
) -> ReplayOutcome:
    """Time one run after the other, nothing beside; each file is written as soon as its run is done.

    ``ask``: who does the work, a process of its own if None.

    Raises:
        ResultsError: a timings file cannot be written.
        UserError: nothing could be timed at all; the first reason why.
    """
    outcome = ReplayOutcome(list(plan.done), list(plan.refused))
    for line in [*plan.left_out, *plan.refused]:
        listener.warn(line)
    first: UserError | None = None
    with ReplayWorker() as asker:
        for item in sorted(plan.items, key=lambda item: item.job.setup_key):  # one data set in memory at a time
            event = _replay_item(item, wanted, listener, ask or asker)
            if event["event"] != "done":
                listener.failed(item.job, event["error"])
                outcome.trouble.append(f"{run_name(item.log)} is not replayed: {event['error']}")
                if first is None:
                    first = UserError(event["error"])
                    first.exit_code = event["exit_code"]
                continue
            write_timings(item.path, event["header"], [Timing(**line) for line in event["timings"]])
            listener.done(item.job, event["seconds"])
            made = read_timings(item.path)
            assert made is not None
            outcome.timings.append(made)
            if unequal := [timing.round for timing in made.own if not timing.picks_equal]:
                line = _unequal_picks(made, unequal)
                listener.warn(line)
                outcome.trouble.append(line)
    if first is not None and not outcome.timings:
        raise first
    return outcome


def _unequal_picks(made: Timings, rounds: Sequence[int]) -> str:
    where = "; ".join(made.header["changed"][:3]) or "its rows were changed"
    which = ", ".join(map(str, rounds))
    return f"{made.header['cell']} picks others than its rows say in round {which} ({where}): no report uses its times"


def _replay_item(item: ReplayItem, wanted: ReplayOptions, listener: Listener, ask: AskWorker) -> Event:
    event: Event = {}
    for event in ask(_message(item, wanted), item.config):
        if event["event"] == "begun":
            listener.begun(item.job)
        elif event["event"] == "progress":
            listener.setting_up(item.config.dataset.name, event["what"], event["n"], event["of"])
        elif event["event"] == "warning":
            listener.warn(event["text"])
        elif event["event"] == "round":
            listener.round(item.job, event["accuracy"])
    return event


def _message(item: ReplayItem, wanted: ReplayOptions) -> dict[str, Any]:
    """A job as a worker reads it."""
    return {
        "job": "replay",
        "algorithm_version": ALGORITHM_VERSION,
        "config": to_dict(item.config),
        "path": str(item.log.path),
        "setup_key": item.job.setup_key,
        "data": str(wanted.data),
        "cache": str(wanted.cache),
        "offline": wanted.offline,
        "plugins": list(wanted.plugins),
        "strategies": item.strategies,
        "rounds": list(item.rounds),
        "repeats": wanted.repeats,
    }


class ReplayWorker:
    """One worker at a time, of the environment that a configuration asks for: thread counts and device."""

    def __init__(self) -> None:
        self._worker: WorkerProcess | None = None

    def __call__(self, job: Mapping[str, Any], config: RunConfig) -> Iterator[Event]:
        wanted = worker_environment(config)
        self._worker = self._worker.fit_for(wanted) if self._worker else WorkerProcess(wanted)
        yield from self._worker.run(job)

    def __enter__(self) -> "ReplayWorker":
        return self

    def __exit__(self, *reason: object) -> None:
        if self._worker is not None:
            self._worker.close()


def outcome_text(outcome: ReplayOutcome, plan: ReplayPlan) -> str:
    """What a command says at its end: the times, which of them were there already, and where they are."""
    lines = [replay_table(outcome), ""]
    if any(is_disturbed(made.timings) for made in outcome.timings):
        lines.append(LEGEND)
    if plan.done:
        lines.append(f"{len(plan.done)} of {len(outcome.timings)} were timed already: --again times them anew.")
    files = ", ".join(dict.fromkeys(made.path.name for made in outcome.timings))
    return "\n".join([*lines, f"In {files} beside the rows; dgal-bench report uses and names them."]).strip()


def replay_table(outcome: ReplayOutcome) -> str:
    """Milliseconds of each run's query, by round; one table for each set of rounds."""
    by_rounds: dict[tuple[int, ...], list[tuple[str, list[Timing]]]] = {}
    for made in outcome.timings:
        for strategy in dict.fromkeys(timing.strategy for timing in made.timings):
            run = made.header["cell"]
            label = f"{strategy} on {run}" if made.header["common"] else run
            timings = [timing for timing in made.timings if timing.strategy == strategy]
            by_rounds.setdefault(tuple(made.rounds), []).append((label, timings))
    lines: list[str] = []
    for rounds, rows in by_rounds.items():
        head = ["query ms", *(f"round {one}" for one in rounds), "mean", "picks"]
        means = [1000 * statistics.fmean(timing.median_seconds for timing in timings) for _, timings in rows]
        told = mark_values([f"{mean:.2f}" for mean in means], [is_disturbed(timings) for _, timings in rows])
        runs = [
            [label, *(f"{1000 * timing.median_seconds:.2f}" for timing in timings), mean, _picks(timings)]
            for (label, timings), mean in zip(rows, told, strict=True)
        ]
        lines += ["", *align_table(head, runs)]
    return "\n".join(lines).strip()


def _picks(timings: Sequence[Timing]) -> str:
    """Whether they are the rows', where there are rows to compare with."""
    known = [timing.picks_equal for timing in timings if timing.picks_equal is not None]
    return ("equal" if all(known) else "others") if known else ""
