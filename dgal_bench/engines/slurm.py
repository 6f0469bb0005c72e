"""The Slurm engine: cells as elements of a job array, each of which writes its own file under lock and lease."""

import math
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgal_bench.engines.base import Event, Teller, message
from dgal_bench.engines.docket import Docket
from dgal_bench.engines.relay import Tail, relay
from dgal_bench.engines.sbatch import Queue, parallel, parameters
from dgal_bench.errors import ConfigError, choose
from dgal_bench.process import ENDINGS, environment
from dgal_bench.sweep import Job, Settings

_SCANCEL_SECONDS = 3.0
ARRAY_SIZE = 1000
"""Elements of one array at most: Slurm's own limit, unless a site has set another, is 1001."""

_LOOK_AGAIN_SECONDS = {"slurm": 2.0, "local": 0.2}
_GRACE_SECONDS = {"slurm": 10.0, "local": 0.5}  # for what a job that is over has written to be seen over NFS
_SUBMIT_AGAIN_SECONDS = 60.0


@dataclass(eq=False)
class Flight:
    """A submitted job, and what it has said so far; ``over``: when it was first seen to have ended."""

    job: Job
    handle: Any
    tail: Tail
    since: float
    over: float = field(default=math.inf)


class Slurm:
    """Every try of a cell is a job of its own, which Slurm does not start again: that is for the docket to say.

    Raises:
        ConfigError: no submitit, no Slurm, or a setting that it does not know.
    """

    def __init__(self, jobs: Sequence[Job], settings: Settings, tell: Teller) -> None:
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
        self._flights: list[Flight] = []
        self._queue = Queue()
        self._name = f"dgal-bench-{uuid.uuid4().hex[:8]}"
        self._wanted = {kind: parameters(kind, jobs, settings) | {"name": self._name} for kind in ("setup", "cell")}
        self._parallel = parallel(jobs, settings)
        self._not_before = 0.0  # to submit anything, after a refusal
        self._unsure = False  # whether Slurm has a job that is in no flight
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"slurm.folder={self._folder} cannot be a folder: {error.strerror}") from error
        self._executor = submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)

    def ask(self, kind: str, job: Job) -> Iterator[Event]:
        self._submit(kind, [job])
        (flight,) = self._flights
        while self._flights:
            time.sleep(_LOOK_AGAIN_SECONDS[self._cluster])
            for event in self._said(flight):
                if event["event"] in ENDINGS:
                    self._land(flight)
                yield event

    def run(self, docket: Docket) -> None:
        while not docket.over:
            jobs = self._next(docket)
            try:
                self._submit("cell", jobs)
            except ConfigError as error:  # a site's limit, or a controller too busy to answer
                if not self._flights:
                    raise
                docket.put_back(jobs)
                self._not_before = time.monotonic() + _SUBMIT_AGAIN_SECONDS
                self._tell("warn", f"{error}; it is tried again as long as other jobs run")
            time.sleep(_LOOK_AGAIN_SECONDS[self._cluster])
            for flight in list(self._flights):
                for event in self._said(flight):
                    if event["event"] in ENDINGS:
                        self._land(flight)
                    docket.hear(flight.job, event)

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

    def _next(self, docket: Docket) -> list[Job]:
        """Cells for one array; never more under way than may run at once."""
        jobs: list[Job] = []
        if time.monotonic() >= self._not_before:
            # A process takes 0.2 s to start here, in which nobody hears a stop.
            room = min(self._parallel - len(self._flights), ARRAY_SIZE if self._cluster == "slurm" else 1)
            while len(jobs) < room and (job := docket.take()) is not None:
                jobs.append(job)
        return jobs

    def _submit(self, kind: str, jobs: Sequence[Job]) -> None:
        """Jobs as one array; raises ConfigError where Slurm does not take them."""
        if not jobs:
            return
        tails = [Tail(self._folder / f"{uuid.uuid4().hex}.events") for _ in jobs]
        messages = [message(kind, job, self._settings) for job in jobs]
        environments = [environment(job.config, None if self._settings.gpus else "") for job in jobs]
        self._executor.update_parameters(**self._wanted["cell" if kind == "cell" else "setup"])
        try:
            with held_back(), _stderr_in(self._folder / "local.log" if self._cluster == "local" else None):
                self._unsure = True
                handles = self._executor.map_array(relay, messages, environments, [str(tail.path) for tail in tails])
                now = time.monotonic()
                self._flights += [Flight(*one, now) for one in zip(jobs, handles, tails, strict=True)]
                self._unsure = False
        except OSError as error:
            raise ConfigError(f"slurm.folder={self._folder} cannot be written: {error.strerror}") from error
        except Exception as error:
            refused = isinstance(error.__cause__, subprocess.CalledProcessError)
            if not refused:
                raise
            raise ConfigError(f"Slurm refuses the job: {last_line(str(error))}") from error

    def _said(self, flight: Flight) -> Iterator[Event]:
        """What a job has said since the last look, to its ending; one that is over without a word has died."""
        was_over = flight.over < time.monotonic() - _GRACE_SECONDS[self._cluster]
        for event in flight.tail():
            flight.over = math.inf  # it is there, whatever a queue says
            yield event
            if event["event"] in ENDINGS:
                return
        if was_over and flight.over < math.inf:
            log = last_line(flight.handle.stderr() or "")
            how = "is gone" if self._cluster == "slurm" else f"ended as {flight.handle.state}"
            error = f"job {flight.handle.job_id} {how}" + (f": {log}" if log else "")
            yield {"event": "failed", "error": error, "exit_code": 1, "stop": False, "died": True}
        elif flight.over == math.inf and self._is_over(flight):
            flight.over = time.monotonic()

    def _is_over(self, flight: Flight) -> bool:
        """Whoever ends by himself is seen by the file that he leaves; who was ended from outside is in no queue."""
        if self._cluster == "local":
            return bool(flight.handle.done())
        return flight.handle.paths.result_pickle.exists() or self._queue.is_without(flight.handle.job_id, flight.since)

    def _land(self, flight: Flight) -> None:
        self._flights.remove(flight)
        flight.tail.path.unlink(missing_ok=True)


@contextmanager
def held_back() -> Iterator[None]:
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
