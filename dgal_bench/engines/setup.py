"""Before any cell starts: every data set, representation and graph made or found, and a user's files compared."""

from collections.abc import Mapping, Sequence

from dgal_bench.checks import check_budget, idle_restriction
from dgal_bench.engines.base import Engine, Event, Teller
from dgal_bench.engines.docket import MAX_DEATHS, leave_word
from dgal_bench.errors import UserError
from dgal_bench.identity import check_content
from dgal_bench.lease import HeldError
from dgal_bench.projection import unpack
from dgal_bench.record import CellLog
from dgal_bench.sweep import Job


def compare(finished: Mapping[Job, CellLog], engine: Engine, tell: Teller) -> None:
    """Whether a user's files still hold what finished cells rest on; files that are gone are no reason to lose these.

    Raises:
        ResultsError: they hold something else.
    """
    for sharing in _by_setup(list(finished)):
        event = _ask("content", sharing[0], engine, tell)
        if event["event"] != "ready":
            name = sharing[0].config.dataset.name
            tell("warn", f"finished cells of {name} could not be compared with your files: {event['error']}")
            continue
        for job in sharing:
            check_content(finished[job], event["content"])


def set_up(jobs: Sequence[Job], engine: Engine, tell: Teller) -> list[Job]:
    """Make (or find) the representation and graph of every data set, and file the projection of its latents.

    Returns:
        The cells that cannot run, which have failed: their representation collapsed, or its making crashed.

    Raises:
        UserError: data missing, a wrong setting, nothing that could be set up, a cell that asks more of the data than
            there is, or a results folder that takes no file.
    """
    broken: dict[Job, str] = {}
    last_error = UserError("")
    for sharing in _by_setup(jobs):
        event = _ask("setup", sharing[0], engine, tell)
        if event["event"] == "ready":
            for job in sharing:
                check_budget(job.config, event["points"])
                if warning := idle_restriction(job.config, event["points"]):
                    tell("warn", warning)
            _file(sharing, event)
            continue
        last_error = UserError(event["error"])
        last_error.exit_code = event["exit_code"]
        if event["stop"]:
            raise last_error
        broken |= dict.fromkeys(sharing, str(event["error"]))
    if broken and len(broken) == len(jobs):
        raise last_error
    for job, error in broken.items():
        try:
            leave_word(job, error)
        except HeldError as held:
            tell("warn", str(held))
        tell("failed", job, error)
    return list(broken)


def _file(sharing: Sequence[Job], ready: Event) -> None:
    """Put the projection beside the results: here, since a node that made it need not see their disk."""
    if "projection" in ready:
        for folder in sorted({job.path.parents[1] for job in sharing}):
            unpack(ready["projection"], folder)


def _by_setup(jobs: Sequence[Job]) -> list[list[Job]]:
    """Cells that share a set-up, in order of the first of each."""
    sharing: dict[str, list[Job]] = {}
    for job in jobs:
        sharing.setdefault(job.setup_key, []).append(job)
    return list(sharing.values())


def _ask(kind: str, job: Job, engine: Engine, tell: Teller) -> Event:
    """The ending; a worker that was killed has another in its place."""
    name = job.config.dataset.name
    event: Event = {}
    for _ in range(MAX_DEATHS):
        tell("setting_up", name, "loading", 0, 1)
        for event in engine.ask(kind, job):
            if event["event"] == "progress":
                tell("setting_up", name, event["what"], event["n"], event["of"])
            elif event["event"] == "warning":
                tell("warn", event["text"])
        if not event.get("died"):
            break
        tell("warn", f"set-up of {name}: {event['error']}")
    return event
