"""A replay carried out: one cell after the other by a process of its own, each file written as soon as it is done."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dgal_bench.config import RunConfig, to_dict
from dgal_bench.engines.base import Event, Listener
from dgal_bench.errors import UserError
from dgal_bench.identity import ALGORITHM_VERSION
from dgal_bench.process import Worker, environment
from dgal_bench.report.replays import LEGEND, marked
from dgal_bench.report.text import aligned
from dgal_bench.report.times import disturbed
from dgal_bench.retiming.plan import Item, Plan, Wanted, name_of
from dgal_bench.timings import Timing, Timings, read_timings, write_timings

Ask = Callable[[Mapping[str, Any], RunConfig], Iterator[Event]]
"""Sends a job to a process fit for that configuration; its events, the last an ending."""


@dataclass(eq=False)
class Outcome:
    """The timings there are now, and what went wrong, in a line each."""

    timings: list[Timings]
    trouble: list[str] = field(default_factory=list)


def execute(plan: Plan, wanted: Wanted, listener: Listener, ask: Ask | None = None) -> Outcome:
    """Time one cell after the other, nothing beside; each file is written as soon as its cell is done.

    ``ask``: who does the work, a process of its own if None.

    Raises:
        ResultsError: a timings file cannot be written.
        UserError: nothing could be timed at all; the first reason why.
    """
    outcome = Outcome(list(plan.done), list(plan.refused))
    for line in [*plan.left_out, *plan.refused]:
        listener.warn(line)
    first: UserError | None = None
    with Asker() as asker:
        for item in sorted(plan.items, key=lambda item: item.job.setup_key):  # one data set in memory at a time
            event = _timed(item, wanted, listener, ask or asker)
            if event["event"] != "done":
                listener.failed(item.job, event["error"])
                outcome.trouble.append(f"{name_of(item.log)} is not replayed: {event['error']}")
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
                line = _unequal(made, unequal)
                listener.warn(line)
                outcome.trouble.append(line)
    if first is not None and not outcome.timings:
        raise first
    return outcome


def _unequal(made: Timings, rounds: Sequence[int]) -> str:
    where = "; ".join(made.header["changed"][:3]) or "its rows were changed"
    which = ", ".join(map(str, rounds))
    return f"{made.header['cell']} picks others than its rows say in round {which} ({where}): no report uses its times"


def _timed(item: Item, wanted: Wanted, listener: Listener, ask: Ask) -> Event:
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


def _message(item: Item, wanted: Wanted) -> dict[str, Any]:
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


class Asker:
    """One worker at a time, of the environment that a configuration asks for: thread counts and device."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def __call__(self, job: Mapping[str, Any], config: RunConfig) -> Iterator[Event]:
        wanted = environment(config)
        self._worker = self._worker.fit_for(wanted) if self._worker else Worker(wanted)
        yield from self._worker.run(job)

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *reason: object) -> None:
        if self._worker is not None:
            self._worker.close()


def told(outcome: Outcome, plan: Plan) -> str:
    """What a command says at its end: the times, which of them were there already, and where they are."""
    lines = [table(outcome), ""]
    if any(disturbed(made.timings) for made in outcome.timings):
        lines.append(LEGEND)
    if plan.done:
        lines.append(f"{len(plan.done)} of {len(outcome.timings)} were timed already: --again times them anew.")
    files = ", ".join(dict.fromkeys(made.path.name for made in outcome.timings))
    return "\n".join([*lines, f"In {files} beside the rows; dgal-bench report uses and names them."]).strip()


def table(outcome: Outcome) -> str:
    """Milliseconds of each cell's query, by round; one table for each set of rounds."""
    by_rounds: dict[tuple[int, ...], list[tuple[str, list[Timing]]]] = {}
    for made in outcome.timings:
        for strategy in dict.fromkeys(timing.strategy for timing in made.timings):
            cell = made.header["cell"]
            label = f"{strategy} on {cell}" if made.header["common"] else cell
            timings = [timing for timing in made.timings if timing.strategy == strategy]
            by_rounds.setdefault(tuple(made.rounds), []).append((label, timings))
    lines: list[str] = []
    for rounds, rows in by_rounds.items():
        head = ["query ms", *(f"round {one}" for one in rounds), "mean", "picks"]
        means = [1000 * statistics.fmean(timing.median_seconds for timing in timings) for _, timings in rows]
        told = marked([f"{mean:.2f}" for mean in means], [disturbed(timings) for _, timings in rows])
        cells = [
            [label, *(f"{1000 * timing.median_seconds:.2f}" for timing in timings), mean, _picks(timings)]
            for (label, timings), mean in zip(rows, told, strict=True)
        ]
        lines += ["", *aligned(head, cells)]
    return "\n".join(lines).strip()


def _picks(timings: Sequence[Timing]) -> str:
    """Whether they are the rows', where there are rows to compare with."""
    known = [timing.picks_equal for timing in timings if timing.picks_equal is not None]
    return ("equal" if all(known) else "others") if known else ""
