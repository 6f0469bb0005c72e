"""Ray, started on this machine or found on a cluster, without its noise."""

import os
import signal
import socket
import threading
from types import ModuleType
from typing import Any

from dgal_bench.errors import ConfigError, innermost

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


def told(error: Exception, ray: ModuleType) -> dict[str, Any]:
    """What an error of Ray's means for a job: whether its worker has died, and in one line of what."""
    known = ray.exceptions
    if isinstance(error, known.RayTaskError):
        return {"error": f"the task did not start: {innermost(error.cause or error)}"}
    if isinstance(error, known.RuntimeEnvSetupError | known.TaskUnschedulableError):
        return {"error": " ".join(str(error).split())}
    causes = {
        known.OutOfMemoryError: "was ended by Ray, for its machine ran out of memory: lower jobs=",
        known.NodeDiedError: "died with its node",
    }
    how = next((text for kind, text in causes.items() if isinstance(error, kind)), "was killed or has crashed")
    return {"error": f"the worker process {how}", "died": True}
