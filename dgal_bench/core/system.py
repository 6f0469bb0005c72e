"""The machine and the code: provenance, threads, the runs at work here, and the load of other processes."""

import fcntl
import os
import platform
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

import torch

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


_TRIES = 20
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a shared folder may hold anything


def worker_folder() -> Path:
    """The files of the runs at work on this machine; a private $TMPDIR or container has a count of its own."""
    return Path(tempfile.gettempdir()) / "dgal_bench_cells"


@contextmanager
def register_worker(folder: Path | None = None) -> Iterator[None]:
    """Count as a run at work while in here, by a locked file, whose lock death releases.

    Where the folder is not writable, the run is not counted.
    """
    mark = _create_locked_file(folder or worker_folder())
    try:
        yield
    finally:
        if mark is not None:
            path, file = mark
            with suppress(OSError):
                path.unlink()
            os.close(file)


def _create_locked_file(folder: Path) -> tuple[Path, int] | None:
    """A new file, locked; again where another run removed it as a dead run's before it was locked."""
    with suppress(OSError):
        with suppress(FileExistsError):
            folder.mkdir()
            folder.chmod(0o1777)  # all users write here; each removes only its own files
        for _ in range(_TRIES):
            path = folder / f"{os.getpid()}-{uuid.uuid4().hex}.cell"
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            try:
                os.fchmod(file, 0o644)  # despite the umask: other users must be able to try its lock
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), path.stat()):
                    return path, file
            except OSError:
                pass
            os.close(file)
            with suppress(OSError):
                path.unlink()
    return None


def count_workers(folder: Path | None = None) -> int:
    """How many runs are at work on this machine now, at least 1: the caller's. Removes the files of dead runs."""
    count = 0
    with suppress(OSError):
        count = sum(_is_locked(path) for path in (folder or worker_folder()).glob("*.cell"))
    return max(1, count)


def _is_locked(path: Path) -> bool:
    with suppress(OSError):
        file = os.open(path, _READ_ONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            path.unlink()
        except BlockingIOError:
            return True
        finally:
            os.close(file)
    return False


@dataclass(frozen=True)
class CpuReading:
    """Clocks in seconds: ``wall``; ``busy``: CPU time of all cores together; ``own``: of this process."""

    wall: float
    busy: float
    own: float


def read_cpu() -> CpuReading | None:
    """The clocks now; None except on Linux."""
    if sys.platform != "linux":
        return None
    try:
        stat = Path("/proc/stat").read_text()
    except OSError:
        return None
    times = os.times()
    return CpuReading(
        perf_counter(),
        busy_seconds(stat, os.sysconf("SC_CLK_TCK")),
        process_time() + times.children_user + times.children_system,
    )


def busy_seconds(stat: str, ticks_per_second: int) -> float:
    """From the first line of /proc/stat: user, nice, system, irq, softirq and steal, over all cores since boot.

    Stolen time counts as busy, since this machine does not get it; guest time is part of user already.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, stat.partition("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / ticks_per_second


def busy_elsewhere(before: CpuReading | None, after: CpuReading | None) -> float | None:
    """The cores that other processes kept busy between two readings, on average, never below 0.

    Children count as this process's own once they have been waited for.
    """
    if before is None or after is None or after.wall <= before.wall:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / (after.wall - before.wall))


@dataclass
class LoadMonitor:
    """Watches the machine from its creation on: ``sample()`` a few times, then ``facts()`` for a row."""

    start: CpuReading | None = field(default_factory=read_cpu)
    runs: int = 1

    def __post_init__(self) -> None:
        self.sample()

    def sample(self) -> None:
        self.runs = max(self.runs, count_workers())

    def facts(self) -> dict[str, Any]:
        """``jobs``: the most runs sampled; ``load``: the 1-minute average; ``busy_elsewhere``: cores, or None."""
        self.sample()
        return {
            "jobs": self.runs,
            "load": os.getloadavg()[0],
            "busy_elsewhere": busy_elsewhere(self.start, read_cpu()),
        }
