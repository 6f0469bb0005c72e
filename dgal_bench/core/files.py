"""Who works on a file, on storage that several hosts share: a lease beside it, with a heartbeat.

Between processes of one host ``flock`` decides, which death releases. Between hosts it cannot be trusted, so whoever
holds the lock also takes a lease and keeps touching it; one that has not been touched for MISSED_BEATS heartbeats is of
a holder that is gone, and is taken over.

A lease is a directory that holds one file, named by its holder's token. A contender fills a directory of its own and
renames it to the lease's name, which a file system allows where that is free or an empty directory: one of many gets
there. Whoever takes over first removes the dead holder's file, by a name that no other lease has: what is fresh is
never taken away by mistake, however late a contender acts on what it saw.
"""

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

# Files below a folder, files that a reader sees whole, folders that take files; what to turn where a disk refuses.


def find_files(root: Path, pattern: str) -> list[Path]:
    """Files and folders under ``root`` by their name, sorted; what others take away meanwhile is not there.

    (``Path.rglob`` fails where a folder, a lease say, goes between being listed and being looked into.)
    """
    named = (Path(at, name) for at, folders, files in os.walk(root) for name in [*folders, *files])
    return sorted(path for path in named if fnmatchcase(path.name, pattern))


def write_atomic(path: Path, content: bytes, knob: str) -> None:
    """A file in one rename, its folder made where there is none: a reader sees what was there before, or all of this.

    Raises:
        ResultsError: the folder takes no file; it ends with ``knob``, what the user can do.
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
    """Make the folder where there is none, and see that files can be made in it.

    Raises:
        ResultsError: they cannot; it begins with ``name``, the folder as the user has said it, and ends with ``knob``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"{name} cannot be written: {error.strerror}: {knob}") from error
    if not os.access(folder, os.W_OK):
        raise ResultsError(f"{name} cannot be written: {knob}")


BEAT_SECONDS = 10.0
MISSED_BEATS = 5
_TRIES = 500  # some seconds
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # some parallel file systems


class LockHeldError(ResultsError):
    """Another process works on it now."""


@cache
def boot_id() -> str:
    """Differs between machines, two lives of one, and containers, which do not see each other's processes."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    return platform.node()


def process_start(pid: int) -> int | None:
    """Clock ticks after boot at which the process began, which tells it from a later one of its number; None: gone."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return None


def lease_path(path: Path) -> Path:
    """The lease of a file: ``seed-0.jsonl.lease``, a directory."""
    return path.with_name(path.name + ".lease")


def holder(path: Path) -> dict[str, Any] | None:
    """What the lease of ``path`` says: token, and host, boot, pid, start; None where there is none."""
    token = ""
    try:
        # NFS keeps what is removed while somebody reads it, under a name with a dot
        token, *_ = [name for name in os.listdir(lease_path(path)) if not name.startswith(".")] or [""]
        said = json.loads((lease_path(path) / token).read_text()) if token else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        said = {}
    return {**(said if isinstance(said, dict) else {}), "token": token} if token else None


def locked(file: int) -> bool:
    """Take the flock of an open file; False where another process of this host has it, or a sibling's descriptor."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def live_holder(path: Path) -> dict[str, Any] | None:
    """The holder of ``path`` where it seems alive, for a reader who wants no lock."""
    said = holder(path)
    with suppress(OSError):
        return said if said is not None and _is_alive(path, said) else None
    return None


def _is_alive(path: Path, said: Mapping[str, Any]) -> bool:
    """Whether a holder's heart beats, and its process is there as far as can be seen; raises FileNotFoundError."""
    if said.get("boot") == boot_id() and process_start(said.get("pid", 0)) != said.get("start"):
        return False
    age = _server_time(path) - (lease_path(path) / said["token"]).stat().st_mtime
    return bool(age <= MISSED_BEATS * BEAT_SECONDS)


def _server_time(path: Path) -> float:
    """The time by the clock of the file system, so that no two hosts need agree; by ours for who may only read."""
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
    """The right to work on ``path``, for who holds its flock: ``with Lease(path) as lease:``, ``lease.check()``.

    Raises:
        HeldError: on entering: another process has it, and its heart beats.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = uuid.uuid4().hex
        self._file = lease_path(path) / self._token
        self._over = threading.Event()

    def __enter__(self) -> "Lease":
        pid = os.getpid()
        facts = {"host": platform.node(), "boot": boot_id(), "pid": pid, "start": process_start(pid)}
        own = self._path.with_name(f".{self._path.name}.{self._token}")
        try:
            own.mkdir()
            (own / self._token).write_text(json.dumps(facts))
            for _ in range(_TRIES):
                if self._taken(own):
                    break
                self._displace()
                time.sleep(int(self._token[:2], 16) / 12_800)  # up to 0.02 s, each its own: a crowd must not keep step
            else:
                raise LockHeldError(f"{lease_path(self._path)} holds what is no lease: remove it")
        finally:
            shutil.rmtree(own, ignore_errors=True)
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def _taken(self, own: Path) -> bool:
        """Whether our directory got the name, and the file in it with it: nobody sees half a lease."""
        try:
            own.rename(lease_path(self._path))
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            return False
        return True

    def _displace(self) -> None:
        """Put a dead holder's lease away, or raise HeldError."""
        said = holder(self._path)
        with suppress(FileNotFoundError):
            if said is not None and _is_alive(self._path, said):
                raise LockHeldError(f"{self._path} is being written by {holder_name(said)}: let it finish")
            _remove(self._path, said["token"] if said else None)

    def check(self) -> None:
        """Raises HeldError where another has taken over meanwhile: this process stood still for too many beats.

        It is a heartbeat, too: to be told the time of is the one question that a network's cache does not answer.
        """
        try:
            os.utime(self._file)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            by = holder_name(holder(self._path) or {})
            raise LockHeldError(f"{self._path} was taken over by {by} while this process stood still") from error

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self.check()
            except LockHeldError:
                return
            except OSError:
                continue  # storage may recover before the beats that others wait for have passed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        with suppress(OSError):
            _remove(self._path, self._token)


def _remove(path: Path, token: str | None) -> None:
    """That holder's lease and no other; None: the directory that one left who died while removing it."""
    if token is not None:
        (lease_path(path) / token).unlink()
    with suppress(OSError):  # somebody has moved in already
        lease_path(path).rmdir()


def release_lease(path: Path, pid: int) -> None:
    """Remove the lease of a process of this host that has been killed: other hosts need not wait for its heartbeat."""
    said = holder(path)
    if said and said.get("boot") == boot_id() and said.get("pid") == pid:
        with suppress(FileNotFoundError):
            _remove(path, said["token"])


def holder_name(said: Mapping[str, Any]) -> str:
    """``process 123 of host``, as far as a lease tells."""
    return f"process {said['pid']} of {said['host']}" if {"pid", "host"} <= said.keys() else "another process"
