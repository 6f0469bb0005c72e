"""The Ray engine: runs are tasks on this machine or a cluster, whose nodes share the results folder and the cache."""

import math
import os
import platform
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dgal_bench.core.errors import ConfigError, innermost_error
from dgal_bench.core.files import write_atomic
from dgal_bench.engines.base import Event, SynchronizedListener, job_message
from dgal_bench.engines.local import check_gpus, count_lanes
from dgal_bench.engines.process import FINAL_EVENTS, visible_gpus, worker_environment
from dgal_bench.engines.queue import RunQueue
from dgal_bench.engines.sweep import PlannedRun, SweepSettings

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
_NODE_SECONDS = 120.0  # a busy node starts a process slowly


def execute_job(job: Mapping[str, Any], markers: Sequence[str]) -> Iterator[Event]:
    """What a task executes; ``markers``: files that every node of a cluster must see."""
    from dgal_bench.engines.worker import stream_events  # imports lightning, which the driver does not need

    yield from stream_events(job, lambda: check_shared(markers))


def _import_worker() -> None:
    import dgal_bench.engines.worker  # noqa: F401 - takes 10 s, which the first run of a process need not wait


def mark_folder(folder: Path) -> str:
    """Put a new file into a folder; returns its path, by which a node can tell that it sees this folder.

    Raises:
        ResultsError: the folder takes no file.
    """
    marker = folder.absolute() / f".ray-{uuid.uuid4().hex}"
    write_atomic(marker, b"", "make room, or set results=DIR and cache=DIR")
    return str(marker)


def check_shared(markers: Sequence[str]) -> None:
    """Raises ConfigError if this node does not see the files of ``mark_folder``."""
    if missing := [os.path.dirname(marker) for marker in markers if not os.path.exists(marker)]:
        raise ConfigError(
            f"{platform.node()} does not see the {' and '.join(missing)} of this machine: results= and cache= must be "
            "on storage that all nodes of a Ray cluster share"
        )


def check_nodes(ray: ModuleType, markers: Sequence[str]) -> None:
    """Ask every node of a cluster for the files of ``mark_folder``.

    A node that joins later, or gives no answer now, is asked before each of its runs.

    Raises:
        ConfigError: a node does not see a folder, or has no dgal-bench.
    """
    on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    check = ray.remote(check_shared)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    options = [{"num_cpus": 0, "max_retries": 0, "scheduling_strategy": on_node(node, soft=False)} for node in nodes]
    answers = [check.options(**each).remote(markers) for each in options]
    for answer in ray.wait(answers, num_returns=len(answers), timeout=_NODE_SECONDS)[0]:
        try:
            ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            known = isinstance(error.cause, ConfigError)
            raise ConfigError(str(error.cause) if known else explain_error(error, ray)["error"]) from error
        except ray.exceptions.RayError:
            continue


class RayEngine:
    """Tasks without Ray's retries: the run queue decides about another attempt. A task writes its run's file itself.

    Every attempt has its own stream, so that events of an earlier one are never read.

    Raises:
        ConfigError: Ray is missing, a run needs more than any machine has, or a node does not share the folders.
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
        self._submitted: list[tuple[PlannedRun, Any]] = []  # runs, each with the stream of its events
        self._markers: list[str] = []
        # Runs side by side; 0 on a cluster without jobs=, where Capacity.runs says it.
        self._lanes = min(count_lanes(jobs, settings, len(here)), len(jobs)) if own else settings.jobs or 0
        n_cpus = self._lanes * max(job.config.threads for job in jobs)
        self._ray = connect(settings.ray_address, n_cpus, settings.gpus)
        # Made once: each new remote function costs a lease per task. A process that has opened CUDA does not see the
        # other GPU that the next run may get: where GPUs are real, each of their tasks has its own process.
        self._task = self._gpu_task = self._ray.remote(execute_job)
        if here or not own:
            self._gpu_task = self._ray.remote(max_calls=1)(execute_job)
        self._capacity = Capacity(self._ray, jobs, settings, notify)
        try:
            if shortage := self._capacity.shortage():
                raise ConfigError(shortage)
            if not own:
                for folder in (settings.results, settings.cache):
                    self._markers.append(mark_folder(folder))
                check_nodes(self._ray, self._markers)
        except BaseException:
            self.close()
            raise
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
            yield event
            if event["event"] in FINAL_EVENTS:
                return

    def run(self, run_queue: RunQueue) -> None:
        while not run_queue.over:
            room = self._lanes or self._capacity.runs()
            while len(self._submitted) < room and (job := run_queue.take()) is not None:
                self._submitted.append((job, self._start("run", job)))
            self._listen(run_queue)

    def close(self) -> None:
        for _, events in self._submitted:
            self._ray.cancel(events, force=True)
        self._submitted.clear()
        self._ray.shutdown()
        for marker in self._markers:
            Path(marker).unlink(missing_ok=True)

    def _start(self, kind: str, job: PlannedRun) -> Any:
        """Start a job as a task; returns the stream of its events."""
        options = self._capacity.task_options(job, kind)
        task = self._gpu_task if options["num_gpus"] else self._task
        task = task.options(name=job.name, num_returns="streaming", max_retries=0, **options)
        message = job_message(kind, job, self._settings) | {"folder": os.getcwd()}
        return task.remote(message, self._markers)

    def _listen(self, run_queue: RunQueue) -> None:
        """Handle one event of each run that has any; wait a little if none has."""
        if not self._submitted:
            time.sleep(_LOOK_AGAIN_SECONDS)
            return
        streams = [events for _, events in self._submitted]
        self._ray.wait(streams, timeout=_LOOK_AGAIN_SECONDS)
        ready, _ = self._ray.wait(streams, num_returns=len(streams), timeout=0)
        for attempt in [attempt for attempt in self._submitted if any(attempt[1] is stream for stream in ready)]:
            job, events = attempt
            event = self._next(events)
            if event["event"] in FINAL_EVENTS:
                self._submitted.remove(attempt)
            run_queue.on_event(job, event)

    def _next(self, events: Any) -> Event:
        """The next event of a stream that has one, or the death of its worker."""
        try:
            event: Event = self._ray.get(next(events))
        except self._ray.exceptions.RayError as error:
            return {"event": "failed", "exit_code": 1, "stop": False, **explain_error(error, self._ray)}
        return event
