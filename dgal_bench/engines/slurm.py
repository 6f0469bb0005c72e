"""The Slurm engine: cells as elements of a job array, each of which writes its own file under lock and lease."""

import math
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgal_bench.engines.base import Event, Teller, message
from dgal_bench.engines.docket import Docket
from dgal_bench.engines.local import lanes
from dgal_bench.engines.relay import Tail, relay
from dgal_bench.errors import ConfigError, choose
from dgal_bench.process import ENDINGS, environment, visible_gpus
from dgal_bench.sweep import Job, Settings

_SCANCEL_SECONDS = 3.0
ARRAY_SIZE = 1000
"""Elements of one array at most: Slurm's own limit, unless a site has set another, is 1001."""

PARALLEL = 256
"""Elements that run at once where ``jobs`` does not say."""

_TIME = "1-00:00:00"  # Slurm's own may be minutes, submitit's is five of them
_LOOK_AGAIN_SECONDS = {"slurm": 2.0, "local": 0.2}
_ASK_SLURM_SECONDS = 30.0  # sacct, once for all jobs; whoever ends well is seen by the file that it leaves
_GRACE_SECONDS = {"slurm": 10.0, "local": 0.5}  # for what a job that is over has written to be seen over NFS


@dataclass(eq=False)
class Flight:
    """A submitted job, and what it has said so far; ``over``: when it was first seen to have ended."""

    job: Job
    handle: Any
    tail: Tail
    over: float = field(default=math.inf)


class Slurm:
    """Raises ConfigError: no submitit, no sbatch, or a setting that Slurm does not know."""

    def __init__(self, jobs: Sequence[Job], settings: Settings, tell: Teller) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("engine=slurm needs submitit: pip install 'dgal-bench[slurm]'") from error
        self._cluster = settings.slurm.get("cluster", "slurm")
        choose(_LOOK_AGAIN_SECONDS, self._cluster, "slurm.cluster")
        if self._cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
            raise ConfigError(
                "engine=slurm needs Slurm's sbatch: run it on a login node, or slurm.cluster=local to try the command "
                "out"
            )
        self._settings, self._tell = settings, tell
        self._folder = Path(settings.slurm.get("folder", settings.results / "slurm")).absolute()
        self._flights: list[Flight] = []
        self._asked = time.monotonic()
        wanted = parameters(jobs, settings)
        self._parallel = parallel(jobs, settings)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._executor = submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)
        self._executor.update_parameters(**wanted)

    def ask(self, kind: str, job: Job) -> Iterator[Event]:
        (flight,) = self._flights = self._submit(kind, [job])
        while self._flights:
            time.sleep(_LOOK_AGAIN_SECONDS[self._cluster])
            for event in self._said(flight):
                if event["event"] in ENDINGS:
                    self._land(flight)
                yield event

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        docket = Docket(jobs, self._tell)
        while not docket.over:
            self._flights += self._submit("cell", self._next(docket))
            time.sleep(_LOOK_AGAIN_SECONDS[self._cluster])
            for flight in list(self._flights):
                for event in self._said(flight):
                    if event["event"] in ENDINGS:
                        self._land(flight)
                    docket.hear(flight.job, event)
        if docket.fatal is not None:
            raise docket.fatal
        return docket.failed

    def close(self) -> None:
        """Cancel what waits or runs: an array by the one number of its elements."""
        if self._cluster == "slurm" and self._flights:
            numbers = sorted({flight.handle.job_id.partition("_")[0] for flight in self._flights})
            self._cancel(numbers)
        elif self._flights:
            for flight in self._flights:
                flight.handle.cancel(check=False)
            _wait_for([flight.handle for flight in self._flights])
        for flight in list(self._flights):
            self._land(flight)

    def _cancel(self, numbers: Sequence[str]) -> None:
        """Ask Slurm, which may be slow to answer, and go."""
        ask = subprocess.Popen(["scancel", *numbers], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ask.wait(_SCANCEL_SECONDS)
        except subprocess.TimeoutExpired:
            self._tell("warn", f"scancel has not answered: see that jobs {', '.join(numbers)} are gone")

    def _next(self, docket: Docket) -> list[Job]:
        """Cells for one array; never more under way than may run at once, except in the one that waits in Slurm."""
        at_once = self._cluster == "local" or bool(self._flights)
        room = self._parallel - len(self._flights) if at_once else ARRAY_SIZE
        jobs: list[Job] = []
        while len(jobs) < room and (job := docket.take()) is not None:
            jobs.append(job)
        return jobs

    def _submit(self, kind: str, jobs: Sequence[Job]) -> list[Flight]:
        """Jobs as one array; raises ConfigError where Slurm does not take them."""
        if not jobs:
            return []
        tails = [Tail(self._folder / f"{uuid.uuid4().hex}.events") for _ in jobs]
        messages = [message(kind, job, self._settings) | places(self._settings) for job in jobs]
        environments = [environment(job.config) for job in jobs]
        try:
            with _stderr_in(self._folder / "local.log" if self._cluster == "local" else None):
                handles = self._executor.map_array(relay, messages, environments, [str(tail.path) for tail in tails])
        except Exception as error:
            refused = isinstance(error.__cause__, subprocess.CalledProcessError)
            if not refused:
                raise
            raise ConfigError(f"Slurm refuses the job: {last_line(str(error))}") from error
        return [Flight(*one) for one in zip(jobs, handles, tails, strict=True)]

    def _said(self, flight: Flight) -> Iterator[Event]:
        """What a job has said since the last look, to its ending; one that is over without a word has died."""
        was_over = flight.over < time.monotonic() - _GRACE_SECONDS[self._cluster]
        for event in flight.tail():
            yield event
            if event["event"] in ENDINGS:
                return
        if was_over:
            state, log = flight.handle.state, last_line(flight.handle.stderr() or "")
            error = f"job {flight.handle.job_id} ended as {state}" + (f": {log}" if log else "")
            yield {"event": "failed", "error": error, "exit_code": 1, "stop": False, "died": True}
        elif flight.over == math.inf and self._is_over(flight):
            flight.over = time.monotonic()

    def _is_over(self, flight: Flight) -> bool:
        force = time.monotonic() - self._asked > _ASK_SLURM_SECONDS
        if force:
            self._asked = time.monotonic()
        return bool(flight.handle.done(force_check=force))

    def _land(self, flight: Flight) -> None:
        self._flights.remove(flight)
        flight.tail.path.unlink(missing_ok=True)


def places(settings: Settings) -> dict[str, str]:
    """Jobs may start in another folder than the command."""
    return {"data": str(settings.data.absolute()), "cache": str(settings.cache.absolute())}


def parameters(jobs: Sequence[Job], settings: Settings) -> dict[str, Any]:
    """Of a job, as submitit's AutoExecutor takes them; raises ConfigError for a value that cannot be."""
    slurm = settings.slurm
    asked: dict[str, Any] = {
        "name": "dgal-bench",
        "timeout_min": minutes(slurm.get("time", _TIME)),
        "cpus_per_task": max((job.config.threads for job in jobs), default=1),
        "slurm_array_parallelism": parallel(jobs, settings),
        **{f"slurm_{name}": slurm[name] for name in ("partition", "account", "qos", "constraint") if name in slurm},
    }
    if settings.gpus and any(job.config.device != "cpu" for job in jobs):
        asked["gpus_per_node"] = math.ceil(settings.gpus_per_cell)
    if "mem_gb" in slurm:
        try:
            asked["mem_gb"] = float(slurm["mem_gb"])
        except ValueError as error:
            raise ConfigError(f"slurm.mem_gb={slurm['mem_gb']}: use a number of gigabytes") from error
    if "setup" in slurm:
        if slurm.get("cluster") == "local":
            raise ConfigError("slurm.setup= is for nodes of a cluster: slurm.cluster=local starts jobs from this shell")
        asked["slurm_setup"] = [slurm["setup"]]
    return asked


def parallel(jobs: Sequence[Job], settings: Settings) -> int:
    """How many cells run at once at most."""
    if settings.slurm.get("cluster") == "local":
        return lanes(jobs, settings, len(visible_gpus()))
    most = settings.jobs or PARALLEL
    return max(1, min(most, settings.gpus // math.ceil(settings.gpus_per_cell))) if settings.gpus else most


def minutes(text: str) -> int:
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
