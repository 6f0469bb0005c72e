"""One measurement in a process of its own: ``python -m benchmarks.worker '{"criterion": "badge", ...}'``.

Prints one JSON object. The number of threads is the environment's (OMP_NUM_THREADS and its like), set by the parent
before any library is loaded.
"""

import gc
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from types import FrameType
from typing import Any

from benchmarks.contenders import MAKERS, network_outputs
from benchmarks.machine import cores_of_others, peak_beyond, reset_peak, return_free_memory
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
    others = cores_of_others()
    make(network_outputs(WARM_UP_POINTS, case.classes), WARM_UP_PICKS)()
    call = make(network_outputs(case.points, case.classes), case.picks)
    gc.collect()
    return_free_memory()
    seconds: list[float] = []
    before = reset_peak()
    try:
        with _alarm(limit):
            chosen = _timed(call, seconds)
    except OverLimitError:
        return {"status": "over_limit", "peak_mb": peak_beyond(before)}
    except MemoryError:
        return {"status": "over_memory", "peak_mb": peak_beyond(before)}
    peak = peak_beyond(before)
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


def main() -> None:
    request = json.loads(sys.argv[1])
    answer = read_bandwidth() if "bandwidth" in request else measure(Case.of(request), request["limit"])
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
