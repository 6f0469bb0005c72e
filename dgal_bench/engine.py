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

from dgal_bench.config import RunConfig, check_budget, to_dict
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
    def warn(self, text: str) -> None: ...


class Worker:
    """A process with its own environment that runs one job at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dgal_bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=os.environ | environment,
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
        yield {"event": "failed", "error": self._epitaph(), "exit_code": 1, "stop": False, "died": True}

    def _epitaph(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        last = self._stderr.read().strip().rpartition("\n")[2]
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the worker process was {how}" + (f": {last}" if last else "")

    def close(self) -> None:
        """End the process, whatever it is doing; more than once does no harm."""
        self._process.kill()
        self._process.wait()
        self._stderr.close()


def environment(threads: int, device: str) -> dict[str, str]:
    """Set before torch, FAISS and BLAS are imported; the workspace setting is cuBLAS's condition for equal bits."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**dict.fromkeys(names, str(threads)), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **hidden}


def setup_environment(config: RunConfig) -> dict[str, str]:
    return environment(config.setup_threads, config.device)


def cell_environment(config: RunConfig) -> dict[str, str]:
    return environment(config.threads, config.device)


def execute(jobs: Sequence[Job], settings: Settings, listener: Listener) -> list[Job]:
    """Set every data set up on all cores, then run the cells on ``settings.jobs`` workers side by side.

    A failed cell is recorded and the others go on. The workers start first: their imports take 10 s, while set-up
    has work for one core at a time anyway.

    Returns:
        The cells that failed.

    Raises:
        UserError: data missing, a wrong setting, nothing that could be set up, or a cell that asks more of the data
            than there is.
    """
    first = jobs[0].config
    setup_worker = Worker(setup_environment(first))
    workers = [Worker(cell_environment(first)) for _ in jobs[: settings.jobs]]
    try:
        broken = set_up(jobs, settings, listener, setup_worker)
        setup_worker.close()
        for job in broken:
            listener.failed(job, broken[job])
        return [*broken, *run_cells([job for job in jobs if job not in broken], settings, listener, workers)]
    finally:
        for worker in (setup_worker, *workers):
            worker.close()


def set_up(jobs: Sequence[Job], settings: Settings, listener: Listener, worker: Worker) -> dict[Job, str]:
    """Make (or find) the representation and graph of every data set before any cell starts.

    Returns:
        The cells that cannot run, with the error: their representation collapsed, or its making crashed.
    """
    broken: dict[Job, str] = {}
    last_error = UserError("")
    for key in dict.fromkeys(job.setup_key for job in jobs):
        sharing = [job for job in jobs if job.setup_key == key]
        wanted = setup_environment(sharing[0].config)
        own = worker if worker.environment == wanted else Worker(wanted)
        try:
            event = _set_up_one(sharing[0], settings, listener, own)
        finally:
            if own is not worker:
                own.close()
        if event["event"] == "ready":
            for job in sharing:
                check_budget(job.config, event["points"])
            continue
        last_error = UserError(event["error"])
        last_error.exit_code = event["exit_code"]
        if event["stop"]:
            raise last_error
        broken |= dict.fromkeys(sharing, event["error"])
    if len(broken) == len(jobs):
        raise last_error
    return broken


def _set_up_one(job: Job, settings: Settings, listener: Listener, worker: Worker) -> dict[str, Any]:
    """The last event of a set-up."""
    name = job.config.dataset.name
    listener.setting_up(name, "loading", 0, 1)
    event: dict[str, Any] = {}
    for event in worker.run(message("setup", job, settings, n_lanes=1)):
        if event["event"] == "progress":
            listener.setting_up(name, event["what"], event["n"], event["of"])
        elif event["event"] == "warning":
            listener.warn(event["text"])
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
    }


def run_cells(jobs: Sequence[Job], settings: Settings, listener: Listener, workers: Sequence[Worker]) -> list[Job]:
    """Run the cells, a thread for each worker; those that failed are returned."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    n_lanes = min(len(workers), len(jobs))
    lanes = [_Lane(waiting, settings, listener, worker, n_lanes) for worker in workers[:n_lanes]]
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

    _telling = threading.Lock()

    def __init__(
        self,
        waiting: "queue.SimpleQueue[Job]",
        settings: Settings,
        listener: Listener,
        worker: Worker,
        n_lanes: int,
    ) -> None:
        super().__init__(daemon=True)
        self.failed: list[Job] = []
        self.error: BaseException | None = None
        self._waiting, self._settings, self._listener = waiting, settings, listener
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
        wanted = cell_environment(job.config)
        if self._worker.environment != wanted:
            self._replace_worker(wanted)
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
            self._replace_worker(self._worker.environment)

    def _replace_worker(self, wanted: Mapping[str, str]) -> None:
        self._worker.close()
        self._worker = Worker(wanted)

    def _tell(self, what: str, *facts: Any) -> None:
        with self._telling:
            getattr(self._listener, what)(*facts)
