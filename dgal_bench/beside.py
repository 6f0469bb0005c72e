"""What else runs on this machine while a cell does: other cells, whoever started them, and other processes."""

import fcntl
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

_TRIES = 20
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # anybody may have put anything into a shared folder


def census_folder() -> Path:
    """Where the cells at work on this machine are counted; a private $TMPDIR or container has a count of its own."""
    return Path(tempfile.gettempdir()) / "dgal_bench_cells"


@contextmanager
def counted(folder: Path | None = None) -> Iterator[None]:
    """Be one of the cells at work while in here: a locked file, whose lock death releases.

    Where the folder cannot be had the cell goes uncounted: it is no reason not to run.
    """
    mark = _mark(folder or census_folder())
    try:
        yield
    finally:
        if mark is not None:
            path, file = mark
            with suppress(OSError):
                path.unlink()
            os.close(file)


def _mark(folder: Path) -> tuple[Path, int] | None:
    """A file of our own, locked; again where somebody took it for a dead cell's before it was."""
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


def cells_at_work(folder: Path | None = None) -> int:
    """How many cells run on this machine now, at least 1 (whoever asks); the files of dead ones are removed."""
    count = 0
    with suppress(OSError):
        count = sum(_held(path) for path in (folder or census_folder()).glob("*.cell"))
    return max(1, count)


def _held(path: Path) -> bool:
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
class Moment:
    """A reading of the clocks in seconds: of the wall, of all busy cores together, and of this process's share."""

    wall: float
    busy: float
    own: float


def moment() -> Moment | None:
    """Now; None where the system does not tell (anything but Linux)."""
    if sys.platform != "linux":
        return None
    try:
        stat = Path("/proc/stat").read_text()
    except OSError:
        return None
    times = os.times()
    return Moment(
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


def busy_elsewhere(before: Moment | None, after: Moment | None) -> float | None:
    """The cores' worth of CPU that other processes took between two moments, never below 0.

    Children count as this process's own from when they have been waited for.
    """
    if before is None or after is None or after.wall <= before.wall:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / (after.wall - before.wall))


@dataclass
class Beside:
    """Watches the machine from when it is made: ``look()`` at moments that matter, then ``facts()`` for a row."""

    start: Moment | None = field(default_factory=moment)
    cells: int = 1

    def __post_init__(self) -> None:
        self.look()

    def look(self) -> None:
        self.cells = max(self.cells, cells_at_work())

    def facts(self) -> dict[str, Any]:
        """``jobs``: the most cells seen at once; ``load``: the 1-minute average; ``busy_elsewhere``: cores, or None."""
        self.look()
        return {
            "jobs": self.cells,
            "load": os.getloadavg()[0],
            "busy_elsewhere": busy_elsewhere(self.start, moment()),
        }
