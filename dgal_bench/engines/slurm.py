"""The Slurm engine: runs are elements of job arrays; each writes its own results file, and its events into another."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgal_bench.config.schema import parse_positive
from dgal_bench.core.errors import ConfigError, choose
from dgal_bench.engines.base import Event, SynchronizedListener, job_message
from dgal_bench.engines.local import count_lanes
from dgal_bench.engines.process import FINAL_EVENTS, ForkServers, worker_environment
from dgal_bench.engines.queue import RunQueue
from dgal_bench.engines.sweep import PlannedRun, SweepSettings

PARALLEL = 256
"""Runs that are submitted at once if ``jobs`` is not given."""

_TIME = "1-00:00:00"  # Slurm's default may be minutes, submitit's is 5
_ASK_SECONDS = 30.0


class SlurmQueue:
    """This user's jobs that have not ended, by one ``squeue`` for all; works without Slurm's accounting."""

    def __init__(self) -> None:
        self._asked_at = -math.inf
        self._job_ids: set[str] | None = None

    def has_left(self, job_id: str, submitted: float) -> bool:
        """Whether a job submitted then (monotonic clock) has left the queue; False if squeue gives no answer."""
        if time.monotonic() - self._asked_at > _ASK_SECONDS:
            self._job_ids, self._asked_at = self._ask(), time.monotonic()
        listed = self._job_ids is None or job_id in self._job_ids
        return submitted < self._asked_at - _ASK_SECONDS and not listed

    @staticmethod
    def _ask() -> set[str] | None:
        words = ["squeue", "--all", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i"]
        env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
        try:
            answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=_ASK_SECONDS, env=env)
        except (subprocess.SubprocessError, OSError):
            return None
        return {line.strip() for line in answer.stdout.splitlines()}


def job_parameters(kind: str, jobs: Sequence[PlannedRun], settings: SweepSettings) -> dict[str, Any]:
    """Parameters for submitit's AutoExecutor; raises ConfigError for a wrong value.

    ``kind``: ``run``, or ``setup``, which may use more cores and GPUs.
    """
    slurm, share, threads = settings.slurm, settings.gpus_per_cell, max((job.config.threads for job in jobs), default=1)
    if kind == "setup":
        threads = max(threads, *(job.config.representation.threads or 1 for job in jobs), 1)
        share = max(share, *(job.config.trainer.devices for job in jobs), 1)
    parameters: dict[str, Any] = {
        "timeout_min": parse_minutes(slurm.get("time", _TIME)),
        "cpus_per_task": threads,
        "slurm_array_parallelism": parallel_runs(jobs, settings),
        **{f"slurm_{name}": slurm[name] for name in ("partition", "account", "qos", "constraint") if name in slurm},
    }
    if settings.gpus and any(job.config.device != "cpu" for job in jobs):
        parameters["gpus_per_node"] = math.ceil(share)
    if "mem_gb" in slurm:
        parameters["mem_gb"] = parse_positive("slurm.mem_gb", slurm["mem_gb"], "a number of gigabytes")
    if slurm.get("cluster") == "local":
        for key, is_set in (("slurm.setup=", "setup" in slurm), ("gpus=", bool(settings.gpus))):
            if is_set:
                raise ConfigError(f"{key} is for nodes of a cluster: slurm.cluster=local starts processes on this one")
        return parameters
    # Not every Slurm gives a step its job's number of cores. The run queue, not Slurm, tries a preempted job again.
    parameters["slurm_srun_args"] = [f"--cpus-per-task={threads}"]
    parameters["slurm_additional_parameters"] = {"no-requeue": True}
    if "setup" in slurm:
        parameters["slurm_setup"] = [slurm["setup"]]
    return parameters


def parallel_runs(jobs: Sequence[PlannedRun], settings: SweepSettings) -> int:
    """The most runs that execute at once."""
    if settings.slurm.get("cluster") == "local":
        return count_lanes(jobs, settings, 0)
    most = settings.jobs or PARALLEL
    return max(1, min(most, settings.gpus // math.ceil(settings.gpus_per_cell))) if settings.gpus else most


def parse_minutes(text: str) -> int:
    """Minutes of a time in Slurm's notations: minutes, minutes:seconds, hours:minutes:seconds, days before a dash."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ConfigError(f"slurm.time={text}: use minutes, H:MM:SS or D-HH:MM:SS")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    # With days the first number is hours; without, two numbers are minutes and seconds.
    scale = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    seconds = int(days or 0) * 86400 + sum(n * s for n, s in zip(numbers, scale, strict=False))
    return max(1, math.ceil(seconds / 60))


def run_relayed(job: Mapping[str, Any], environment: Mapping[str, str], events: str) -> None:
    """What a Slurm job executes: a worker process in that environment, whose events go into the file ``events``."""
    with (
        closing(ForkServers()) as servers,
        closing(servers.fit(None, environment)) as worker,
        Path(events).open("a") as file,
    ):
        for event in worker.run(job):
            file.write(json.dumps(event) + "\n")
            file.flush()
        os.fsync(file.fileno())


class EventFile:
    """Reads a growing file of events."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def __call__(self) -> Iterator[Event]:
        """The events since the last call."""
        try:  # open it instead of asking its size: over NFS the size may be a minute old
            with self.path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return  # the job waits in a queue
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            if (event := _parsed(line)) is not None:
                yield event


def _parsed(line: bytes) -> Event | None:
    """None for a torn or empty line."""
    try:
        event: Event = json.loads(line)
    except ValueError:
        return None
    return event


_SCANCEL_SECONDS = 3.0
ARRAY_SIZE = 1000
"""The most elements of one array: Slurm's default limit is 1001."""

_LOOK_AGAIN_SECONDS = {"slurm": 2.0, "local": 0.2}
_GRACE_SECONDS = {"slurm": 10.0, "local": 0.5}  # until an ended job's last events are visible over NFS
_SUBMIT_AGAIN_SECONDS = 60.0


@dataclass(eq=False)
class SlurmRun:
    """A submitted job and its events; ``ended``: when it was first seen to have ended."""

    job: PlannedRun
    handle: Any
    events: EventFile
    submitted: float
    ended: float = field(default=math.inf)


class SlurmEngine:
    """Every attempt at a run is a new job; the run queue, not Slurm, decides about another attempt.

    Raises:
        ConfigError: submitit or Slurm is missing, or a setting is wrong.
    """

    def __init__(self, jobs: Sequence[PlannedRun], settings: SweepSettings, notify: SynchronizedListener) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("engine=slurm needs submitit: pip install 'dgal-bench[slurm]'") from error
        self._cluster = settings.slurm.get("cluster", "slurm")
        choose(_LOOK_AGAIN_SECONDS, self._cluster, "slurm.cluster")
        missing = [name for name in ("sbatch", "srun", "squeue", "scancel") if not shutil.which(name)]
        if self._cluster == "slurm" and missing:
            raise ConfigError(
                f"engine=slurm needs Slurm's {missing[0]}: run it on a login node, or slurm.cluster=local to try the "
                "command out"
            )
        self._settings, self._notify = settings, notify
        self._folder = Path(settings.slurm.get("folder", settings.results / "slurm")).absolute()
        self._submitted: list[SlurmRun] = []
        self._queue = SlurmQueue()
        self._name = f"dgal-bench-{uuid.uuid4().hex[:8]}"
        self._parameters = {
            kind: job_parameters(kind, jobs, settings) | {"name": self._name} for kind in ("setup", "run")
        }
        self._parallel = parallel_runs(jobs, settings)
        self._next_submission = 0.0  # not before, after a refusal
        self._uncertain = False  # whether Slurm may have jobs that are not in _submitted
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"slurm.folder={self._folder} cannot be a folder: {error.strerror}") from error
        self._executor = submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)

    def ask(self, kind: str, job: PlannedRun) -> Iterator[Event]:
        self._submit(kind, [job])
        (attempt,) = self._submitted
        while self._submitted:
            time.sleep(_LOOK_AGAIN_SECONDS[self._cluster])
            for event in self._events(attempt):
                if event["event"] in FINAL_EVENTS:
                    self._remove(attempt)
                yield event

    def run(self, run_queue: RunQueue) -> None:
        while not run_queue.over:
            jobs = self._next(run_queue)
            try:
                self._submit("run", jobs)
            except ConfigError as error:  # a limit of the site, or a busy controller
                if not self._submitted:
                    raise
                run_queue.put_back(jobs)
                self._next_submission = time.monotonic() + _SUBMIT_AGAIN_SECONDS
                self._notify("warn", f"{error}; it is tried again as long as other jobs run")
            time.sleep(_LOOK_AGAIN_SECONDS[self._cluster])
            for attempt in list(self._submitted):
                for event in self._events(attempt):
                    if event["event"] in FINAL_EVENTS:
                        self._remove(attempt)
                    run_queue.on_event(attempt.job, event)

    def close(self) -> None:
        """Cancel all jobs: by name, since a stop may come before Slurm has given their numbers."""
        if self._cluster == "slurm" and (self._submitted or self._uncertain):
            self._cancel()
        elif self._submitted:
            for attempt in self._submitted:
                attempt.handle.cancel(check=False)
            _wait_for([attempt.handle for attempt in self._submitted])
        for attempt in list(self._submitted):
            self._remove(attempt)

    def _cancel(self) -> None:
        """Call scancel, and wait for it only briefly: Slurm may be slow."""
        words = ["scancel", f"--name={self._name}", f"--user={os.getuid()}"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(_SCANCEL_SECONDS)
        except subprocess.TimeoutExpired:
            self._notify("warn", f"scancel has not answered: see that jobs named {self._name} are gone")

    def _next(self, run_queue: RunQueue) -> list[PlannedRun]:
        """Runs for one array; never more submitted than may execute at once."""
        jobs: list[PlannedRun] = []
        if time.monotonic() >= self._next_submission:
            # A local process takes 0.2 s to start, and signals are deferred meanwhile: one at a time.
            room = min(self._parallel - len(self._submitted), ARRAY_SIZE if self._cluster == "slurm" else 1)
            while len(jobs) < room and (job := run_queue.take()) is not None:
                jobs.append(job)
        return jobs

    def _submit(self, kind: str, jobs: Sequence[PlannedRun]) -> None:
        """Submit jobs as one array; raises ConfigError if Slurm refuses them."""
        if not jobs:
            return
        files = [EventFile(self._folder / f"{uuid.uuid4().hex}.events") for _ in jobs]
        messages = [job_message(kind, job, self._settings) for job in jobs]
        environments = [worker_environment(job.config, None if self._settings.gpus else "") for job in jobs]
        self._executor.update_parameters(**self._parameters["run" if kind == "run" else "setup"])
        try:
            with defer_signals(), _stderr_in(self._folder / "local.log" if self._cluster == "local" else None):
                self._uncertain = True
                handles = self._executor.map_array(
                    run_relayed, messages, environments, [str(file.path) for file in files]
                )
                now = time.monotonic()
                self._submitted += [SlurmRun(*parts, now) for parts in zip(jobs, handles, files, strict=True)]
                self._uncertain = False
        except OSError as error:
            raise ConfigError(f"slurm.folder={self._folder} cannot be written: {error.strerror}") from error
        except Exception as error:
            if not isinstance(error.__cause__, subprocess.CalledProcessError):
                raise
            raise ConfigError(f"Slurm refuses the job: {last_line(str(error))}") from error

    def _events(self, attempt: SlurmRun) -> Iterator[Event]:
        """New events of a job; if it ended without a final one, its worker has died."""
        grace_over = attempt.ended < time.monotonic() - _GRACE_SECONDS[self._cluster]
        for event in attempt.events():
            attempt.ended = math.inf  # it runs, whatever a queue says
            yield event
            if event["event"] in FINAL_EVENTS:
                return
        if grace_over and attempt.ended < math.inf:
            log = last_line(attempt.handle.stderr() or "")
            how = "is gone" if self._cluster == "slurm" else f"ended as {attempt.handle.state}"
            error = f"job {attempt.handle.job_id} {how}" + (f": {log}" if log else "")
            yield {"event": "failed", "error": error, "exit_code": 1, "stop": False, "died": True}
        elif attempt.ended == math.inf and self._has_ended(attempt):
            attempt.ended = time.monotonic()

    def _has_ended(self, attempt: SlurmRun) -> bool:
        """A job that exits normally leaves its result pickle; a killed one is only absent from the queue."""
        if self._cluster == "local":
            return bool(attempt.handle.done())
        handle = attempt.handle
        return handle.paths.result_pickle.exists() or self._queue.has_left(handle.job_id, attempt.submitted)

    def _remove(self, attempt: SlurmRun) -> None:
        self._submitted.remove(attempt)
        attempt.events.path.unlink(missing_ok=True)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Deliver Ctrl-C and SIGTERM at the end of the block: a job can be cancelled only once it is registered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals: list[int] = []
    stops = (signal.SIGINT, signal.SIGTERM)
    handlers = {stop: signal.signal(stop, lambda number, _: signals.append(number)) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
        for number in signals[:1]:
            signal.raise_signal(number)


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


@contextmanager
def _stderr_in(path: Path | None) -> Iterator[None]:
    """Processes started in this block write their stderr into a file instead of the terminal."""
    if path is None:
        yield
        return
    terminal = os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _wait_for(handles: Sequence[Any], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not all(handle.done() for handle in handles) and time.monotonic() < deadline:
        time.sleep(0.05)
