"""A worker process as its parent sees it: an environment, jobs in, events out."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from dgal_bench.config.schema import RunConfig
from dgal_bench.core.system import thread_environment

FINAL_EVENTS = ("ready", "done", "held", "skipped", "failed")
"""The last events of a job."""


class WorkerProcess:
    """A process with its own environment that runs one job at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._read = False
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dgal_bench.engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=os.environ | environment,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def fit_for(self, wanted: Mapping[str, str]) -> "WorkerProcess":
        """This worker, or a new one in its place where it has died or its environment is another."""
        if self._process.poll() is None and self.environment == wanted:
            return self
        self.close()
        return WorkerProcess(wanted)

    def run(self, job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a job; yield its events up to and with the last, one of ENDINGS."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._read = True
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if not line.endswith("\n"):
                    break  # cut by a kill
                event = json.loads(line)
                yield event
                if event["event"] in FINAL_EVENTS:
                    self._read = False
                    return
        except BrokenPipeError:
            pass
        yield {"event": "failed", "error": self._exit_message(), "exit_code": 1, "stop": False, "died": True}

    def _exit_message(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        last = self._stderr.read().strip().rpartition("\n")[2]
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the worker process was {how}" + (f": {last}" if last else "")

    def close(self) -> None:
        """End the process, whatever it is doing; more than once does no harm."""
        self._process.kill()
        self._process.wait()
        self._stderr.close()
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        if not self._read:  # whoever reads finds the end by himself
            self._process.stdout.close()  # type: ignore[union-attr]


def worker_environment(config: RunConfig, gpu: str | None = None) -> dict[str, str]:
    """Threads, and what else must be set before torch is imported; the workspace is cuBLAS's condition for equal bits.

    ``gpu``: the one to see, None: as they are.
    """
    seen = "" if config.device == "cpu" else gpu
    shown = {} if seen is None else {"CUDA_VISIBLE_DEVICES": seen}
    return {**thread_environment(config.threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **shown}


def visible_gpus() -> list[str]:
    """Their names for CUDA_VISIBLE_DEVICES, without a CUDA context."""
    n_gpus = torch.cuda.device_count()
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return told.split(",")[:n_gpus] if told else [str(index) for index in range(n_gpus)]
