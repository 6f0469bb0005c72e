"""The Ray engine: runs are tasks on this machine or a cluster; their rows stream to the driver, the only writer."""

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

_COUNT_AGAIN_SECONDS = 5.0
_OVERSUBSCRIPTION = 2  # runs submitted beyond what fits: a cluster is never idle, and grows if it can


class Capacity:
    """How many runs fit on this Ray, and the resources of each.

    Whether runs use GPUs is decided once: if the last GPU of a cluster goes, they wait for another.
    """

    def __init__(
        self, ray: ModuleType, jobs: Sequence[PlannedRun], settings: SweepSettings, notify: SynchronizedListener
    ) -> None:
        self._ray, self._settings, self._notify = ray, settings, notify
        self._threads = max(job.config.threads for job in jobs)
        self._devices = max(job.config.trainer.devices for job in jobs)
        self._counted_at, self._totals = -math.inf, dict[str, float]()
        self._gpus = settings.gpus != 0 and self._most("GPU") > 0 and any(job.config.device != "cpu" for job in jobs)

    def shortage(self) -> str:
        """What a run needs and no machine has, for which Ray would wait for ever; "" if every run fits."""
        if self._settings.gpus and not self._most("GPU"):
            return f"gpus={self._settings.gpus}, but no machine of this Ray has a GPU: leave it out"
        requests = [("threads", "CPU", float(self._threads))]
        if self._gpus:
            requests += [
                ("gpus_per_cell", "GPU", self._settings.gpus_per_cell),
                ("trainer.devices", "GPU", self._devices),
            ]
        for key, name, amount in requests:
            if 0 < (most := self._most(name)) < amount:
                return f"{key}={amount:g}, but no machine of this Ray has more than {most:g} {name}s"
        return ""

    def runs(self) -> int:
        """How many runs to submit to a cluster: as many as fit now, and some that wait there."""
        totals = self._resources()
        fit = int(totals.get("CPU", 0)) // self._threads
        if self._gpus:
            n_gpus = min(totals.get("GPU", 0), self._settings.gpus or math.inf)
            if not n_gpus:
                self._notify("warn", "no machine of this Ray has a GPU any more: runs wait for one")
            fit = min(fit, int(n_gpus / self._settings.gpus_per_cell + 1e-9))
        return max(1, fit) if self._settings.gpus else fit + _OVERSUBSCRIPTION

    def on_gpu(self, job: PlannedRun) -> bool:
        return self._gpus and job.config.device != "cpu"

    def task_options(self, job: PlannedRun, kind: str = "run") -> dict[str, Any]:
        """Options of a task: its cores and GPUs (more in a ``setup``), and the environment of its process.

        A process without a GPU goes on with the next run of the same environment, keeping imports and data.
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
        """Total resources of the cluster, which may grow and shrink."""
        if time.monotonic() - self._counted_at > _COUNT_AGAIN_SECONDS:
            self._counted_at, self._totals = time.monotonic(), self._ray.cluster_resources()
        return self._totals

    def _most(self, name: str) -> float:
        """The most of a resource on one machine."""
        return max((node["Resources"].get(name, 0) for node in self._ray.nodes() if node["Alive"]), default=0)


_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # half a screen for every dead worker; the run queue reports it in a line
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # worker_environment sets what a task without a GPU sees
}
_STORE_BYTES = 128 * 1024**2  # of a Ray on this machine: only events pass through it
_ANSWER_SECONDS = 3.0


def connect(address: str | None, n_cpus: int, n_gpus: int | None) -> ModuleType:
    """The module ``ray``, connected to the cluster at ``address``, or to a new one on this machine of that size.

    ``n_gpus``: None for those that Ray finds.

    Raises:
        ConfigError: Ray is not installed, or no cluster of this version answers at the address.
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
        _check_address(address)
        own.clear()
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **quiet, **own)
    except (SystemExit, ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        ray.shutdown()
        if main and isinstance(error, SystemExit) and not address:
            signal.signal(signal.SIGTERM, handler)
            signal.raise_signal(signal.SIGTERM)  # it came while Ray's handler replaced the command's
        reason = "it is no Ray" if isinstance(error, SystemExit) else " ".join(str(error).split()) or "no answer"
        raise ConfigError(f"ray.address={address}: {reason}" if address else f"Ray does not start: {reason}") from error
    except BaseException:
        ray.shutdown()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)
    return ray


def _check_address(address: str) -> None:
    """Raises ConfigError if no server answers: Ray itself tries for 90 s, and then ends the process."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ConfigError(f"ray.address={address}: use auto, or HOST:PORT as ray start --head prints it")
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"ray.address={address}: no answer ({error}): start it with ray start --head") from error


def explain_error(error: Exception, ray: ModuleType) -> dict[str, Any]:
    """What an error of Ray means for a job: the error in one line, and whether its worker has died."""
    exceptions = ray.exceptions
    if isinstance(error, exceptions.RayTaskError):
        return {"error": f"the task did not start: {innermost_error(error.cause or error)}"}
    if isinstance(error, exceptions.RuntimeEnvSetupError | exceptions.TaskUnschedulableError):
        return {"error": " ".join(str(error).split())}
    causes = {
        exceptions.OutOfMemoryError: "was ended by Ray because its machine ran out of memory: lower jobs=",
        exceptions.NodeDiedError: "died with its node",
    }
    how = next((text for kind, text in causes.items() if isinstance(error, kind)), "was killed or has crashed")
    return {"error": f"the worker process {how}", "died": True}


_LOOK_AGAIN_SECONDS = 0.2


def _work(*arguments: Any) -> Iterator[Event]:
    from dgal_bench.engines.ray_task import run_task  # imports lightning, which the driver does not need

    yield from run_task(*arguments)


def _import_worker() -> None:
    import dgal_bench.engines.ray_task  # noqa: F401 - takes 10 s, which the first run of a process need not wait


@dataclass(eq=False)
class RayRun:
    """A submitted run: its file, which the driver has locked, the content before this attempt, and the events."""

    job: PlannedRun
    writer: FileWriter
    lock: ExitStack
    content: bytes
    events: Any
    transfers: int = 0
    """How often cache entries were sent to its node."""


class RayEngine:
    """Tasks without Ray's retries: the run queue decides about another attempt.

    Every attempt has its own stream, so that events of an earlier one are never read.

    Raises:
        ConfigError: Ray is missing, or a run needs more than any machine has.
    """

    def __init__(self, jobs: Sequence[PlannedRun], settings: SweepSettings, notify: SynchronizedListener) -> None:
        share, here = settings.gpus_per_cell, visible_gpus()
        if share > 1 and share != int(share):
            raise ConfigError(f"gpus_per_cell={share:g}: Ray gives a part of one GPU, or whole ones")
        if settings.gpus and settings.gpus < share:
            raise ConfigError(f"gpus={settings.gpus} is less than the gpus_per_cell={share:g} of one run")
        own = not settings.ray_address
        if own and here:  # on a machine without GPUs, gpus= are logical ones
            check_gpus(settings, here)
        self._settings, self._notify = settings, notify
        self._submitted: list[RayRun] = []
        # Runs side by side; 0 on a cluster without jobs=, where Capacity.runs says it.
        self._lanes = min(count_lanes(jobs, settings, len(here)), len(jobs)) if own else settings.jobs or 0
        n_cpus = self._lanes * max(job.config.threads for job in jobs)
        self._ray = connect(settings.ray_address, n_cpus, settings.gpus)
        # Made once: each new remote function costs a lease per task. A process that has opened CUDA does not see the
        # other GPU that the next run may get: where GPUs are real, each of their tasks has its own process.
        self._task = self._gpu_task = self._ray.remote(_work)
        if here or not own:
            self._gpu_task = self._ray.remote(max_calls=1)(_work)
        self._entries = EntryStore(self._ray, settings.cache.absolute())
        self._capacity = Capacity(self._ray, jobs, settings, notify)
        if shortage := self._capacity.shortage():
            self.close()
            raise ConfigError(shortage)
        if own and not self._capacity.on_gpu(jobs[0]):
            warm = self._ray.remote(_import_worker).options(max_retries=0, **self._capacity.task_options(jobs[0]))
            for _ in range(self._lanes - 1):  # the remaining one executes the setup
                warm.remote()

    def ask(self, kind: str, job: PlannedRun) -> Iterator[Event]:
        events = self._start(kind, job)
        while True:
            if not self._ray.wait([events], timeout=_LOOK_AGAIN_SECONDS)[0]:
                continue  # so that Ctrl-C gets through
            event = self._next(events)
            if event["event"] == "ready" and kind == "setup":
                self._entries.add(job, event)
            yield event
            if event["event"] in FINAL_EVENTS:
                return

    def run(self, run_queue: RunQueue) -> None:
        try:
            while not run_queue.over:
                room = self._lanes or self._capacity.runs()
                while len(self._submitted) < room and (job := run_queue.take()) is not None:
                    self._launch(run_queue, job)
                self._listen(run_queue)
        finally:
            for attempt in self._submitted:
                attempt.lock.close()

    def close(self) -> None:
        for attempt in self._submitted:
            self._ray.cancel(attempt.events, force=True)
        self._submitted.clear()
        self._ray.shutdown()

    def _start(self, kind: str, job: PlannedRun, content: bytes = b"") -> Any:
        """Start a job as a task; returns the stream of its events."""
        options = self._capacity.task_options(job, kind)
        task = self._gpu_task if options["num_gpus"] else self._task
        task = task.options(name=job.name, num_returns="streaming", max_retries=0, **options)
        places = {"folder": os.getcwd(), "entries": self._entries.keys(job) if kind == "run" else []}
        return task.remote(job_message(kind, job, self._settings) | places, content, self._entries.packed(job))

    def _launch(self, run_queue: RunQueue, job: PlannedRun) -> None:
        lock = ExitStack()
        try:
            writer = lock.enter_context(FileWriter(job.path))
        except ResultsError as error:
            run_queue.on_event(job, _refusal(error))
            return
        content = job.path.read_bytes()
        self._submitted.append(RayRun(job, writer, lock, content, self._start("run", job, content)))

    def _listen(self, run_queue: RunQueue) -> None:
        """Handle one event of each run that has any; wait a little if none has."""
        if not self._submitted:
            time.sleep(_LOOK_AGAIN_SECONDS)
            return
        streams = [attempt.events for attempt in self._submitted]
        self._ray.wait(streams, timeout=_LOOK_AGAIN_SECONDS)
        ready, _ = self._ray.wait(streams, num_returns=len(streams), timeout=0)
        for attempt in [attempt for attempt in self._submitted if any(attempt.events is stream for stream in ready)]:
            self._on_event(run_queue, attempt, self._next(attempt.events))

    def _next(self, events: Any) -> Event:
        """The next event of a stream that has one, or the death of its worker."""
        try:
            event: Event = self._ray.get(next(events))
        except self._ray.exceptions.RayError as error:
            return {"event": "failed", "exit_code": 1, "stop": False, **explain_error(error, self._ray)}
        return event

    def _on_event(self, run_queue: RunQueue, attempt: RayRun, event: Event) -> None:
        if event["event"] == "line":
            try:
                _write(attempt.writer, event["line"])
            except ResultsError as error:
                self._ray.cancel(attempt.events, force=True)
                self._end(run_queue, attempt, _refusal(error))
        elif event["event"] == "missing":
            self._send_entries(run_queue, attempt, event["keys"])
        elif event["event"] in FINAL_EVENTS:
            self._end(run_queue, attempt, event)
        else:
            run_queue.on_event(attempt.job, event)

    def _end(self, run_queue: RunQueue, attempt: RayRun, event: Event) -> None:
        """Release the file before the queue gets the event: it may write a failure into it."""
        self._submitted.remove(attempt)
        attempt.lock.close()
        run_queue.on_event(attempt.job, event)

    def _send_entries(self, run_queue: RunQueue, attempt: RayRun, keys: Sequence[str]) -> None:
        """Start a run again with the cache entries that its node lacks; set up again if they are gone."""
        attempt.transfers += 1
        if attempt.transfers > MAX_DEATHS:
            error = f"its node was sent {', '.join(keys)} {MAX_DEATHS} times, and still lacks them"
            self._end(
                run_queue, attempt, {"event": "failed", "error": error, "exit_code": 1, "stop": False, "died": True}
            )
            return
        if not self._entries.pack(attempt.job, keys):
            self._notify(
                "warn", f"{attempt.job.config.dataset.name}: the node that had its graph is gone; set up again"
            )
            *_, event = self.ask("setup", attempt.job)
            if event["event"] != "ready":
                self._end(run_queue, attempt, event)
                return
        attempt.events = self._start("run", attempt.job, attempt.content)


def _write(writer: FileWriter, line: Mapping[str, Any]) -> None:
    if line["kind"] == "header":
        writer.write_header(line)
    else:
        writer.append(line)


def _refusal(error: ResultsError) -> Event:
    """The final event of a run whose file the driver cannot lock or write."""
    kind, stop = "held" if isinstance(error, LockHeldError) else "failed", isinstance(error, UnwritableError)
    text = " ".join(str(error).split())
    return {"event": kind, "error": text, "exit_code": error.exit_code, "stop": stop, "refused": True}
