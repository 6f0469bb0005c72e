"""The local engine: worker processes side by side on this machine, each with its threads and its GPU."""

import itertools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from dgal_bench.config.schema import available_cores
from dgal_bench.core.errors import ConfigError
from dgal_bench.engines.base import Event, SynchronizedListener, job_message
from dgal_bench.engines.process import ForkServers, WorkerProcess, visible_gpus, worker_environment
from dgal_bench.engines.queue import RunQueue
from dgal_bench.engines.sweep import PlannedRun, SweepSettings

_LOOK_AGAIN_SECONDS = 0.2


def count_lanes(jobs: Sequence[PlannedRun], settings: SweepSettings, gpus_here: int) -> int:
    """How many runs execute side by side: ``settings.jobs`` if given, else as many as fit on the GPUs or the cores.

    Raises:
        ConfigError: a run needs more GPUs than there are to use.
    """
    n_gpus, share = settings.gpus if settings.gpus is not None else gpus_here, settings.gpus_per_cell
    if 0 < n_gpus < share:
        raise ConfigError(f"gpus_per_cell={share:g}, but there are {n_gpus} GPUs to use")
    by_gpus = int(n_gpus / share + 1e-9) if any(job.config.device != "cpu" for job in jobs) else 0
    by_cores = available_cores() // max((job.config.threads for job in jobs), default=1)
    if settings.gpus is None and by_gpus:
        by_gpus = min(by_gpus, by_cores)
    return settings.jobs or max(1, by_gpus or by_cores)


def check_gpus(settings: SweepSettings, here: Sequence[str]) -> None:
    """Raises ConfigError if ``gpus=`` is more than this machine has."""
    if settings.gpus is not None and settings.gpus > len(here):
        raise ConfigError(f"gpus={settings.gpus}, but this machine has {len(here)}: leave it out, or add --dry-run")


def assign_gpus(gpus: Sequence[str], settings: SweepSettings, n_lanes: int, at_least: int = 1) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each lane, in turn; "" hides all GPUs, None leaves the variable as it is."""
    each = max(math.ceil(settings.gpus_per_cell), min(at_least, len(gpus)))
    groups: list[str | None] = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    return list(itertools.islice(itertools.cycle(groups or ["" if settings.gpus == 0 else None]), n_lanes))


class LocalEngine:
    """The first worker executes the setup; the others start when there are runs for them.

    Raises:
        ConfigError: ``gpus=`` is more than this machine has.
    """

    def __init__(self, jobs: Sequence[PlannedRun], settings: SweepSettings, notify: SynchronizedListener) -> None:
        gpus = visible_gpus()
        check_gpus(settings, gpus)
        self._settings = settings
        n_lanes = min(count_lanes(jobs, settings, len(gpus)), len(jobs))
        self._usable = gpus if settings.gpus is None else gpus[: settings.gpus]
        self._gpus = assign_gpus(self._usable, settings, n_lanes)
        self._servers = ForkServers()
        self._workers: list[WorkerProcess | None] = [None] * n_lanes
        self._closing = threading.Event()
        self._closing_lock = threading.Lock()

    def ask(self, kind: str, job: PlannedRun) -> Iterator[Event]:
        (gpus,) = assign_gpus(self._usable, self._settings, 1, at_least=job.config.trainer.devices)
        worker = self._workers[0] = self._servers.fit(self._workers[0], worker_environment(job.config, gpus))
        return worker.run(job_message(kind, job, self._settings))

    def run(self, run_queue: RunQueue) -> None:
        n_lanes = min(len(self._workers), len(run_queue))
        pool = ThreadPoolExecutor(n_lanes)
        pending = {pool.submit(self._work, run_queue, lane) for lane in range(n_lanes)}
        while pending and run_queue.fatal is None:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)  # so that Ctrl-C gets through
            for future in finished:
                future.result()

    def _work(self, run_queue: RunQueue, lane: int) -> None:
        """Execute runs one after the other until the queue is over."""
        while not (run_queue.over or self._closing.is_set()):
            job = run_queue.take()
            if job is None:
                time.sleep(_LOOK_AGAIN_SECONDS)
                continue
            with self._closing_lock:  # no worker may start once close() ends them all
                if self._closing.is_set():
                    return
                worker = self._servers.fit(self._workers[lane], worker_environment(job.config, self._gpus[lane]))
                self._workers[lane] = worker
            for event in worker.run(job_message("run", job, self._settings)):
                if self._closing.is_set():
                    return
                run_queue.on_event(job, event)

    def close(self) -> None:
        with self._closing_lock:
            self._closing.set()
        for worker in self._workers:
            if worker is not None:
                worker.close()
        self._servers.close()
