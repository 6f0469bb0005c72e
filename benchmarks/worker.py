"""One measurement in a process of its own: ``python -m benchmarks.worker '{"criterion": "badge", ...}'``.

Prints one JSON object. The number of threads is the environment's (OMP_NUM_THREADS and its like), set by the parent
before any library is loaded.
"""

import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

from benchmarks.contenders import MAKERS, network_outputs
from benchmarks.plan import Case, n_calls

WARM_UP_POINTS = 500
WARM_UP_PICKS = 5
BANDWIDTH_BYTES = 1_000_000_000


class OverLimitError(BaseException):
    """Past every ``except Exception`` of the libraries that are measured."""


def measure(case: Case, limit: float) -> dict[str, Any]:
    """Seconds of each call and megabytes of the first, its peak less what was there before it; no more than ``limit``.

    Imports, one call on 500 points and the inputs come before. ``cores_of_others``: how many other processes kept busy
    meanwhile, 0 on a quiet machine. This and memory are None where Linux's /proc is not.
    """
    make = MAKERS[case.criterion, case.implementation]
    others = _cores_of_others()
    make(network_outputs(WARM_UP_POINTS, case.classes), WARM_UP_PICKS)()
    call = make(network_outputs(case.points, case.classes), case.picks)
    gc.collect()
    _return_free_memory()
    seconds: list[float] = []
    before = _reset_peak()
    try:
        with _alarm(limit):
            chosen = _timed(call, seconds)
    except OverLimitError:
        return {"status": "over_limit", "peak_mb": _peak_beyond(before)}
    except MemoryError:
        return {"status": "over_memory", "peak_mb": _peak_beyond(before)}
    peak = _peak_beyond(before)
    for _ in range(n_calls(seconds[0]) - 1):
        _timed(call, seconds)
    return {
        "status": "measured", "seconds": min(seconds), "all_seconds": seconds, "peak_mb": peak,
        "cores_of_others": others(), "chosen": chosen,
    }  # fmt: skip


def read_bandwidth() -> dict[str, Any]:
    """Gigabytes a second that this process reads from memory: the best of five sums of 1 GB."""
    import torch

    ones = torch.ones(BANDWIDTH_BYTES // 4)
    seconds: list[float] = []
    for _ in range(5):
        _timed(ones.sum, seconds)
    return {"read_gb_per_second": BANDWIDTH_BYTES / 1e9 / min(seconds), "torch_threads": torch.get_num_threads()}


def _timed(call: Callable[[], Any], seconds: list[float]) -> Any:
    """The call's answer; its seconds are appended. No garbage is collected meanwhile."""
    gc.disable()
    start = perf_counter()
    answer = call()
    seconds.append(perf_counter() - start)
    gc.enable()
    return answer


@contextmanager
def _alarm(limit: float) -> Iterator[None]:
    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise OverLimitError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _cores_of_others() -> Callable[[], float | None]:
    """A function that says how many cores all other processes together have used since now, on average."""

    def used() -> tuple[float, float]:
        user_to_steal = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
        ticks = sum(user_to_steal) - user_to_steal[3] - user_to_steal[4]  # less idle and waiting for disks
        mine = os.times()
        return ticks / os.sysconf("SC_CLK_TCK") - mine.user - mine.system, perf_counter()

    if not Path("/proc/stat").exists():
        return lambda: None
    start, began = used()

    def since() -> float:
        now, ended = used()
        return max(0.0, (now - start) / (ended - began))

    return since


def _return_free_memory() -> None:
    """What the inputs' making has freed goes back to the system, lest the measured call gets it uncounted."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def _reset_peak() -> float | None:
    """Let the peak start anew; the megabytes in use."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_megabytes("VmRSS")


def _peak_beyond(before: float | None) -> float | None:
    return None if before is None else max(0.0, _status_megabytes("VmHWM") - before)


def _status_megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field + ":"))


def main() -> None:
    request = json.loads(sys.argv[1])
    answer = read_bandwidth() if "bandwidth" in request else measure(Case.of(request), request["limit"])
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
