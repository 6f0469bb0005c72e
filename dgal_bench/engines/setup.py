"""Before any run starts: every data set, representation and graph made or found, and a user's files compared."""

from collections.abc import Mapping, Sequence

from dgal_bench.config.schema import check_budget, idle_restriction
from dgal_bench.core.errors import UserError
from dgal_bench.core.files import LockHeldError
from dgal_bench.engines.base import Engine, Event, SynchronizedListener
from dgal_bench.engines.queue import MAX_DEATHS, record_failure
from dgal_bench.engines.sweep import PlannedRun
from dgal_bench.results.projection import write_projection
from dgal_bench.results.resume import check_same_content
from dgal_bench.results.rows import RunLog


def compare_files(finished: Mapping[PlannedRun, RunLog], engine: Engine, tell: SynchronizedListener) -> None:
    """Whether a user's files still hold what finished runs rest on; files that are gone are no reason to lose these.

    Raises:
        ResultsError: they hold something else.
    """
    for sharing in _by_setup(list(finished)):
        event = _ask("content", sharing[0], engine, tell)
        if event["event"] != "ready":
            name = sharing[0].config.dataset.name
            tell("warn", f"finished runs of {name} could not be compared with your files: {event['error']}")
            continue
        for job in sharing:
            check_same_content(finished[job], event["content"])


def set_up(jobs: Sequence[PlannedRun], engine: Engine, tell: SynchronizedListener) -> list[PlannedRun]:
    """Make (or find) the representation and graph of every data set, and file the projection of its latents.

    Returns:
        The runs that cannot run, which have failed: their representation collapsed, or its making crashed.

    Raises:
        UserError: data missing, a wrong setting, nothing that could be set up, a run that asks more of the data than
            there is, or a results folder that takes no file.
    """
    broken: dict[PlannedRun, str] = {}
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
            record_failure(job, error)
        except LockHeldError as held:
            tell("warn", str(held))
        tell("failed", job, error)
    return list(broken)


def _file(sharing: Sequence[PlannedRun], ready: Event) -> None:
    """Put the projection beside the results: here, since a node that made it need not see their disk."""
    if "projection" in ready:
        for folder in sorted({job.path.parents[1] for job in sharing}):
            write_projection(ready["projection"], folder)


def _by_setup(jobs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """Runs that share a set-up, in order of the first of each."""
    sharing: dict[str, list[PlannedRun]] = {}
    for job in jobs:
        sharing.setdefault(job.setup_key, []).append(job)
    return list(sharing.values())


def _ask(kind: str, job: PlannedRun, engine: Engine, tell: SynchronizedListener) -> Event:
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
