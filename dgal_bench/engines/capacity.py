"""What a Ray has to give: how many cells fit, and what each of them asks for."""

import math
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from dgal_bench.engines.base import Teller
from dgal_bench.process import environment
from dgal_bench.sweep import Job, Settings

_COUNT_AGAIN_SECONDS = 5.0
_MORE_THAN_FIT = 2  # of a cluster: it is never idle, and grows where it can


class Capacity:
    """Whether cells run on GPUs is found once: when the last GPU of a cluster goes they wait for another."""

    def __init__(self, ray: ModuleType, jobs: Sequence[Job], settings: Settings, tell: Teller) -> None:
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

    def cells(self) -> int:
        """How many may be under way on a cluster: as many as fit now, and some that wait there."""
        has = self._resources()
        fit = int(has.get("CPU", 0)) // self._threads
        if self._gpus:
            n_gpus = min(has.get("GPU", 0), self._settings.gpus or math.inf)
            if not n_gpus:
                self._tell("warn", "no machine of this Ray has a GPU any more: cells wait for one")
            fit = min(fit, int(n_gpus / self._settings.gpus_per_cell + 1e-9))
        return max(1, fit) if self._settings.gpus else fit + _MORE_THAN_FIT

    def on_gpu(self, job: Job) -> bool:
        return self._gpus and job.config.device != "cpu"

    def needs(self, job: Job, kind: str = "cell") -> dict[str, Any]:
        """Of a task: its share of the machine, more of it in a ``setup``, and the environment of its process.

        Processes without a GPU go on to the next cell of the same environment, imports and data in memory.
        """
        on_gpu, n_gpus = self.on_gpu(job), self._settings.gpus_per_cell
        if kind == "setup" and job.config.trainer.devices > 1:
            n_gpus = max(n_gpus, job.config.trainer.devices)
        return {
            "num_cpus": job.config.threads,
            "num_gpus": n_gpus if on_gpu else 0,
            "runtime_env": {"env_vars": environment(job.config, None if on_gpu else "")},
        }

    def _resources(self) -> Mapping[str, float]:
        """What the cluster has altogether; it may grow and shrink."""
        if time.monotonic() - self._counted > _COUNT_AGAIN_SECONDS:
            self._counted, self._has = time.monotonic(), self._ray.cluster_resources()
        return self._has

    def _most(self, name: str) -> float:
        """Of a resource, on one machine."""
        return max((node["Resources"].get(name, 0) for node in self._ray.nodes() if node["Alive"]), default=0)
