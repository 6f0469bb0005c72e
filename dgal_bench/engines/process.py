"""A worker process, seen from its parent: an environment, jobs in, events out."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from dgal_bench.config.schema import RunConfig
from dgal_bench.core.fork_server import ForkServer
from dgal_bench.core.system import thread_environment

FINAL_EVENTS = ("ready", "done", "held", "skipped", "failed")
"""The last event of a job is one of these."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
_WORKER = "dgal_bench.engines.worker"


class ForkServers:
    """Starts workers: those of one environment from one process that has imported what they need."""

    def __init__(self) -> None:
        self._servers: list[ForkServer] = []

    def fit(self, worker: "WorkerProcess | None", environment: Mapping[str, str]) -> "WorkerProcess":
        """This worker if it is alive and has that environment, else a new one in its place."""
        if worker is not None and worker.fits(environment):
            return worker
        if worker is not None:
            worker.close()
        return WorkerProcess(environment, self._server(environment))

    def _server(self, environment: Mapping[str, str]) -> ForkServer:
        """The fork server started with these variables, but for the visible GPUs, which no import reads."""
        wanted = {name: value for name, value in environment.items() if name != VISIBLE}
        for server in self._servers:
            if server.environment == wanted:
                return server
        self._servers.append(ForkServer(wanted, _WORKER))
        return self._servers[-1]

    def close(self) -> None:
        for server in self._servers:
            server.close()


class WorkerProcess:
    """A process with its own environment that runs one job at a time."""

    def __init__(self, environment: Mapping[str, str], server: ForkServer) -> None:
        self.environment = environment
        self._reading = False
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the worker
        late = {name: value for name, value in environment.items() if name == VISIBLE}
        self._process = server.start(_WORKER, environment=late, stderr=self._stderr)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether it is alive and has that environment."""
        return self._process.poll() is None and self.environment == environment

    def run(self, job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a job; yield its events, the last being one of FINAL_EVENTS."""
        self._reading = True
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if not line.endswith("\n"):
                    break  # cut by a kill
                event = json.loads(line)
                yield event
                if event["event"] in FINAL_EVENTS:
                    self._reading = False
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
        """Kill the process; may be called again."""
        self._process.kill()
        self._process.wait()
        self._stderr.close()
        with suppress(OSError):
            self._process.stdin.close()
        if not self._reading:  # a thread in run() finds the end itself
            self._process.stdout.close()


def worker_environment(config: RunConfig, gpu: str | None = None) -> dict[str, str]:
    """Variables to set before torch is imported; cuBLAS gives equal bits only with that workspace.

    ``gpu``: CUDA_VISIBLE_DEVICES; None leaves the variable as it is.
    """
    visible = "" if config.device == "cpu" else gpu
    devices = {} if visible is None else {VISIBLE: visible}
    return {**thread_environment(config.threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **devices}


def visible_gpus() -> list[str]:
    """Names of the GPUs for CUDA_VISIBLE_DEVICES, without a CUDA context."""
    n_gpus = torch.cuda.device_count()
    names = os.environ.get(VISIBLE)
    return names.split(",")[:n_gpus] if names else [str(index) for index in range(n_gpus)]
