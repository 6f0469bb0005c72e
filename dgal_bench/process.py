"""A worker process as its parent sees it: an environment, jobs in, events out."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from dgal_bench.config import RunConfig


class Worker:
    """A process with its own environment that runs one job at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dgal_bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=os.environ | environment,
        )

    def fit_for(self, config: RunConfig) -> "Worker":
        """This worker, or a new one in its place where it has died or its environment is not the configuration's."""
        wanted = environment(config)
        if self._process.poll() is None and self.environment == wanted:
            return self
        self.close()
        return Worker(wanted)

    def run(self, job: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        """Send a job; yield its events up to and with the last: ready, done or failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                event = json.loads(line)
                yield event
                if event["event"] in ("ready", "done", "failed"):
                    return
        except BrokenPipeError:
            pass
        yield {"event": "failed", "error": self._epitaph(), "exit_code": 1, "stop": False, "died": True}

    def _epitaph(self) -> str:
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


def environment(config: RunConfig) -> dict[str, str]:
    """Set before torch, FAISS and BLAS are imported; the workspace setting is cuBLAS's condition for equal bits."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if config.device == "cpu" else {}
    return {**dict.fromkeys(names, str(config.threads)), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **hidden}
