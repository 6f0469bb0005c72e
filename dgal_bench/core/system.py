"""What else runs on this machine while a run does: other runs, whoever started them, and other processes."""

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

# Where a number comes from: the code's revision, the packages, the machine.


PACKAGES = (
    "dgal-bench", "torch", "lightning", "torchvision", "torchmetrics", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs",
    "numpy", "scipy", "omegaconf",
)  # fmt: skip


@cache
def provenance() -> dict[str, Any]:
    """Plain types only: git revision and whether the tree was dirty, package versions, and the machine."""
    return {"git": git_state(), "versions": versions(), "machine": machine()}


def git_state() -> dict[str, Any]:
    """The revision of the checkout this package runs from; None outside one (an installed wheel)."""
    here = Path(__file__).resolve().parent
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"revision": None, "dirty": None}
    dirty = _git(here.parents[1], "status", "--porcelain", "--", "dgal_bench", "conf")
    return {"revision": _git(here, "rev-parse", "HEAD"), "dirty": bool(dirty)}


def revision(git: Mapping[str, Any]) -> str | None:
    """The revision, marked where the tree was not as committed."""
    return f"{git['revision']}+modified" if git["dirty"] else git["revision"]


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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


# How many threads torch works on: part of a run's identity, since they change the bits of a training.


Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_environment(count: int) -> dict[str, str]:
    """What a process that works on ``count`` threads is started with: read when torch, FAISS and BLAS are imported.

    How threads wait is said once more, for a node of a cluster that starts it with an environment of its own.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    waiting = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return {**dict.fromkeys(names, str(count)), "OMP_WAIT_POLICY": waiting}


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Work on ``count`` threads, and go back to what was before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Workers:
    """A map over items, each done on one thread: the same bits however many threads there are."""

    pool: ThreadPoolExecutor

    def __call__(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        return list(self.pool.map(work, items))


@contextmanager
def workers() -> Iterator[Workers]:
    """As many as torch has threads.

    The calling thread is left one of its own: OpenMP's would spin in the workers' way after whatever it does itself.
    """
    count = torch.get_num_threads()
    with on_threads(1), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield Workers(pool)


_TRIES = 20
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # anybody may have put anything into a shared folder


def worker_folder() -> Path:
    """Where the runs at work on this machine are counted; a private $TMPDIR or container has a count of its own."""
    return Path(tempfile.gettempdir()) / "dgal_bench_cells"


@contextmanager
def register_worker(folder: Path | None = None) -> Iterator[None]:
    """Be one of the runs at work while in here: a locked file, whose lock death releases.

    Where the folder cannot be had the run goes uncounted: it is no reason not to run.
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
    """A file of our own, locked; again where somebody took it for a dead run's before it was."""
    with suppress(OSError):
        with suppress(FileExistsError):
            folder.mkdir()
            folder.chmod(0o1777)  # of all users; each removes its own only
        for _ in range(_TRIES):
            path = folder / f"{os.getpid()}-{uuid.uuid4().hex}.cell"
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            try:
                os.fchmod(file, 0o644)  # whatever the umask: other users must be able to try its lock
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
    """How many runs run on this machine now, at least 1 (whoever asks); the files of dead ones are removed."""
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
    """A reading of the clocks in seconds: of the wall, of all busy cores together, and of this process's share."""

    wall: float
    busy: float
    own: float


def read_cpu() -> CpuReading | None:
    """Now; None where the system does not tell (anything but Linux)."""
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
    """Of the first line of /proc/stat: user, nice, system, irq, softirq and steal, over all cores since boot.

    Stolen time counts as busy, for it is as missing here; guests' is in user already.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, stat.partition("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / ticks_per_second


def busy_elsewhere(before: CpuReading | None, after: CpuReading | None) -> float | None:
    """The cores' worth of CPU that other processes took between two moments, never below 0.

    Children count as this process's own from when they have been waited for.
    """
    if before is None or after is None or after.wall <= before.wall:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / (after.wall - before.wall))


@dataclass
class LoadMonitor:
    """Watches the machine from when it is made: ``look()`` at moments that matter, then ``facts()`` for a row."""

    start: CpuReading | None = field(default_factory=read_cpu)
    runs: int = 1

    def __post_init__(self) -> None:
        self.look()

    def look(self) -> None:
        self.runs = max(self.runs, count_workers())

    def facts(self) -> dict[str, Any]:
        """``jobs``: the most runs seen at once; ``load``: the 1-minute average; ``busy_elsewhere``: cores, or None."""
        self.look()
        return {
            "jobs": self.runs,
            "load": os.getloadavg()[0],
            "busy_elsewhere": busy_elsewhere(self.start, read_cpu()),
        }
