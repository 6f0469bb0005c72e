"""What a process is told under Linux's /proc of its own memory and of the others' work."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter


def cores_of_others() -> Callable[[], float | None]:
    """A function that says how many cores all other processes together have used since now, on average.

    Children of this one that have ended do not count as others. None where Linux's /proc is not.
    """

    def used() -> tuple[float, float]:
        user_to_steal = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
        ticks = sum(user_to_steal) - user_to_steal[3] - user_to_steal[4]  # less idle and waiting for disks
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4]), perf_counter()

    if not Path("/proc/stat").exists():
        return lambda: None
    start, began = used()

    def since() -> float:
        now, ended = used()
        return max(0.0, (now - start) / (ended - began))

    return since


def return_free_memory() -> None:
    """What the inputs' making has freed goes back to the system, lest the measured call gets it uncounted."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def reset_peak() -> float | None:
    """Let the peak start anew; the megabytes in use."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return status_megabytes("VmRSS")


def peak_beyond(before: float | None) -> float | None:
    return None if before is None else max(0.0, status_megabytes("VmHWM") - before)


def status_megabytes(field: str) -> float:
    # not getrusage's ru_maxrss: a child begins with its parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field + ":"))
