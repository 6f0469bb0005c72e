"""The machine and the code: provenance, threads, the runs at work here, and the load of other processes."""

import os
import platform
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

import psutil
import torch

from dgal_bench.core.files import lock, lock_holder

PACKAGES = (
    "dgal-bench", "torch", "lightning", "torchvision", "torchmetrics", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs",
    "numpy", "scipy", "omegaconf",
)  # fmt: skip


@cache
def provenance() -> dict[str, Any]:
    """Where numbers come from, in plain types: git revision and whether modified, package versions, the machine."""
    return {"git": git_state(), "versions": versions(), "machine": machine()}


def git_state() -> dict[str, Any]:
    """The revision of the checkout this package runs from; None outside one (an installed wheel)."""
    folder = Path(__file__).resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"revision": None, "dirty": None}
    dirty = _git(folder.parents[1], "status", "--porcelain", "--", "dgal_bench", "conf")
    return {"revision": _git(folder, "rev-parse", "HEAD"), "dirty": bool(dirty)}


def revision(git: Mapping[str, Any]) -> str | None:
    """The revision, marked ``+modified`` where the tree differs from it."""
    return f"{git['revision']}+modified" if git["dirty"] else git["revision"]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    numbers = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            numbers[name] = version(name)
    return numbers


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def thread_environment(count: int) -> dict[str, str]:
    """Variables for a process of ``count`` threads: torch, FAISS and BLAS read them when they are imported.

    The wait policy is repeated for a cluster's node, which starts the process with an environment of its own.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    waiting = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return {**dict.fromkeys(names, str(count)), "OMP_WAIT_POLICY": waiting}


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Let torch work on ``count`` threads in here. The count changes the bits of a training: it is part of a run."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Workers:
    """A map over items, each done on one thread: the same bits however many threads there are."""

    pool: ThreadPoolExecutor

    def __call__(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        return list(self.pool.map(work, items))


@contextmanager
def workers() -> Iterator[Workers]:
    """As many workers as torch has threads.

    The calling thread keeps one OpenMP thread: more would spin in the workers' way after each of its own operations.
    """
    count = torch.get_num_threads()
    with on_threads(1), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield Workers(pool)


def worker_folder() -> Path:
    """The files of the runs at work on this machine; a private $TMPDIR or container has a count of its own."""
    return Path(tempfile.gettempdir()) / "dgal_bench_runs"


@contextmanager
def register_worker(folder: Path | None = None) -> Iterator[None]:
    """Count as a run at work while in here, by a lock, which death releases.

    Where the folder takes no file, the run is not counted.
    """
    folder = folder or worker_folder()
    with ExitStack() as stack:
        with suppress(OSError):
            with suppress(FileExistsError):
                folder.mkdir()
                folder.chmod(0o1777)  # all users write here; each removes only its own files
            stack.enter_context(lock(folder / uuid.uuid4().hex))
        yield


def count_workers(folder: Path | None = None) -> int:
    """How many runs are at work on this machine now, at least 1: the caller's. Removes the files of dead runs."""
    count = 0
    for path in (folder or worker_folder()).glob("*.lock"):
        if lock_holder(path.with_suffix("")) is not None:
            count += 1
        else:
            with suppress(OSError):
                path.unlink()
    return max(1, count)


@dataclass(frozen=True)
class CpuReading:
    """Clocks in seconds: ``wall``; ``busy``: CPU time of all cores together; ``own``: of this process."""

    wall: float
    busy: float
    own: float


def read_cpu() -> CpuReading:
    """The clocks now. Stolen time counts as busy, since this machine does not get it; guests' is in user's already."""
    times, own = psutil.cpu_times()._asdict(), os.times()
    busy = sum(seconds for name, seconds in times.items() if name not in ("idle", "iowait", "guest", "guest_nice"))
    return CpuReading(perf_counter(), busy, process_time() + own.children_user + own.children_system)


def busy_elsewhere(before: CpuReading, after: CpuReading) -> float:
    """The cores that other processes kept busy between two readings, on average, never below 0.

    Children count as this process's own once they have been waited for.
    """
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / (after.wall - before.wall))


@dataclass
class LoadMonitor:
    """Watches the machine from its creation on: ``sample()`` a few times, then ``facts()`` for a row."""

    start: CpuReading = field(default_factory=read_cpu)
    runs: int = 1

    def __post_init__(self) -> None:
        self.sample()

    def sample(self) -> None:
        self.runs = max(self.runs, count_workers())

    def facts(self) -> dict[str, Any]:
        """``jobs``: the most runs sampled; ``load``: the 1-minute average; ``busy_elsewhere``: cores."""
        self.sample()
        return {
            "jobs": self.runs,
            "load": os.getloadavg()[0],
            "busy_elsewhere": busy_elsewhere(self.start, read_cpu()),
        }
