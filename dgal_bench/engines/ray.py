"""The Ray engine: runs as tasks on this machine or a cluster, whose rows stream to the driver, the only writer."""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dgal_bench.core.errors import ConfigError, ResultsError, innermost_error
from dgal_bench.core.files import LockHeldError
from dgal_bench.engines.base import Event, SynchronizedListener, job_message
from dgal_bench.engines.local import check_gpus, count_lanes
from dgal_bench.engines.process import FINAL_EVENTS, visible_gpus, worker_environment
from dgal_bench.engines.queue import MAX_DEATHS, RunQueue
from dgal_bench.engines.ray_transfer import EntryStore
from dgal_bench.engines.sweep import PlannedRun, SweepSettings
from dgal_bench.results.writer import FileWriter, UnwritableError

# What a Ray has to give: how many runs fit, and what each of them asks for.


_COUNT_AGAIN_SECONDS = 5.0
_OVERSUBSCRIPTION = 2  # of a cluster: it is never idle, and grows where it can


class Capacity:
    """Whether runs run on GPUs is found once: when the last GPU of a cluster goes they wait for another."""

    def __init__(
        self, ray: ModuleType, jobs: Sequence[PlannedRun], settings: SweepSettings, tell: SynchronizedListener
    ) -> None:
        self._ray, self._settings, self._tell = ray, settings, tell
        self._threads = max(job.config.threads for job in jobs)
        self._devices = max(job.config.trainer.devices for job in jobs)
        self._counted, self._has = -math.inf, dict[str, float]()
        self._gpus = settings.gpus != 0 and self._most("GPU") > 0 and any(job.config.device != "cpu" for job in jobs)

    def lacking(self) -> str:
        """What is asked of one machine and no machine has, for which Ray would wait; "" where all can be had."""
        if self._settings.gpus and not self._most("GPU"):
            return f"gpus={self._settings.gpus}, but no machine of this Ray has a GPU: leave it out"
        asked = [("threads", "CPU", float(self._threads))]
        if self._gpus:
            asked += [("gpus_per_cell", "GPU", self._settings.gpus_per_cell), ("trainer.devices", "GPU", self._devices)]
        for key, name, wanted in asked:
            if 0 < (most := self._most(name)) < wanted:
                return f"{key}={wanted:g}, but no machine of this Ray has more than {most:g} {name}s"
        return ""

    def runs(self) -> int:
        """How many may be under way on a cluster: as many as fit now, and some that wait there."""
        has = self._resources()
        fit = int(has.get("CPU", 0)) // self._threads
        if self._gpus:
            n_gpus = min(has.get("GPU", 0), self._settings.gpus or math.inf)
            if not n_gpus:
                self._tell("warn", "no machine of this Ray has a GPU any more: runs wait for one")
            fit = min(fit, int(n_gpus / self._settings.gpus_per_cell + 1e-9))
        return max(1, fit) if self._settings.gpus else fit + _OVERSUBSCRIPTION

    def on_gpu(self, job: PlannedRun) -> bool:
        return self._gpus and job.config.device != "cpu"

    def needs(self, job: PlannedRun, kind: str = "run") -> dict[str, Any]:
        """Of a task: its share of the machine, more of it in a ``setup``, and the environment of its process.

        Processes without a GPU go on to the next run of the same environment, imports and data in memory.
        """
        on_gpu, n_gpus = self.on_gpu(job), self._settings.gpus_per_cell
        if kind == "setup" and job.config.trainer.devices > 1:
            n_gpus = max(n_gpus, job.config.trainer.devices)
        return {
            "num_cpus": job.config.threads,
            "num_gpus": n_gpus if on_gpu else 0,
            "runtime_env": {"env_vars": worker_environment(job.config, None if on_gpu else "")},
        }

    def _resources(self) -> Mapping[str, float]:
        """What the cluster has altogether; it may grow and shrink."""
        if time.monotonic() - self._counted > _COUNT_AGAIN_SECONDS:
            self._counted, self._has = time.monotonic(), self._ray.cluster_resources()
        return self._has

    def _most(self, name: str) -> float:
        """Of a resource, on one machine."""
        return max((node["Resources"].get(name, 0) for node in self._ray.nodes() if node["Alive"]), default=0)


# Ray, started on this machine or found on a cluster, without its noise.


_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # half a screen for every worker that dies: we say it in a line
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what a task of no GPU sees is ours to say
}
_STORE_BYTES = 128 * 1024**2  # of a Ray of our own, through which only events pass
_ANSWER_SECONDS = 3.0


def connect(address: str | None, n_cpus: int, n_gpus: int | None) -> ModuleType:
    """The module ``ray``, connected: to the cluster at ``address``, or to one of its own with so much to give.

    ``n_gpus``: None: those that Ray finds.

    Raises:
        ConfigError: Ray is not installed, or no cluster of this Ray answers there.
    """
    os.environ |= _QUIET  # read when ray is first imported
    try:
        import ray
    except ImportError as error:
        raise ConfigError("engine=ray needs Ray: pip install 'dgal-bench[ray]'") from error
    quiet: dict[str, Any] = {
        "include_dashboard": None if address else False,
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    own: dict[str, Any] = {"num_cpus": n_cpus, "num_gpus": n_gpus, "object_store_memory": _STORE_BYTES}
    if address:
        _check(address)
        own.clear()
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **quiet, **own)
    except (SystemExit, ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        ray.shutdown()
        if main and isinstance(error, SystemExit) and not address:
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)  # it came while Ray's handler stood in for the command's
        said = "it is no Ray" if isinstance(error, SystemExit) else " ".join(str(error).split()) or "no answer"
        raise ConfigError(f"ray.address={address}: {said}" if address else f"Ray does not start: {said}") from error
    except BaseException:
        ray.shutdown()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    return ray


def _check(address: str) -> None:
    """Whether anybody listens: Ray itself tries for a minute and a half, and ends the process."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ConfigError(f"ray.address={address}: use auto, or HOST:PORT as ray start --head has said it")
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"ray.address={address}: nobody answers there ({error}): is ray start --head run?") from error


def explain_error(error: Exception, ray: ModuleType) -> dict[str, Any]:
    """What an error of Ray's means for a job: whether its worker has died, and in one line of what."""
    known = ray.exceptions
    if isinstance(error, known.RayTaskError):
        return {"error": f"the task did not start: {innermost_error(error.cause or error)}"}
    if isinstance(error, known.RuntimeEnvSetupError | known.TaskUnschedulableError):
        return {"error": " ".join(str(error).split())}
    causes = {
        known.OutOfMemoryError: "was ended by Ray, for its machine ran out of memory: lower jobs=",
        known.NodeDiedError: "died with its node",
    }
    how = next((text for kind, text in causes.items() if isinstance(error, kind)), "was killed or has crashed")
    return {"error": f"the worker process {how}", "died": True}


_LOOK_AGAIN_SECONDS = 0.2


def _work(*arguments: Any) -> Iterator[Event]:
    from dgal_bench.engines.ray_task import run_task  # lightning and more, which the driver does without

    yield from run_task(*arguments)


def _import_worker() -> None:
    import dgal_bench.engines.ray_task  # noqa: F401 - ten seconds that the first run of a process need not wait


@dataclass(eq=False)
class RayRun:
    """A run under way: its file, held by the driver, what that held before, and the stream of events."""

    job: PlannedRun
    writer: FileWriter
    held: ExitStack
    before: bytes
    events: Any
    sent: int = 0
    """How often its node had to be sent what the set-up made."""


class RayEngine:
    """Tasks that Ray does not retry: what is tried again, and how often, the run queue decides, as elsewhere.

    Every attempt has a stream of its own, so that nobody listens to what is left of an earlier one.

    Raises:
        ConfigError: no Ray, or more is asked of it than it has.
    """

    def __init__(self, jobs: Sequence[PlannedRun], settings: SweepSettings, tell: SynchronizedListener) -> None:
        share, here = settings.gpus_per_cell, visible_gpus()
        if share > 1 and share != int(share):
            raise ConfigError(f"gpus_per_cell={share:g}: Ray gives a part of one GPU, or whole ones")
        if settings.gpus and settings.gpus < share:
            raise ConfigError(f"gpus={settings.gpus} is less than the gpus_per_cell={share:g} of one run")
        own = not settings.ray_address
        if own and here:  # without any they are logical ones
            check_gpus(settings, here)
        self._settings, self._tell = settings, tell
        self._flights: list[RayRun] = []
        # How many run side by side; on a cluster without jobs= that is not known, and changes.
        self._lanes = min(count_lanes(jobs, settings, len(here)), len(jobs)) if own else settings.jobs or 0
        n_cpus = self._lanes * max(job.config.threads for job in jobs)
        self._ray = connect(settings.ray_address, n_cpus, settings.gpus)
        # Once, for what is new to Ray costs each task a lease. A process that has CUDA open does not see another GPU,
        # which the next run may be given: where GPUs are real, each of their tasks has a process of its own.
        self._task = self._gpu_task = self._ray.remote(_work)
        if here or not own:
            self._gpu_task = self._ray.remote(max_calls=1)(_work)
        self._cargo = EntryStore(self._ray, settings.cache.absolute())
        self._capacity = Capacity(self._ray, jobs, settings, tell)
        if lacking := self._capacity.lacking():
            self.close()
            raise ConfigError(lacking)
        if own and not self._capacity.on_gpu(jobs[0]):
            warm = self._ray.remote(_import_worker).options(max_retries=0, **self._capacity.needs(jobs[0]))
            for _ in range(self._lanes - 1):  # the other one does the set-up
                warm.remote()

    def ask(self, kind: str, job: PlannedRun) -> Iterator[Event]:
        events = self._start(kind, job)
        while True:
            if not self._ray.wait([events], timeout=_LOOK_AGAIN_SECONDS)[0]:
                continue  # so that Ctrl-C gets through
            event = self._next(events)
            if event["event"] == "ready" and kind == "setup":
                self._cargo.note(job, event)
            yield event
            if event["event"] in FINAL_EVENTS:
                return

    def run(self, run_queue: RunQueue) -> None:
        try:
            while not run_queue.over:
                room = self._lanes or self._capacity.runs()
                while len(self._flights) < room and (job := run_queue.take()) is not None:
                    self._launch(run_queue, job)
                self._listen(run_queue)
        finally:
            for flight in self._flights:
                flight.held.close()

    def close(self) -> None:
        for flight in self._flights:
            self._ray.cancel(flight.events, force=True)
        self._flights.clear()
        self._ray.shutdown()

    def _start(self, kind: str, job: PlannedRun, before: bytes = b"") -> Any:
        """A job as a task; the stream of its events."""
        needs = self._capacity.needs(job, kind)
        task = self._gpu_task if needs["num_gpus"] else self._task
        task = task.options(name=job.name, num_returns="streaming", max_retries=0, **needs)
        places = {
            "folder": os.getcwd(),
            "entries": self._cargo.entries(job) if kind == "run" else [],
        }
        return task.remote(job_message(kind, job, self._settings) | places, before, self._cargo.parcels(job))

    def _launch(self, run_queue: RunQueue, job: PlannedRun) -> None:
        held = ExitStack()
        try:
            writer = held.enter_context(FileWriter(job.path))
        except ResultsError as error:
            run_queue.on_event(job, _refusal(error))
            return
        before = job.path.read_bytes()
        self._flights.append(RayRun(job, writer, held, before, self._start("run", job, before)))

    def _listen(self, run_queue: RunQueue) -> None:
        """Take one event of each run that has any; wait a little where none has."""
        if not self._flights:
            time.sleep(_LOOK_AGAIN_SECONDS)
            return
        streams = [flight.events for flight in self._flights]
        self._ray.wait(streams, timeout=_LOOK_AGAIN_SECONDS)
        ready, _ = self._ray.wait(streams, num_returns=len(streams), timeout=0)
        for flight in [flight for flight in self._flights if any(flight.events is one for one in ready)]:
            self._on_event(run_queue, flight, self._next(flight.events))

    def _next(self, events: Any) -> Event:
        """The next event of a stream that has one, or the end of its worker."""
        try:
            event: Event = self._ray.get(next(events))
        except self._ray.exceptions.RayError as error:
            return {"event": "failed", "exit_code": 1, "stop": False, **explain_error(error, self._ray)}
        return event

    def _on_event(self, run_queue: RunQueue, flight: RayRun, event: Event) -> None:
        if event["event"] == "line":
            try:
                _write(flight.writer, event["line"])
            except ResultsError as error:
                self._ray.cancel(flight.events, force=True)
                self._land(run_queue, flight, _refusal(error))
        elif event["event"] == "lacking":
            self._supply(run_queue, flight, event["keys"])
        elif event["event"] in FINAL_EVENTS:
            self._land(run_queue, flight, event)
        else:
            run_queue.on_event(flight.job, event)

    def _land(self, run_queue: RunQueue, flight: RayRun, end: Event) -> None:
        """The file is let go before the run queue hears, who may have a word to write in it."""
        self._flights.remove(flight)
        flight.held.close()
        run_queue.on_event(flight.job, end)

    def _supply(self, run_queue: RunQueue, flight: RayRun, keys: Sequence[str]) -> None:
        """Start a run again with the cache entries that its node was without; made again if they are gone."""
        flight.sent += 1
        if flight.sent > MAX_DEATHS:
            lost = f"its node was sent {', '.join(keys)} {MAX_DEATHS} times, and has them not"
            self._land(
                run_queue, flight, {"event": "failed", "error": lost, "exit_code": 1, "stop": False, "died": True}
            )
            return
        if not self._cargo.pack(flight.job, keys):
            self._tell("warn", f"{flight.job.config.dataset.name}: the node that had its graph is gone; set up again")
            *_, end = self.ask("setup", flight.job)
            if end["event"] != "ready":
                self._land(run_queue, flight, end)
                return
        flight.events = self._start("run", flight.job, flight.before)


def _write(writer: FileWriter, line: Mapping[str, Any]) -> None:
    if line["kind"] == "header":
        writer.write_header(line)
    else:
        writer.append(line)


def _refusal(error: ResultsError) -> Event:
    """Why the driver cannot take a run, or goes no further with one, as a worker would say it."""
    kind, stop = "held" if isinstance(error, LockHeldError) else "failed", isinstance(error, UnwritableError)
    said = " ".join(str(error).split())
    return {"event": kind, "error": said, "exit_code": error.exit_code, "stop": stop, "refused": True}
