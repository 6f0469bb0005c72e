"""The Slurm engine: runs as elements of a job array, each of which writes its own file under lock and lease."""

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgal_bench.config.schema import parse_positive
from dgal_bench.core.errors import ConfigError, choose
from dgal_bench.engines.base import Event, SynchronizedListener, job_message
from dgal_bench.engines.local import count_lanes
from dgal_bench.engines.process import FINAL_EVENTS, WorkerProcess, worker_environment
from dgal_bench.engines.queue import RunQueue
from dgal_bench.engines.sweep import PlannedRun, SweepSettings

# What is asked of Slurm: a job's share of a node, and which jobs are still in its queue.


PARALLEL = 256
"""Runs that are submitted at once where ``jobs`` does not say."""

_TIME = "1-00:00:00"  # Slurm's own may be minutes, submitit's is five of them
_ASK_SECONDS = 30.0


class SlurmQueue:
    """This user's jobs that have not ended, asked of Slurm once for all; accounting need not be set up."""

    def __init__(self) -> None:
        self._asked = -math.inf
        self._there: set[str] | None = None

    def is_without(self, number: str, since: float) -> bool:
        """Whether a job that was submitted at ``since`` (of the monotonic clock) has left; False where nobody knows."""
        if time.monotonic() - self._asked > _ASK_SECONDS:
            self._there, self._asked = self._ask(), time.monotonic()
        return self._there is not None and since < self._asked - _ASK_SECONDS and number not in self._there

    @staticmethod
    def _ask() -> set[str] | None:
        words = ["squeue", "--all", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i"]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
        try:
            asked = subprocess.run(words, capture_output=True, text=True, check=True, timeout=_ASK_SECONDS, env=plain)
        except (subprocess.SubprocessError, OSError):
            return None
        return {line.strip() for line in asked.stdout.splitlines()}


def job_parameters(kind: str, jobs: Sequence[PlannedRun], settings: SweepSettings) -> dict[str, Any]:
    """Of a job, as submitit's AutoExecutor takes them; raises ConfigError for a value that cannot be.

    ``kind``: a ``cell``, or the ``setup``, which may use more of a machine.
    """
    slurm, share, threads = settings.slurm, settings.gpus_per_cell, max((job.config.threads for job in jobs), default=1)
    if kind == "setup":
        threads = max(threads, *(job.config.representation.threads or 1 for job in jobs), 1)
        share = max(share, *(job.config.trainer.devices for job in jobs), 1)
    asked: dict[str, Any] = {
        "timeout_min": parse_minutes(slurm.get("time", _TIME)),
        "cpus_per_task": threads,
        "slurm_array_parallelism": parallel_runs(jobs, settings),
        **{f"slurm_{name}": slurm[name] for name in ("partition", "account", "qos", "constraint") if name in slurm},
    }
    if settings.gpus and any(job.config.device != "cpu" for job in jobs):
        asked["gpus_per_node"] = math.ceil(share)
    if "mem_gb" in slurm:
        asked["mem_gb"] = parse_positive("slurm.mem_gb", slurm["mem_gb"], "a number of gigabytes")
    if slurm.get("cluster") == "local":
        for key, given in (("slurm.setup=", "setup" in slurm), ("gpus=", bool(settings.gpus))):
            if given:
                raise ConfigError(f"{key} is for nodes of a cluster: slurm.cluster=local starts processes on this one")
        return asked
    # A step is not told by every Slurm how many cores its job has; a job that was preempted is the run queue's.
    asked["slurm_srun_args"] = [f"--cpus-per-task={threads}"]
    asked["slurm_additional_parameters"] = {"no-requeue": True}
    if "setup" in slurm:
        asked["slurm_setup"] = [slurm["setup"]]
    return asked


def parallel_runs(jobs: Sequence[PlannedRun], settings: SweepSettings) -> int:
    """How many runs run at once at most."""
    if settings.slurm.get("cluster") == "local":
        return count_lanes(jobs, settings, 0)
    most = settings.jobs or PARALLEL
    return max(1, min(most, settings.gpus // math.ceil(settings.gpus_per_cell))) if settings.gpus else most


def parse_minutes(text: str) -> int:
    """Slurm's ways to write a time: minutes, minutes:seconds, hours:minutes:seconds, and days before a dash."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise ConfigError(f"slurm.time={text}: use minutes, H:MM:SS or D-HH:MM:SS")
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    # With days the first number is hours; without, two numbers are minutes and seconds.
    scale = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    seconds = int(days or 0) * 86400 + sum(n * s for n, s in zip(numbers, scale, strict=False))
    return max(1, math.ceil(seconds / 60))


# What a Slurm job runs: a worker process of its own, whose events go into a file that the command reads.


def run_relayed(job: Mapping[str, Any], environment: Mapping[str, str], events: str) -> None:
    """Do a job in a fresh process of that environment, which is set before torch is imported there."""
    worker = WorkerProcess(environment)
    try:
        with Path(events).open("a") as file:
            for event in worker.run(job):
                file.write(json.dumps(event) + "\n")
                file.flush()
            os.fsync(file.fileno())
    finally:
        worker.close()


class EventFile:
    """A file of events as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def __call__(self) -> Iterator[Event]:
        """The events that have come since the last call."""
        try:  # opened, not looked at: NFS says a size of up to a minute ago
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return  # the job waits in a queue
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            if (event := _parsed(line)) is not None:
                yield event


def _parsed(line: bytes) -> Event | None:
    """None: a torn line, or none at all."""
    try:
        event: Event = json.loads(line)
    except ValueError:
        return None
    return event


_SCANCEL_SECONDS = 3.0
ARRAY_SIZE = 1000
"""Elements of one array at most: Slurm's own limit, unless a site has set another, is 1001."""

_LOOK_AGAIN_SECONDS = {"slurm": 2.0, "local": 0.2}
_GRACE_SECONDS = {"slurm": 10.0, "local": 0.5}  # for what a job that is over has written to be seen over NFS
_SUBMIT_AGAIN_SECONDS = 60.0


@dataclass(eq=False)
class SlurmRun:
    """A submitted job, and what it has said so far; ``over``: when it was first seen to have ended."""

    job: PlannedRun
    handle: Any
    tail: EventFile
    since: float
    over: float = field(default=math.inf)


class SlurmEngine:
    """Every try of a run is a job of its own, which Slurm does not start again: that is for the run queue to say.

    Raises:
        ConfigError: no submitit, no Slurm, or a setting that it does not know.
    """

    def __init__(self, jobs: Sequence[PlannedRun], settings: SweepSettings, tell: SynchronizedListener) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("engine=slurm needs submitit: pip install 'dgal-bench[slurm]'") from error
        self._cluster = settings.slurm.get("cluster", "slurm")
        choose(_LOOK_AGAIN_SECONDS, self._cluster, "slurm.cluster")
        lacking = [name for name in ("sbatch", "srun", "squeue", "scancel") if not shutil.which(name)]
        if self._cluster == "slurm" and lacking:
            raise ConfigError(
                f"engine=slurm needs Slurm's {lacking[0]}: run it on a login node, or slurm.cluster=local to try the "
                "command out"
            )
        self._settings, self._tell = settings, tell
        self._folder = Path(settings.slurm.get("folder", settings.results / "slurm")).absolute()
        self._flights: list[SlurmRun] = []
        self._queue = SlurmQueue()
        self._name = f"dgal-bench-{uuid.uuid4().hex[:8]}"
        self._wanted = {kind: job_parameters(kind, jobs, settings) | {"name": self._name} for kind in ("setup", "run")}
        self._parallel = parallel_runs(jobs, settings)
        self._not_before = 0.0  # to submit anything, after a refusal
        self._unsure = False  # whether Slurm has a job that is in no flight
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"slurm.folder={self._folder} cannot be a folder: {error.strerror}") from error
        self._executor = submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)

    def ask(self, kind: str, job: PlannedRun) -> Iterator[Event]:
        self._submit(kind, [job])
        (flight,) = self._flights
        while self._flights:
            time.sleep(_LOOK_AGAIN_SECONDS[self._cluster])
            for event in self._said(flight):
                if event["event"] in FINAL_EVENTS:
                    self._land(flight)
                yield event

    def run(self, run_queue: RunQueue) -> None:
        while not run_queue.over:
            jobs = self._next(run_queue)
            try:
                self._submit("run", jobs)
            except ConfigError as error:  # a site's limit, or a controller too busy to answer
                if not self._flights:
                    raise
                run_queue.put_back(jobs)
                self._not_before = time.monotonic() + _SUBMIT_AGAIN_SECONDS
                self._tell("warn", f"{error}; it is tried again as long as other jobs run")
            time.sleep(_LOOK_AGAIN_SECONDS[self._cluster])
            for flight in list(self._flights):
                for event in self._said(flight):
                    if event["event"] in FINAL_EVENTS:
                        self._land(flight)
                    run_queue.on_event(flight.job, event)

    def close(self) -> None:
        """Cancel what waits or runs: by name, since a stop may have come before Slurm said its number."""
        if self._cluster == "slurm" and (self._flights or self._unsure):
            self._cancel()
        elif self._flights:
            for flight in self._flights:
                flight.handle.cancel(check=False)
            _wait_for([flight.handle for flight in self._flights])
        for flight in list(self._flights):
            self._land(flight)

    def _cancel(self) -> None:
        """Ask Slurm, which may be slow to answer, and go."""
        words = ["scancel", f"--name={self._name}", f"--user={os.getuid()}"]
        ask = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ask.wait(_SCANCEL_SECONDS)
        except subprocess.TimeoutExpired:
            self._tell("warn", f"scancel has not answered: see that jobs named {self._name} are gone")

    def _next(self, run_queue: RunQueue) -> list[PlannedRun]:
        """Runs for one array; never more under way than may run at once."""
        jobs: list[PlannedRun] = []
        if time.monotonic() >= self._not_before:
            # A process takes 0.2 s to start here, in which nobody hears a stop.
            room = min(self._parallel - len(self._flights), ARRAY_SIZE if self._cluster == "slurm" else 1)
            while len(jobs) < room and (job := run_queue.take()) is not None:
                jobs.append(job)
        return jobs

    def _submit(self, kind: str, jobs: Sequence[PlannedRun]) -> None:
        """Jobs as one array; raises ConfigError where Slurm does not take them."""
        if not jobs:
            return
        tails = [EventFile(self._folder / f"{uuid.uuid4().hex}.events") for _ in jobs]
        messages = [job_message(kind, job, self._settings) for job in jobs]
        environments = [worker_environment(job.config, None if self._settings.gpus else "") for job in jobs]
        self._executor.update_parameters(**self._wanted["run" if kind == "run" else "setup"])
        try:
            with defer_signals(), _stderr_in(self._folder / "local.log" if self._cluster == "local" else None):
                self._unsure = True
                handles = self._executor.map_array(
                    run_relayed, messages, environments, [str(tail.path) for tail in tails]
                )
                now = time.monotonic()
                self._flights += [SlurmRun(*one, now) for one in zip(jobs, handles, tails, strict=True)]
                self._unsure = False
        except OSError as error:
            raise ConfigError(f"slurm.folder={self._folder} cannot be written: {error.strerror}") from error
        except Exception as error:
            refused = isinstance(error.__cause__, subprocess.CalledProcessError)
            if not refused:
                raise
            raise ConfigError(f"Slurm refuses the job: {last_line(str(error))}") from error

    def _said(self, flight: SlurmRun) -> Iterator[Event]:
        """What a job has said since the last look, to its ending; one that is over without a word has died."""
        was_over = flight.over < time.monotonic() - _GRACE_SECONDS[self._cluster]
        for event in flight.tail():
            flight.over = math.inf  # it is there, whatever a queue says
            yield event
            if event["event"] in FINAL_EVENTS:
                return
        if was_over and flight.over < math.inf:
            log = last_line(flight.handle.stderr() or "")
            how = "is gone" if self._cluster == "slurm" else f"ended as {flight.handle.state}"
            error = f"job {flight.handle.job_id} {how}" + (f": {log}" if log else "")
            yield {"event": "failed", "error": error, "exit_code": 1, "stop": False, "died": True}
        elif flight.over == math.inf and self._is_over(flight):
            flight.over = time.monotonic()

    def _is_over(self, flight: SlurmRun) -> bool:
        """Whoever ends by himself is seen by the file that he leaves; who was ended from outside is in no queue."""
        if self._cluster == "local":
            return bool(flight.handle.done())
        return flight.handle.paths.result_pickle.exists() or self._queue.is_without(flight.handle.job_id, flight.since)

    def _land(self, flight: SlurmRun) -> None:
        self._flights.remove(flight)
        flight.tail.path.unlink(missing_ok=True)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM that come in here are heard at its end: what is not known cannot be cancelled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {one: signal.signal(one, lambda number, _: came.append(number)) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


@contextmanager
def _stderr_in(path: Path | None) -> Iterator[None]:
    """Processes that are started in here say their errors in a file, and leave the terminal alone."""
    if path is None:
        yield
        return
    kept = os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _wait_for(handles: Sequence[Any], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not all(handle.done() for handle in handles) and time.monotonic() < deadline:
        time.sleep(0.05)
