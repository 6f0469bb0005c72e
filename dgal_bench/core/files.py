"""Files: found by name, written whole, locked on one host, and leased where several hosts share storage."""

import errno
import fcntl
import json
import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from dgal_bench.core.errors import ResultsError


def find_files(root: Path, pattern: str) -> list[Path]:
    """Files and folders under ``root`` by their name, sorted.

    ``Path.rglob`` fails where another process removes a folder, such as a lease, while it walks.
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


# A lease names the process that works on a file. On one host ``flock`` decides, which death releases. Between hosts it
# cannot be trusted: the process that holds the lock also takes a lease and keeps touching it. The holder of a lease
# that was not touched for MISSED_BEATS heartbeats is dead, and another process may take over.
#
# A lease is a directory that holds one file, named by its holder's token. A contender fills a directory of its own and
# renames it to the lease's name, which a file system allows where that is free or an empty directory: one of many
# succeeds. To take over is first to remove the dead holder's file, by a name that no other lease has: a fresh lease is
# never removed by mistake, however late a contender acts on what it read.
BEAT_SECONDS = 10.0
MISSED_BEATS = 5
_TRIES = 500  # some seconds
_NAME_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # some parallel file systems


class LockHeldError(ResultsError):
    """Another process works on it now."""


@cache
def boot_id() -> str:
    """Differs between machines, boots of one, and containers, which do not see each other's processes."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    return platform.node()


def process_start(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process, which tell it from a later one with its pid; None: dead."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return None


def lease_path(path: Path) -> Path:
    """The lease of a file: ``seed-0.jsonl.lease``, a directory."""
    return path.with_name(path.name + ".lease")


def lease_holder(path: Path) -> dict[str, Any] | None:
    """The holder's token, host, boot, pid and start, of the lease of ``path``; None where there is none."""
    token = ""
    try:
        # NFS keeps a file that is removed while a process reads it, under a name with a dot
        token, *_ = [name for name in os.listdir(lease_path(path)) if not name.startswith(".")] or [""]
        facts = json.loads((lease_path(path) / token).read_text()) if token else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        facts = {}
    return {**(facts if isinstance(facts, dict) else {}), "token": token} if token else None


def try_lock(file: int) -> bool:
    """Take the flock of an open file; False where another descriptor has it, of this or another process of the host."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def live_holder(path: Path) -> dict[str, Any] | None:
    """The holder of ``path`` where it seems alive, for a reader, which needs no lock."""
    holder = lease_holder(path)
    with suppress(OSError):
        return holder if holder is not None and _is_alive(path, holder) else None
    return None


def _is_alive(path: Path, holder: Mapping[str, Any]) -> bool:
    """Whether the heartbeat is fresh and, on this host, the process exists; raises FileNotFoundError."""
    if holder.get("boot") == boot_id() and process_start(holder.get("pid", 0)) != holder.get("start"):
        return False
    age = _server_time(path) - (lease_path(path) / holder["token"]).stat().st_mtime
    return bool(age <= MISSED_BEATS * BEAT_SECONDS)


def _server_time(path: Path) -> float:
    """The time by the file system's clock, so that hosts' clocks may differ; by ours where the folder is read-only."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
    except OSError:
        return time.time()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


class Lease:
    """The right to work on ``path``, for a process with its flock: ``with Lease(path) as lease:``, ``lease.check()``.

    Raises:
        LockHeldError: on entering: another process has it, and its heartbeat is fresh.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = uuid.uuid4().hex
        self._file = lease_path(path) / self._token
        self._end = threading.Event()

    def __enter__(self) -> "Lease":
        pid = os.getpid()
        facts = {"host": platform.node(), "boot": boot_id(), "pid": pid, "start": process_start(pid)}
        folder = self._path.with_name(f".{self._path.name}.{self._token}")
        try:
            folder.mkdir()
            (folder / self._token).write_text(json.dumps(facts))
            for _ in range(_TRIES):
                if self._acquire(folder):
                    break
                self._remove_dead()
                time.sleep(int(self._token[:2], 16) / 12_800)  # a back-off of up to 0.02 s, random per contender
            else:
                raise LockHeldError(f"{lease_path(self._path)} is no lease: remove it")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def _acquire(self, folder: Path) -> bool:
        """Whether our directory got the lease's name; its file comes with it, so no reader sees half a lease."""
        try:
            folder.rename(lease_path(self._path))
        except OSError as error:
            if error.errno not in _NAME_TAKEN:
                raise
            return False
        return True

    def _remove_dead(self) -> None:
        """Remove a dead holder's lease, or raise LockHeldError."""
        holder = lease_holder(self._path)
        with suppress(FileNotFoundError):
            if holder is not None and _is_alive(self._path, holder):
                raise LockHeldError(f"{self._path} is being written by {holder_name(holder)}: let it finish")
            _remove(self._path, holder["token"] if holder else None)

    def check(self) -> None:
        """Raises LockHeldError where another process took over, since this one stood still for too many beats.

        It is also a heartbeat. A network file system never answers from its cache when a file's time is set.
        """
        try:
            os.utime(self._file)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            name = holder_name(lease_holder(self._path) or {})
            raise LockHeldError(f"{self._path} was taken over by {name} while this process stood still") from error

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            try:
                self.check()
            except LockHeldError:
                return
            except OSError:
                continue  # storage may recover within MISSED_BEATS

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        with suppress(OSError):
            _remove(self._path, self._token)


def _remove(path: Path, token: str | None) -> None:
    """Remove the lease of that token and no other; None: an empty one, of a holder that died while removing it."""
    if token is not None:
        (lease_path(path) / token).unlink()
    with suppress(OSError):  # another process has it already
        lease_path(path).rmdir()


def release_lease(path: Path, pid: int) -> None:
    """Remove the lease of a killed process of this host: other hosts need not wait for MISSED_BEATS."""
    holder = lease_holder(path)
    if holder and holder.get("boot") == boot_id() and holder.get("pid") == pid:
        with suppress(FileNotFoundError):
            _remove(path, holder["token"])


def holder_name(holder: Mapping[str, Any]) -> str:
    """``process 123 of host``, or ``another process`` where the lease does not say."""
    return f"process {holder['pid']} of {holder['host']}" if {"pid", "host"} <= holder.keys() else "another process"
