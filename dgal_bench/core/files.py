"""Files: found by name, written whole, and locked by one process at a time."""

import errno
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

from dgal_bench.core.errors import ResultsError

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # some parallel file systems
# A reader that asks who holds a lock has it for a moment itself.
_PATIENCE_SECONDS = 0.5


class LockHeldError(ResultsError):
    """Another process works on it now."""


def find_files(root: Path, pattern: str) -> list[Path]:
    """Files and folders under ``root`` by their name, sorted.

    ``Path.rglob`` fails where another process removes a folder while it walks.
    """
    paths = (Path(at, name) for at, folders, files in os.walk(root) for name in [*folders, *files])
    return sorted(path for path in paths if fnmatchcase(path.name, pattern))


def write_atomic(path: Path, content: bytes, knob: str) -> None:
    """Write a file, and its folder, in one rename: a reader sees the old content or all of the new.

    Raises:
        ResultsError: the folder takes no file; the message ends with ``knob``, what the user can do.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise ResultsError(f"{path} cannot be written: {error.strerror}: {knob}") from error


def ensure_writable(folder: Path, name: str, knob: str) -> None:
    """Make the folder where it is missing, and check that it takes files.

    Raises:
        ResultsError: it does not; the message begins with ``name``, the user's word for it, and ends with ``knob``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"{name} cannot be written: {error.strerror}: {knob}") from error
    if not os.access(folder, os.W_OK):
        raise ResultsError(f"{name} cannot be written: {knob}")


def lock_path(path: Path) -> Path:
    """The file whose lock stands for ``path``: ``seed-0.jsonl.lock``. It is there while the lock is held."""
    return path.with_name(f"{path.name}.lock")


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the right to write ``path``, against all processes and threads, for the block or until the process dies.

    It is the operating system's lock, which NFS 4 passes on to other hosts. Where the file system has no locks, one
    warning asks for one command at a time. ``wait``: until a holder is done, after a warning that names it.

    Raises:
        LockHeldError: another process holds it.
        OSError: the folder takes no file.
    """
    # The text of the lock's file says who holds it. Other users may read it, whatever the umask.
    file = FileLock(lock_path(path), mode=0o644, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
    try:
        file.acquire(timeout=_PATIENCE_SECONDS)
    except Timeout:
        holder = lock_holder(path) or "another process"
        if not wait:
            raise LockHeldError(f"{path} is being written by {holder}: let it finish") from None
        log.warning("waiting: %s makes %s", holder, path.name)
        file.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s is on a file system without locks: run one command at a time", path.parent)
    try:
        yield
    finally:
        with suppress(OSError):
            lock_path(path).unlink()  # before the release: a contender that has it open then sees that it is gone
        file.release()


def _sign(file: int) -> None:
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} of {platform.node()}".encode())


def lock_holder(path: Path) -> str | None:
    """``process 123 of host``, which holds the lock of ``path`` now; None: no process is known to.

    For readers: it needs no right to write. A killed process leaves the file of its lock, but not the lock.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # a shared folder may hold anything
    with suppress(OSError):
        try:
            file = os.open(lock_path(path), flags | os.O_RDWR)  # NFS locks no file that is open for reading only
        except OSError:
            file = os.open(lock_path(path), flags | os.O_RDONLY)
        try:
            if not lock_descriptor(file, blocking=False):
                return os.read(file, 200).decode(errors="replace") or "another process"
        finally:
            os.close(file)
    return None
