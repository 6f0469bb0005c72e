"""The interfaces of engines and listeners, and the message of a job to a worker."""

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from dgal_bench.config.schema import to_dict
from dgal_bench.engines.sweep import PlannedRun, SweepSettings
from dgal_bench.results.resume import ALGORITHM_VERSION

if TYPE_CHECKING:
    from dgal_bench.engines.queue import RunQueue


Event = Mapping[str, Any]
"""A worker's message, ``event`` first: progress, warning, round; the last of a job is one of process.FINAL_EVENTS."""


class Listener(Protocol):
    """Receives the events of a sweep: from several threads, one call at a time."""

    def setting_up(self, name: str, what: str, done: int, of: int) -> None: ...
    def begun(self, job: PlannedRun) -> None: ...
    def round(self, job: PlannedRun, accuracy: float) -> None: ...
    def done(self, job: PlannedRun, seconds: float) -> None: ...
    def failed(self, job: PlannedRun, error: str) -> None: ...
    def skipped(self, job: PlannedRun, why: str) -> None: ...
    def warn(self, text: str) -> None: ...


class SynchronizedListener:
    """Makes a listener thread-safe, and passes on the same warning of many workers once."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._lock = threading.Lock()
        self._warnings: set[str] = set()

    def __call__(self, event: str, *facts: Any) -> None:
        with self._lock:
            if event == "warn":
                if facts[0] in self._warnings:
                    return
                self._warnings.add(facts[0])
            getattr(self._listener, event)(*facts)


class Engine(Protocol):
    """Schedules jobs, which ``worker.handle`` executes; the results folder keeps every row, even if the engine dies."""

    def ask(self, kind: str, job: PlannedRun) -> Iterator[Event]:
        """The events of a ``setup`` job, or of a ``content`` job (hashes of a user's files), up to the final one."""

    def run(self, run_queue: "RunQueue") -> None:
        """Execute the runs of the queue until it is over."""

    def close(self) -> None:
        """End all jobs within a second or two; may be called again."""


def job_message(kind: str, job: PlannedRun, settings: SweepSettings) -> dict[str, Any]:
    """A job as a worker reads it; paths are absolute, since a worker may start in another folder."""
    return {
        "job": kind,
        "algorithm_version": ALGORITHM_VERSION,
        "config": to_dict(job.config),
        "path": str(job.path.absolute()),
        "command": list(job.command),
        "setup_key": job.setup_key,
        "data": str(settings.data.absolute()),
        "cache": str(settings.cache.absolute()),
        "resume_anyway": settings.resume_anyway,
        "offline": settings.offline,
        "plugins": list(settings.plugins),
    }
