"""The runs of a sweep that wait, are held elsewhere or are over, and what the ending of a try means for its run."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from time import monotonic

from dgal_bench.core.errors import ResultsError, UserError
from dgal_bench.core.files import LockHeldError, holder_name, live_holder
from dgal_bench.engines.base import Event, SynchronizedListener
from dgal_bench.engines.sweep import PlannedRun
from dgal_bench.results.reader import read_run
from dgal_bench.results.resume import header_outline
from dgal_bench.results.writer import FileWriter

_LOOK_AGAIN_SECONDS = 1.0

MAX_DEATHS = 3
"""A run whose worker died so often without a row in between is what kills it."""

MAX_UNBEGUN = 3
"""So many runs in a row that could not begin, with no row from anywhere in between, are not what is wrong."""

_BEGIN_AGAIN_SECONDS = 15.0


class RunQueue:
    """Every engine's bookkeeping, called from any thread.

    A run whose worker died goes to the end of the queue, and on from its last row; so does one whose node could not
    begin it, being without the data or of another version, and if that goes on the sweep ends. One that another runner
    holds waits until that lets go. Before a run is handed out its file is looked at again: what another runner has
    ended since the run queue was made is over.
    """

    def __init__(self, jobs: Sequence[PlannedRun], tell: SynchronizedListener) -> None:
        self._waiting = deque(jobs)
        self._held: dict[PlannedRun, float] = {}  # until when not to look again, of the monotonic clock
        self._running: set[PlannedRun] = set()
        self._sizes = {job: _size(job.path) for job in jobs}
        self._deaths: Counter[PlannedRun] = Counter()
        self._unbegun: list[PlannedRun] = []
        self._doomed: dict[PlannedRun, str] = {}
        self._tell = tell
        self._lock = threading.RLock()
        self.failed: list[PlannedRun] = []
        self.fatal: UserError | None = None

    @property
    def over(self) -> bool:
        """Nothing waits, is held or runs; or something has happened after which no run would fare better."""
        with self._lock:
            return self.fatal is not None or not (self._waiting or self._held or self._running)

    def __len__(self) -> int:
        """How many runs wait."""
        with self._lock:
            return len(self._waiting)

    def drop(self, jobs: Collection[PlannedRun]) -> None:
        """Runs that cannot run, and of whom that has been said."""
        with self._lock:
            self._waiting = deque(job for job in self._waiting if job not in jobs)

    def put_back(self, jobs: Sequence[PlannedRun]) -> None:
        """Runs that were taken and not begun, as the next ones."""
        with self._lock:
            self._running -= set(jobs)
            self._waiting.extendleft(reversed(jobs))

    def take(self) -> PlannedRun | None:
        """The next run to try; None where none can be tried now, though some may be later."""
        with self._lock:
            while not self.fatal and (job := self._waiting.popleft() if self._waiting else self._let_go()) is not None:
                self._tell("begun", job)
                if not self._ended_elsewhere(job):
                    self._running.add(job)
                    return job
            return None

    def _let_go(self) -> PlannedRun | None:
        """A run that is no longer held."""
        for job in [job for job, moment in self._held.items() if moment <= monotonic()]:
            holder = live_holder(job.path)
            if holder is None:
                del self._held[job]
                return job
            self._held[job] = monotonic() + _LOOK_AGAIN_SECONDS
            self._tell("warn", f"waiting for runs that {holder_name(holder)} works on")
        return None

    def _ended_elsewhere(self, job: PlannedRun) -> bool:
        """Whether a run is over without a try of ours; if so that is told."""
        try:
            log = read_run(job.path) if _size(job.path) != self._sizes[job] else None
        except ResultsError as error:
            self._fail(job, " ".join(str(error).split()))
            return True
        if log is not None and log.done:
            self._tell("done", job, 0.0)
        elif log is not None and log.failure:
            self._fail(job, log.failure["error"])
        elif log is not None and log.skipped:
            self._tell("skipped", job, log.skipped["why"])
        elif job in self._doomed:
            self._give_up(job, self._doomed[job])
        else:
            return False
        return True

    def on_event(self, job: PlannedRun, event: Event) -> None:
        """What a worker says of a run."""
        kind = event["event"]
        if kind == "warning":
            self._tell("warn", event["text"])
        elif kind == "round":
            self._deaths[job] = 0
            self._unbegun.clear()
            self._tell("round", job, event["accuracy"])
        elif kind in _ENDINGS:
            with self._lock:  # at no moment is the run nowhere
                self._running.discard(job)
                self._sizes[job] = _size(job.path)
                _ENDINGS[kind](self, job, event)

    def _done(self, job: PlannedRun, event: Event) -> None:
        self._tell("done", job, event["seconds"])

    def _skipped(self, job: PlannedRun, event: Event) -> None:
        self._tell("skipped", job, event["error"])

    def _put_aside(self, job: PlannedRun, event: Event) -> None:
        self._sizes[job] = -1  # whatever its holder makes of it
        self._held[job] = monotonic() + _LOOK_AGAIN_SECONDS
        if live_holder(job.path) is None:
            self._tell("warn", event["error"])

    def _failed(self, job: PlannedRun, event: Event) -> None:
        if event.get("died"):
            self._deaths[job] += 1
            if self._deaths[job] < MAX_DEATHS:
                self._tell("warn", f"{job.name}: {event['error']}; it is tried again")
                self._waiting.append(job)
            else:
                self._give_up(job, f"{event['error']}, {MAX_DEATHS} times without a row in between")
        elif event["stop"]:
            self.fatal = UserError(event["error"])
            self.fatal.exit_code = event["exit_code"]
        elif event.get("recorded") or event.get("refused"):
            self._fail(job, event["error"])
        else:
            self._never_began(job, event)

    def _never_began(self, job: PlannedRun, event: Event) -> None:
        """Another node may be able to; the one that is not would come back for the next run at once, and so on."""
        self._unbegun.append(job)
        error = event["error"] + (f" (on {event['node']})" if "node" in event else "")
        others_run = len(set(self._unbegun)) < MAX_UNBEGUN and self._running
        if len(self._unbegun) < MAX_UNBEGUN or others_run:
            self._tell("warn", f"{job.name}: {error}; it is tried again")
            self._held[job] = monotonic() + _BEGIN_AGAIN_SECONDS
        else:
            self.fatal = UserError(f"{MAX_UNBEGUN} tries in a row could not begin their runs: {error}")
            self.fatal.exit_code = max(2, event["exit_code"])

    def _give_up(self, job: PlannedRun, error: str) -> None:
        """Write that a run failed where its worker could not: later, where that one's lease is not yet over."""
        try:
            record_failure(job, error)
        except LockHeldError as held:
            self._doomed[job] = error
            self._put_aside(job, {"error": str(held)})
            return
        self._fail(job, error)

    def _fail(self, job: PlannedRun, error: str) -> None:
        self.failed.append(job)
        self._tell("failed", job, error)


def record_failure(job: PlannedRun, error: str) -> None:
    """Write into a run's file that it failed, under an outline if it has no row yet.

    Raises:
        HeldError: somebody works on it.
    """
    with FileWriter(job.path) as writer:
        if not writer.header_written:
            writer.write_header(header_outline(job.config, job.name))
        writer.write_failure(error, "")


def _size(path: Path) -> int:
    """Bytes; -1 where there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


_ENDINGS: dict[str, Callable[[RunQueue, PlannedRun, Event], None]] = {
    "done": RunQueue._done, "held": RunQueue._put_aside, "skipped": RunQueue._skipped, "failed": RunQueue._failed,
}  # fmt: skip
