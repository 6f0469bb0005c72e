"""What an engine is, who is told of a sweep, and a job as workers read it."""

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from dgal_bench.config.schema import to_dict
from dgal_bench.engines.sweep import PlannedRun, SweepSettings
from dgal_bench.results.resume import ALGORITHM_VERSION

if TYPE_CHECKING:
    from dgal_bench.engines.queue import RunQueue


Event = Mapping[str, Any]
"""What a worker says, ``event`` first: progress, warning and round while at work, process.ENDINGS when it is over."""


class Listener(Protocol):
    """Who is told how a sweep goes: called from several threads, one call at a time."""

    def setting_up(self, name: str, what: str, done: int, of: int) -> None: ...
    def begun(self, job: PlannedRun) -> None: ...
    def round(self, job: PlannedRun, accuracy: float) -> None: ...
    def done(self, job: PlannedRun, seconds: float) -> None: ...
    def failed(self, job: PlannedRun, error: str) -> None: ...
    def skipped(self, job: PlannedRun, why: str) -> None: ...
    def warn(self, text: str) -> None: ...


class SynchronizedListener:
    """Tells a listener from several threads, one call at a time; the same warning of many workers is told once."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._telling = threading.Lock()
        self._warned: set[str] = set()

    def __call__(self, what: str, *facts: Any) -> None:
        with self._telling:
            if what == "warn":
                if facts[0] in self._warned:
                    return
                self._warned.add(facts[0])
            getattr(self._listener, what)(*facts)


class Engine(Protocol):
    """Schedules; what runs is ``worker.handle``, and what has run is in the results folder, whatever becomes of it."""

    def ask(self, kind: str, job: PlannedRun) -> Iterator[Event]:
        """The events of a ``setup``, or of a look at the ``content`` of a user's files, the last an ending."""

    def run(self, run_queue: "RunQueue") -> None:
        """Run the runs of the run queue until it is over."""

    def close(self) -> None:
        """End whatever is running, within a second or two; more than once does no harm."""


def job_message(kind: str, job: PlannedRun, settings: SweepSettings) -> dict[str, Any]:
    """A job as a worker reads it, wherever that is, and in whatever folder it starts."""
    return {
        "job": kind,
        "algorithm_version": ALGORITHM_VERSION,
        "config": to_dict(job.config),
        "path": str(job.path.absolute()),
        "setup_key": job.setup_key,
        "data": str(settings.data.absolute()),
        "cache": str(settings.cache.absolute()),
        "resume_anyway": settings.resume_anyway,
        "offline": settings.offline,
        "plugins": list(settings.plugins),
    }
