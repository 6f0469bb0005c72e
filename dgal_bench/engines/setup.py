"""Before any run starts: make or find each representation and graph; compare a user's files with finished runs."""

from collections.abc import Mapping, Sequence

from dgal_bench.config.schema import check_budget, idle_restriction
from dgal_bench.core.errors import UserError
from dgal_bench.core.files import LockHeldError
from dgal_bench.engines.base import Engine, Event, SynchronizedListener
from dgal_bench.engines.queue import MAX_DEATHS, record_failure
from dgal_bench.engines.sweep import PlannedRun
from dgal_bench.results.resume import check_same_content
from dgal_bench.results.rows import RunLog


def compare_files(finished: Mapping[PlannedRun, RunLog], engine: Engine, notify: SynchronizedListener) -> None:
    """Check that a user's files are still those of the finished runs; missing files only give a warning.

    Raises:
        ResultsError: the files have other content.
    """
    for group in _by_setup(list(finished)):
        event = _ask("content", group[0], engine, notify)
        if event["event"] != "ready":
            name = group[0].config.dataset.name
            notify("warn", f"finished runs of {name} could not be compared with your files: {event['error']}")
            continue
        for job in group:
            check_same_content(finished[job], event["content"])


def set_up(jobs: Sequence[PlannedRun], engine: Engine, notify: SynchronizedListener) -> list[PlannedRun]:
    """Make (or find) the representation and graph of every data set, and store the projection of its features.

    Returns:
        The runs whose setup failed (the representation collapsed or crashed); their files say so.

    Raises:
        UserError: data is missing, a setting is wrong, every setup failed, a run needs more points than the data
            has, or the results folder cannot be written.
    """
    broken: dict[PlannedRun, str] = {}
    last_error = UserError("")
    for group in _by_setup(jobs):
        event = _ask("setup", group[0], engine, notify)
        if event["event"] == "ready":
            for job in group:
                check_budget(job.config, event["points"])
                if warning := idle_restriction(job.config, event["points"]):
                    notify("warn", warning)
            continue
        last_error = UserError(event["error"])
        last_error.exit_code = event["exit_code"]
        if event["stop"]:
            raise last_error
        broken |= dict.fromkeys(group, str(event["error"]))
    if broken and len(broken) == len(jobs):
        raise last_error
    for job, error in broken.items():
        try:
            record_failure(job, error)
        except LockHeldError as refusal:
            notify("warn", str(refusal))
        notify("failed", job, error)
    return list(broken)


def _by_setup(jobs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """Groups of runs that share a setup, in order of their first runs."""
    groups: dict[str, list[PlannedRun]] = {}
    for job in jobs:
        groups.setdefault(job.setup_key, []).append(job)
    return list(groups.values())


def _ask(kind: str, job: PlannedRun, engine: Engine, notify: SynchronizedListener) -> Event:
    """The final event of a job; it is tried again if its worker was killed."""
    name = job.config.dataset.name
    event: Event = {}
    for _ in range(MAX_DEATHS):
        notify("setting_up", name, "loading", 0, 1)
        for event in engine.ask(kind, job):
            if event["event"] == "progress":
                notify("setting_up", name, event["what"], event["n"], event["of"])
            elif event["event"] == "warning":
                notify("warn", event["text"])
        if not event.get("died"):
            break
        notify("warn", f"set-up of {name}: {event['error']}")
    return event
