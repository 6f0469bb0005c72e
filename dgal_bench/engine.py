"""The local engine: worker processes side by side run cells. The results folder is the only truth."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from dgal_bench.config import check_budget, to_dict
from dgal_bench.errors import UserError
from dgal_bench.record import Recorder
from dgal_bench.sweep import Job, Settings


class Listener(Protocol):
    """Who is told how a sweep goes: called from several threads, one call at a time."""

    def setting_up(self, name: str, what: str, done: int, of: int) -> None: ...
    def begun(self, job: Job) -> None: ...
    def round(self, job: Job, accuracy: float) -> None: ...
    def done(self, job: Job) -> None: ...
    def failed(self, job: Job, error: str) -> None: ...


class Worker:
    """A process with its own thread count that runs one job at a time."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dgal_bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=os.environ | worker_environment(threads),
        )

    def run(self, job: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """Send a job; yield its events up to and with the last: ready, done or failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                event = json.loads(line)
                yield event
                if event["event"] in ("ready", "done", "failed"):
                    return
        except BrokenPipeError:
            pass
        yield {"event": "failed", "error": self._epitaph(), "exit_code": 1, "died": True}

    def _epitaph(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        last = self._stderr.read().strip().rpartition("\n")[2]
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the worker process was {how}" + (f": {last}" if last else "")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()


def worker_environment(threads: int) -> dict[str, str]:
    """Set before torch, FAISS and BLAS are imported; the workspace setting is cuBLAS's condition for equal bits."""
    count = str(threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {**dict.fromkeys(names, count), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}


def execute(jobs: Sequence[Job], settings: Settings, listener: Listener) -> list[Job]:
    """Set every data set up on all cores, then run the cells on ``settings.jobs`` workers side by side.

    A failed cell is recorded and the others go on. The workers start first: their imports take 10 s, while set-up
    has work for one core at a time anyway.

    Returns:
        The cells that failed.

    Raises:
        UserError: data missing, a collapsed representation, or a cell that asks more of the data than there is.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    first_setup = Worker(jobs[0].config.setup_threads)
    lanes = [_Lane(waiting, settings, listener, Worker(jobs[0].config.threads)) for _ in jobs[: settings.jobs]]
    try:
        set_up(jobs, settings, listener, first_setup)
        for lane in lanes:
            lane.start()
        for lane in lanes:
            while lane.is_alive():
                lane.join(0.2)  # with a timeout, so that Ctrl-C gets through
    finally:
        first_setup.close()
        for lane in lanes:
            lane.stop()
    for lane in lanes:
        if lane.error is not None:
            raise lane.error
    return [job for lane in lanes for job in lane.failed]


def set_up(jobs: Sequence[Job], settings: Settings, listener: Listener, worker: Worker) -> None:
    """Make (or find) the representation and graph of every data set before any cell starts."""
    for key in dict.fromkeys(job.setup_key for job in jobs):
        sharing = [job for job in jobs if job.setup_key == key]
        listener.setting_up(sharing[0].config.dataset.name, "loading", 0, 1)
        for event in worker.run(message("setup", sharing[0], settings)):
            if event["event"] == "progress":
                listener.setting_up(sharing[0].config.dataset.name, event["what"], event["n"], event["of"])
            elif event["event"] == "failed":
                raise _as_error(event)
            else:
                for job in sharing:
                    check_budget(job.config, event["points"])


def _as_error(event: Mapping[str, Any]) -> UserError:
    error = UserError(event["error"])
    error.exit_code = event["exit_code"]
    return error


def message(kind: str, job: Job, settings: Settings) -> dict[str, Any]:
    """A job as a worker reads it."""
    return {
        "job": kind,
        "config": to_dict(job.config),
        "path": str(job.path),
        "setup_key": job.setup_key,
        "data": str(settings.data),
        "cache": str(settings.cache),
        "jobs": settings.jobs,
        "resume_anyway": settings.resume_anyway,
    }


class _Lane(threading.Thread):
    """Takes cells off the queue, one worker at a time, until none is left."""

    _telling = threading.Lock()

    def __init__(
        self, waiting: "queue.SimpleQueue[Job]", settings: Settings, listener: Listener, worker: Worker
    ) -> None:
        super().__init__(daemon=True)
        self.failed: list[Job] = []
        self.error: BaseException | None = None
        self._waiting, self._settings, self._listener = waiting, settings, listener
        self._worker: Worker | None = worker
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
        if self._worker is not None:
            self._worker.close()

    def _run_one(self, job: Job) -> None:
        if self._worker is None or self._worker.threads != job.config.threads:
            if self._worker is not None:
                self._worker.close()
            self._worker = Worker(job.config.threads)
        self._tell("begun", job)
        for event in self._worker.run(message("cell", job, self._settings)):
            if self._stopped:
                return
            if event["event"] == "round":
                self._tell("round", job, event["accuracy"])
            elif event["event"] == "done":
                self._tell("done", job)
            elif event["event"] == "failed":
                self._bury(job, event)

    def _bury(self, job: Job, event: Mapping[str, Any]) -> None:
        if event.get("died"):
            # It could not leave a word itself.
            with Recorder(job.path) as recorder:
                if recorder.header_written:
                    recorder.write_failure(event["error"], "")
            self._worker = None
        self.failed.append(job)
        self._tell("failed", job, event["error"])

    def _tell(self, what: str, *facts: Any) -> None:
        with self._telling:
            getattr(self._listener, what)(*facts)
