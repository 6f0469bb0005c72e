"""The cells of a sweep that wait, are held elsewhere or are over, and what the ending of a try means for its cell."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from time import monotonic

from dgal_bench.engines.base import Event, Teller
from dgal_bench.errors import ResultsError, UserError
from dgal_bench.identity import outline
from dgal_bench.lease import HeldError, at_work, name_of
from dgal_bench.record import read_cell
from dgal_bench.recorder import Recorder
from dgal_bench.sweep import Job

_LOOK_AGAIN_SECONDS = 1.0

MAX_DEATHS = 3
"""A cell whose worker died so often without a row in between is what kills it."""

MAX_UNBEGUN = 3
"""So many cells in a row that could not begin, with no row from anywhere in between, are not what is wrong."""

_BEGIN_AGAIN_SECONDS = 15.0


class Docket:
    """Every engine's bookkeeping, called from any thread.

    A cell whose worker died goes to the end of the queue, and on from its last row; so does one whose node could not
    begin it, being without the data or of another version, and if that goes on the sweep ends. One that another runner
    holds waits until that lets go. Before a cell is handed out its file is looked at again: what another runner has
    ended since the docket was made is over.
    """

    def __init__(self, jobs: Sequence[Job], tell: Teller) -> None:
        self._waiting = deque(jobs)
        self._held: dict[Job, float] = {}  # until when not to look again, of the monotonic clock
        self._running: set[Job] = set()
        self._sizes = {job: _size(job.path) for job in jobs}
        self._deaths: Counter[Job] = Counter()
        self._unbegun: list[Job] = []
        self._doomed: dict[Job, str] = {}
        self._tell = tell
        self._lock = threading.RLock()
        self.failed: list[Job] = []
        self.fatal: UserError | None = None

    @property
    def over(self) -> bool:
        """Nothing waits, is held or runs; or something has happened after which no cell would fare better."""
        with self._lock:
            return self.fatal is not None or not (self._waiting or self._held or self._running)

    def __len__(self) -> int:
        """How many cells wait."""
        with self._lock:
            return len(self._waiting)

    def drop(self, jobs: Collection[Job]) -> None:
        """Cells that cannot run, and of whom that has been said."""
        with self._lock:
            self._waiting = deque(job for job in self._waiting if job not in jobs)

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Cells that were taken and not begun, as the next ones."""
        with self._lock:
            self._running -= set(jobs)
            self._waiting.extendleft(reversed(jobs))

    def take(self) -> Job | None:
        """The next cell to try; None where none can be tried now, though some may be later."""
        with self._lock:
            while not self.fatal and (job := self._waiting.popleft() if self._waiting else self._let_go()) is not None:
                self._tell("begun", job)
                if not self._ended_elsewhere(job):
                    self._running.add(job)
                    return job
            return None

    def _let_go(self) -> Job | None:
        """A cell that is no longer held."""
        for job in [job for job, moment in self._held.items() if moment <= monotonic()]:
            holder = at_work(job.path)
            if holder is None:
                del self._held[job]
                return job
            self._held[job] = monotonic() + _LOOK_AGAIN_SECONDS
            self._tell("warn", f"waiting for cells that {name_of(holder)} works on")
        return None

    def _ended_elsewhere(self, job: Job) -> bool:
        """Whether a cell is over without a try of ours; if so that is told."""
        try:
            log = read_cell(job.path) if _size(job.path) != self._sizes[job] else None
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
            self._bury(job, self._doomed[job])
        else:
            return False
        return True

    def hear(self, job: Job, event: Event) -> None:
        """What a worker says of a cell."""
        kind = event["event"]
        if kind == "warning":
            self._tell("warn", event["text"])
        elif kind == "round":
            self._deaths[job] = 0
            self._unbegun.clear()
            self._tell("round", job, event["accuracy"])
        elif kind in _ENDINGS:
            with self._lock:  # at no moment is the cell nowhere
                self._running.discard(job)
                self._sizes[job] = _size(job.path)
                _ENDINGS[kind](self, job, event)

    def _done(self, job: Job, event: Event) -> None:
        self._tell("done", job, event["seconds"])

    def _skipped(self, job: Job, event: Event) -> None:
        self._tell("skipped", job, event["error"])

    def _put_aside(self, job: Job, event: Event) -> None:
        self._sizes[job] = -1  # whatever its holder makes of it
        self._held[job] = monotonic() + _LOOK_AGAIN_SECONDS
        if at_work(job.path) is None:
            self._tell("warn", event["error"])

    def _failed(self, job: Job, event: Event) -> None:
        if event.get("died"):
            self._deaths[job] += 1
            if self._deaths[job] < MAX_DEATHS:
                self._tell("warn", f"{job.name}: {event['error']}; it is tried again")
                self._waiting.append(job)
            else:
                self._bury(job, f"{event['error']}, {MAX_DEATHS} times without a row in between")
        elif event["stop"]:
            self.fatal = UserError(event["error"])
            self.fatal.exit_code = event["exit_code"]
        elif event.get("recorded") or event.get("refused"):
            self._fail(job, event["error"])
        else:
            self._never_began(job, event)

    def _never_began(self, job: Job, event: Event) -> None:
        """Another node may be able to; the one that is not would come back for the next cell at once, and so on."""
        self._unbegun.append(job)
        error = event["error"] + (f" (on {event['node']})" if "node" in event else "")
        others_run = len(set(self._unbegun)) < MAX_UNBEGUN and self._running
        if len(self._unbegun) < MAX_UNBEGUN or others_run:
            self._tell("warn", f"{job.name}: {error}; it is tried again")
            self._held[job] = monotonic() + _BEGIN_AGAIN_SECONDS
        else:
            self.fatal = UserError(f"{MAX_UNBEGUN} tries in a row could not begin their cells: {error}")
            self.fatal.exit_code = max(2, event["exit_code"])

    def _bury(self, job: Job, error: str) -> None:
        """Write that a cell failed where its worker could not: later, where that one's lease is not yet over."""
        try:
            leave_word(job, error)
        except HeldError as held:
            self._doomed[job] = error
            self._put_aside(job, {"error": str(held)})
            return
        self._fail(job, error)

    def _fail(self, job: Job, error: str) -> None:
        self.failed.append(job)
        self._tell("failed", job, error)


def leave_word(job: Job, error: str) -> None:
    """Write into a cell's file that it failed, under an outline if it has no row yet.

    Raises:
        HeldError: somebody works on it.
    """
    with Recorder(job.path) as recorder:
        if not recorder.header_written:
            recorder.write_header(outline(job.config, job.name))
        recorder.write_failure(error, "")


def _size(path: Path) -> int:
    """Bytes; -1 where there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


_ENDINGS: dict[str, Callable[[Docket, Job, Event], None]] = {
    "done": Docket._done, "held": Docket._put_aside, "skipped": Docket._skipped, "failed": Docket._failed,
}  # fmt: skip
