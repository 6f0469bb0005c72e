"""What is asked of Slurm: a job's share of a node, and which jobs are still in its queue."""

import math
import os
import re
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from dgal_bench.checks import above_zero
from dgal_bench.engines.local import lanes
from dgal_bench.errors import ConfigError
from dgal_bench.sweep import Job, Settings

PARALLEL = 256
"""Cells that are submitted at once where ``jobs`` does not say."""

_TIME = "1-00:00:00"  # Slurm's own may be minutes, submitit's is five of them
_ASK_SECONDS = 30.0


class Queue:
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


def parameters(kind: str, jobs: Sequence[Job], settings: Settings) -> dict[str, Any]:
    """Of a job, as submitit's AutoExecutor takes them; raises ConfigError for a value that cannot be.

    ``kind``: a ``cell``, or the ``setup``, which may use more of a machine.
    """
    slurm, share, threads = settings.slurm, settings.gpus_per_cell, max((job.config.threads for job in jobs), default=1)
    if kind == "setup":
        threads = max(threads, *(job.config.representation.threads or 1 for job in jobs), 1)
        share = max(share, *(job.config.trainer.devices for job in jobs), 1)
    asked: dict[str, Any] = {
        "timeout_min": minutes(slurm.get("time", _TIME)),
        "cpus_per_task": threads,
        "slurm_array_parallelism": parallel(jobs, settings),
        **{f"slurm_{name}": slurm[name] for name in ("partition", "account", "qos", "constraint") if name in slurm},
    }
    if settings.gpus and any(job.config.device != "cpu" for job in jobs):
        asked["gpus_per_node"] = math.ceil(share)
    if "mem_gb" in slurm:
        asked["mem_gb"] = above_zero("slurm.mem_gb", slurm["mem_gb"], "a number of gigabytes")
    if slurm.get("cluster") == "local":
        for key, given in (("slurm.setup=", "setup" in slurm), ("gpus=", bool(settings.gpus))):
            if given:
                raise ConfigError(f"{key} is for nodes of a cluster: slurm.cluster=local starts processes on this one")
        return asked
    # A step is not told by every Slurm how many cores its job has; a job that was preempted is the docket's.
    asked["slurm_srun_args"] = [f"--cpus-per-task={threads}"]
    asked["slurm_additional_parameters"] = {"no-requeue": True}
    if "setup" in slurm:
        asked["slurm_setup"] = [slurm["setup"]]
    return asked


def parallel(jobs: Sequence[Job], settings: Settings) -> int:
    """How many cells run at once at most."""
    if settings.slurm.get("cluster") == "local":
        return lanes(jobs, settings, 0)
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
