"""The local engine: set up, then run cells on worker processes side by side. The results folder is the only truth."""

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dgal_bench.checks import check_budget, idle_restriction
from dgal_bench.config import to_dict
from dgal_bench.errors import UserError
from dgal_bench.identity import check_content
from dgal_bench.process import Worker, environment
from dgal_bench.record import CellLog, Recorder
from dgal_bench.sweep import Job, Settings


class Listener(Protocol):
    """Who is told how a sweep goes: called from several threads, one call at a time."""

    def setting_up(self, name: str, what: str, done: int, of: int) -> None: ...
    def begun(self, job: Job) -> None: ...
    def round(self, job: Job, accuracy: float) -> None: ...
    def done(self, job: Job) -> None: ...
    def failed(self, job: Job, error: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Teller:
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


def execute(jobs: Sequence[Job], settings: Settings, listener: Listener, finished: Mapping[Job, CellLog]) -> list[Job]:
    """Set every data set up, then run the cells on ``settings.jobs`` workers side by side.

    ``finished``: cells that rest on a user's own files, of which only a set-up knows whether they are still the same.

    A failed cell is recorded and the others go on. All workers start at once, since their imports take 10 s; the
    first of them does the set-up, on as many threads as that has been given.

    Returns:
        The cells that failed.

    Raises:
        UserError: data missing, a wrong setting, nothing that could be set up, or a cell that asks more of the data
            than there is.
    """
    first = [*jobs, *finished][0]
    workers = [Worker(environment(first.config)) for _ in jobs[: settings.jobs] or [first]]
    tell = Teller(listener)
    try:
        compare(finished, settings, tell, workers)
        broken = set_up(jobs, settings, tell, workers)
        for job in broken:
            tell("failed", job, broken[job])
        return [*broken, *run_cells([job for job in jobs if job not in broken], settings, tell, workers)]
    finally:
        for worker in workers:
            worker.close()


def compare(finished: Mapping[Job, CellLog], settings: Settings, tell: Teller, workers: list[Worker]) -> None:
    """Whether a user's files still hold what finished cells rest on; files that are gone are no reason to lose these.

    Raises:
        ResultsError: they hold something else.
    """
    for key in dict.fromkeys(job.setup_key for job in finished):
        sharing = [job for job in finished if job.setup_key == key]
        workers[0] = workers[0].fit_for(sharing[0].config)
        event = _ask("content", sharing[0], settings, tell, workers[0])
        if event["event"] != "ready":
            name = sharing[0].config.dataset.name
            tell("warn", f"finished cells of {name} could not be compared with your files: {event['error']}")
            continue
        for job in sharing:
            check_content(finished[job], event["content"])


def set_up(jobs: Sequence[Job], settings: Settings, tell: Teller, workers: list[Worker]) -> dict[Job, str]:
    """Make (or find) the representation and graph of every data set before any cell starts, on the first worker.

    Returns:
        The cells that cannot run, with the error: their representation collapsed, or its making crashed.
    """
    broken: dict[Job, str] = {}
    last_error = UserError("")
    for key in dict.fromkeys(job.setup_key for job in jobs):
        sharing = [job for job in jobs if job.setup_key == key]
        workers[0] = workers[0].fit_for(sharing[0].config)
        event = _ask("setup", sharing[0], settings, tell, workers[0])
        if event["event"] == "ready":
            for job in sharing:
                check_budget(job.config, event["points"])
                if warning := idle_restriction(job.config, event["points"]):
                    tell("warn", warning)
            continue
        last_error = UserError(event["error"])
        last_error.exit_code = event["exit_code"]
        if event["stop"]:
            raise last_error
        broken |= dict.fromkeys(sharing, event["error"])
    if broken and len(broken) == len(jobs):
        raise last_error
    return broken


def _ask(what: str, job: Job, settings: Settings, tell: Teller, worker: Worker) -> dict[str, Any]:
    """The last event of a ``setup``, or of a look at the ``content`` of a user's files."""
    name = job.config.dataset.name
    tell("setting_up", name, "loading", 0, 1)
    event: dict[str, Any] = {}
    for event in worker.run(message(what, job, settings, n_lanes=1)):
        if event["event"] == "progress":
            tell("setting_up", name, event["what"], event["n"], event["of"])
        elif event["event"] == "warning":
            tell("warn", event["text"])
    return event


def message(kind: str, job: Job, settings: Settings, n_lanes: int) -> dict[str, Any]:
    """A job as a worker reads it."""
    return {
        "job": kind,
        "config": to_dict(job.config),
        "path": str(job.path),
        "setup_key": job.setup_key,
        "data": str(settings.data),
        "cache": str(settings.cache),
        "jobs": n_lanes,
        "resume_anyway": settings.resume_anyway,
        "offline": settings.offline,
        "plugins": settings.plugins,
    }


def run_cells(jobs: Sequence[Job], settings: Settings, tell: Teller, workers: Sequence[Worker]) -> list[Job]:
    """Run the cells, a thread for each worker; those that failed are returned."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    n_lanes = min(len(workers), len(jobs))
    lanes = [_Lane(waiting, settings, tell, worker, n_lanes) for worker in workers[:n_lanes]]
    try:
        for lane in lanes:
            lane.start()
        for lane in lanes:
            while lane.is_alive():
                lane.join(0.2)  # with a timeout, so that Ctrl-C gets through
    finally:
        for lane in lanes:
            lane.stop()
    for lane in lanes:
        if lane.error is not None:
            raise lane.error
    return [job for lane in lanes for job in lane.failed]


class _Lane(threading.Thread):
    """Takes cells off the queue, one worker at a time, until none is left."""

    def __init__(
        self,
        waiting: "queue.SimpleQueue[Job]",
        settings: Settings,
        tell: Teller,
        worker: Worker,
        n_lanes: int,
    ) -> None:
        super().__init__(daemon=True)
        self.failed: list[Job] = []
        self.error: BaseException | None = None
        self._waiting, self._settings, self._tell = waiting, settings, tell
        self._worker, self._n_lanes = worker, n_lanes
        self._stopped = False

    def run(self) -> None:
        try:
            while not self._stopped:
                self._run_one(self._waiting.get_nowait())
        except queue.Empty:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self.error = error
        finally:
            self.stop()

    def stop(self) -> None:
        self._stopped = True
        self._worker.close()

    def _run_one(self, job: Job) -> None:
        self._worker = self._worker.fit_for(job.config)
        self._tell("begun", job)
        for event in self._worker.run(message("cell", job, self._settings, self._n_lanes)):
            if self._stopped:
                return
            if event["event"] == "round":
                self._tell("round", job, event["accuracy"])
            elif event["event"] == "warning":
                self._tell("warn", event["text"])
            elif event["event"] == "done":
                self._tell("done", job)
            elif event["event"] == "failed":
                self._bury(job, event)

    def _bury(self, job: Job, event: Mapping[str, Any]) -> None:
        self.failed.append(job)
        self._tell("failed", job, event["error"])
        if event.get("died"):
            # It could not leave a word itself.
            with Recorder(job.path) as recorder:
                if recorder.header_written:
                    recorder.write_failure(event["error"], "")
