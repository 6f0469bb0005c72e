"""The queue of a sweep's runs: which one is next, and what the final event of an attempt means for its run."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from time import monotonic

from dgal_bench.core.errors import ResultsError, UserError
from dgal_bench.core.files import LockHeldError, lock_holder
from dgal_bench.engines.base import Event, SynchronizedListener
from dgal_bench.engines.sweep import PlannedRun
from dgal_bench.results.reader import read_run
from dgal_bench.results.resume import header_outline
from dgal_bench.results.writer import FileWriter

_LOOK_AGAIN_SECONDS = 1.0

MAX_DEATHS = 3
"""After 3 dead workers without a new row in between, the cause is the run: it has failed."""

MAX_START_FAILURES = 3
"""After 3 attempts in a row that could not start a run, with no row in between, stop: the cause is not the run."""

_START_AGAIN_SECONDS = 15.0


class RunQueue:
    """Every engine's bookkeeping, called from any thread.

    A run whose worker died goes to the end of the queue, and continues from its last row. A run whose node could not
    start it (no data, another version) is tried again; if that happens too often, the sweep ends. A run that another
    command has locked waits for the lock. ``take`` reads a changed file again: another command may have finished the
    run since the queue was made.
    """

    def __init__(self, jobs: Sequence[PlannedRun], notify: SynchronizedListener) -> None:
        self._waiting = deque(jobs)
        self._deferred_until: dict[PlannedRun, float] = {}  # monotonic time of the next attempt
        self._running: set[PlannedRun] = set()
        self._sizes = {job: _size(job.path) for job in jobs}
        self._deaths: Counter[PlannedRun] = Counter()
        self._start_failures: list[PlannedRun] = []
        self._given_up: dict[PlannedRun, str] = {}  # errors to record once the lock is free
        self._notify = notify
        self._lock = threading.RLock()
        self.failed: list[PlannedRun] = []
        self.fatal: UserError | None = None

    @property
    def over(self) -> bool:
        """No run waits, is deferred or runs; or an error has ended the sweep."""
        with self._lock:
            return self.fatal is not None or not (self._waiting or self._deferred_until or self._running)

    def __len__(self) -> int:
        """Number of waiting runs."""
        with self._lock:
            return len(self._waiting)

    def drop(self, jobs: Collection[PlannedRun]) -> None:
        """Remove runs already reported as failed."""
        with self._lock:
            self._waiting = deque(job for job in self._waiting if job not in jobs)

    def put_back(self, jobs: Sequence[PlannedRun]) -> None:
        """Return runs that were taken but not started; they come next."""
        with self._lock:
            self._running -= set(jobs)
            self._waiting.extendleft(reversed(jobs))

    def take(self) -> PlannedRun | None:
        """The next run to try; None if none can be tried now (some may be later)."""
        with self._lock:
            while not self.fatal and (job := self._waiting.popleft() if self._waiting else self._due()) is not None:
                self._notify("begun", job)
                if not self._ended_elsewhere(job):
                    self._running.add(job)
                    return job
            return None

    def _due(self) -> PlannedRun | None:
        """A deferred run whose time has come and whose lock is free."""
        for job in [job for job, moment in self._deferred_until.items() if moment <= monotonic()]:
            holder = lock_holder(job.path)
            if holder is None:
                del self._deferred_until[job]
                return job
            self._deferred_until[job] = monotonic() + _LOOK_AGAIN_SECONDS
            self._notify("warn", f"waiting for runs that {holder} works on")
        return None

    def _ended_elsewhere(self, job: PlannedRun) -> bool:
        """Whether the run ended without an attempt of this command; if so, notify the listener."""
        try:
            log = read_run(job.path) if _size(job.path) != self._sizes[job] else None
        except ResultsError as error:
            self._fail(job, " ".join(str(error).split()))
            return True
        if log is not None and log.done:
            self._notify("done", job, 0.0)
        elif log is not None and log.failure:
            self._fail(job, log.failure["error"])
        elif log is not None and log.skipped:
            self._notify("skipped", job, log.skipped["why"])
        elif job in self._given_up:
            self._give_up(job, self._given_up[job])
        else:
            return False
        return True

    def on_event(self, job: PlannedRun, event: Event) -> None:
        """Handle a worker's event of a run."""
        kind = event["event"]
        if kind == "warning":
            self._notify("warn", event["text"])
        elif kind == "round":
            self._deaths[job] = 0
            self._start_failures.clear()
            self._notify("round", job, event["accuracy"])
        elif kind in _HANDLERS:
            with self._lock:  # move between sets under one lock: ``over`` must not see the run in none
                self._running.discard(job)
                self._sizes[job] = _size(job.path)
                _HANDLERS[kind](self, job, event)

    def _done(self, job: PlannedRun, event: Event) -> None:
        self._notify("done", job, event["seconds"])

    def _skipped(self, job: PlannedRun, event: Event) -> None:
        self._notify("skipped", job, event["error"])

    def _wait_for_lock(self, job: PlannedRun, event: Event) -> None:
        self._sizes[job] = -1  # read the file again, whatever the other command writes
        self._deferred_until[job] = monotonic() + _LOOK_AGAIN_SECONDS
        if lock_holder(job.path) is None:
            self._notify("warn", event["error"])

    def _failed(self, job: PlannedRun, event: Event) -> None:
        if event.get("died"):
            self._deaths[job] += 1
            if self._deaths[job] < MAX_DEATHS:
                self._notify("warn", f"{job.name}: {event['error']}; it is tried again")
                self._waiting.append(job)
            else:
                self._give_up(job, f"{event['error']}, {MAX_DEATHS} times without a row in between")
        elif event["stop"]:
            self.fatal = UserError(event["error"])
            self.fatal.exit_code = event["exit_code"]
        elif event.get("recorded") or event.get("refused"):
            self._fail(job, event["error"])
        else:
            self._start_failed(job, event)

    def _start_failed(self, job: PlannedRun, event: Event) -> None:
        """Another node may be able to start it. Wait: the failing node would take it again at once."""
        self._start_failures.append(job)
        error = event["error"] + (f" (on {event['node']})" if "node" in event else "")
        others_run = len(set(self._start_failures)) < MAX_START_FAILURES and self._running
        if len(self._start_failures) < MAX_START_FAILURES or others_run:
            self._notify("warn", f"{job.name}: {error}; it is tried again")
            self._deferred_until[job] = monotonic() + _START_AGAIN_SECONDS
        else:
            self.fatal = UserError(f"{MAX_START_FAILURES} attempts in a row could not start a run: {error}")
            self.fatal.exit_code = max(2, event["exit_code"])

    def _give_up(self, job: PlannedRun, error: str) -> None:
        """Record the failure that the worker could not; later, if the dead worker's lock is not free yet."""
        try:
            record_failure(job, error)
        except LockHeldError as refusal:
            self._given_up[job] = error
            self._wait_for_lock(job, {"error": str(refusal)})
            return
        self._fail(job, error)

    def _fail(self, job: PlannedRun, error: str) -> None:
        self.failed.append(job)
        self._notify("failed", job, error)


def record_failure(job: PlannedRun, error: str) -> None:
    """Write into a run's file that it failed, under an outline header if the file is new.

    Raises:
        LockHeldError: another process works on it.
    """
    with FileWriter(job.path, job.command) as writer:
        if not writer.header_written:
            writer.write_header(header_outline(job.config, job.name))
        writer.write_failure(error, "")


def _size(path: Path) -> int:
    """Bytes; -1 if there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


_HANDLERS: dict[str, Callable[[RunQueue, PlannedRun, Event], None]] = {
    "done": RunQueue._done, "held": RunQueue._wait_for_lock, "skipped": RunQueue._skipped, "failed": RunQueue._failed,
}  # fmt: skip
