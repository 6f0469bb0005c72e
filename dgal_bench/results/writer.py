"""The record of a run, written: header, rows and endings as lines, to its file or to whoever holds that."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import Lease, LockHeldError, holder, holder_name, locked, write_atomic
from dgal_bench.results.reader import read_run
from dgal_bench.results.rows import SCHEMA_VERSION, TIMINGS_VERSION, RoundRecord, RunLog, Timing, migrate

Line = Mapping[str, Any]


class UnwritableError(ResultsError):
    """The results folder takes no more lines: no other run would fare better."""


class RowWriter(ABC):
    """Writes what happens in a run, a line at a time; ``log`` is what was there before, None: no row yet."""

    def __init__(self, path: Path, log: RunLog | None = None) -> None:
        self.path = path
        self.log = log
        self.header_written = log is not None

    @abstractmethod
    def append(self, line: Line) -> None:
        """Make a line part of the record, for good once this returns."""

    def write_header(self, header: Line) -> None:
        self.append({"kind": "header", "schema_version": SCHEMA_VERSION, **header})
        self.header_written = True

    def write(self, record: RoundRecord) -> None:
        self.append({"kind": "round", **{k: v for k, v in asdict(record).items() if v is not None}})

    def write_failure(self, error: str, trace: str) -> None:
        self.append({"kind": "failure", "error": error, "traceback": trace})

    def write_skipped(self, why: str) -> None:
        self.append({"kind": "skipped", "why": why})

    def write_continuation(self, facts: Line) -> None:
        self.append({"kind": "continuation", **facts})


class ForwardingWriter(RowWriter):
    """Hands every line to ``send``, for a run whose file is held elsewhere: by the driver of a sweep.

    A line is there for good when the driver has it: what a death loses on the way is made again, to the same bits.
    """

    def __init__(self, path: Path, log: RunLog | None, send: Callable[[Line], None]) -> None:
        super().__init__(path, log)
        self._send = send

    def append(self, line: Line) -> None:
        self._send(line)


class FileWriter(RowWriter):
    """The one writer of a run's file: holds its lock and lease, cuts a torn last line, appends and fsyncs.

    ``with FileWriter(path) as recorder:``. A file without rows is begun anew, whatever its header said; one of an older
    schema that is to go on is first written again in this one.

    Raises:
        HeldError: on entering: another process works on the run.
        ResultsError: on entering: the file is damaged, or another schema's.
        UnwritableError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file: FileIO
        self._lease = Lease(path)
        self._held = ExitStack()
        self._old: RunLog | None = None

    def __enter__(self) -> "FileWriter":
        with ExitStack() as opened:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._open()
                opened.callback(lambda: self._file.close())
                self._lease = opened.enter_context(Lease(self.path))
                log = read_run(self.path)
                self.log = log if log is not None and log.records else None  # nothing rests on a file without rows
                self.header_written = self.log is not None
                older = self.log is not None and self.log.lines[0]["schema_version"] < SCHEMA_VERSION
                self._old = self.log if older else None
                length = self.log.length if self.log else 0
                if os.fstat(self._file.fileno()).st_size != length:
                    self._file.truncate(length)
            except OSError as error:
                raise self._unwritable(error) from error
            self._held = opened.pop_all()
        return self

    def _open(self) -> None:
        """The file, locked; again where it was replaced by a newer one before the lock was had."""
        while True:
            self._file = self.path.open("ab", buffering=0)
            if not locked(self._file.fileno()):
                self._file.close()
                raise LockHeldError(
                    f"{self.path} is being written by {holder_name(holder(self.path) or {})}: let it finish"
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                    return
            self._file.close()

    def _upgrade(self) -> None:
        """The lines of an older schema in this version's, in one rename; the new file is locked before it has the name.

        Only when a line follows: by then the file has been found fit to go on.
        """
        if self._old is None:
            return
        new = self.path.with_name(f".{self.path.name}.new")
        file = new.open("wb", buffering=0)
        try:
            locked(file.fileno())
            _write(file, b"".join(_encode(line) for line in migrate(self._old.lines, str(self.path))))
            new.rename(self.path)
        except BaseException:
            file.close()
            new.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file, self._old = file, None
        self._sync_folder()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def write_header(self, header: Line) -> None:
        super().write_header(header)
        self._sync_folder()

    def append(self, line: Line) -> None:
        encoded = _encode(line)
        try:
            self._lease.check()
            self._upgrade()
            self._add(encoded)
        except OSError as error:
            raise self._unwritable(error) from error

    def _add(self, encoded: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        try:
            _write(self._file, encoded)
        except OSError:
            with suppress(OSError):
                self._file.truncate(before)  # of a full disk: no torn line for the next to trip over
            raise

    def _sync_folder(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _unwritable(self, error: OSError) -> UnwritableError:
        return UnwritableError(
            f"{self.path} cannot be written: {error.strerror}; what it holds is kept: make room, or set results=DIR"
        )


def _write(file: FileIO, content: bytes) -> None:
    """All of it, on the disk; an unbuffered file may take less at a time, and keeps nothing back for later."""
    n_written = 0
    while n_written < len(content):
        n_written += file.write(content[n_written:])
    os.fsync(file.fileno())


def _encode(line: Line) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def write_timings(path: Path, header: Mapping[str, Any], timings: Sequence[Timing]) -> None:
    """The whole file in one rename: a reader sees the last one or this one.

    Raises:
        ResultsError: the folder takes no file.
    """
    first = {"kind": "timings", "schema_version": TIMINGS_VERSION, **header}
    lines = [first, *({"kind": "timing", **asdict(timing)} for timing in timings)]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_atomic(path, text.encode(), "make room, or allow it")
