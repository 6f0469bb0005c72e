"""Writes results files: header, rows and endings of a run as lines."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import lock, write_atomic
from dgal_bench.results.reader import read_run
from dgal_bench.results.rows import RoundRecord, RunLog, Timing
from dgal_bench.results.schema import SCHEMA_VERSION, TIMINGS_VERSION, Line


class UnwritableError(ResultsError):
    """The results folder is not writable: stop the sweep."""


class FileWriter:
    """The only writer of a run's file: holds its lock, cuts a torn last line, appends and fsyncs.

    ``with FileWriter(path) as writer:``. A file without rows is started over, with a new header. A file of an older
    schema is rewritten in this one before the first new line. ``log``: the file as it was before, None: no row yet.
    ``command``: the words of ``dgal-bench run`` that make the same run, for a new header.

    Raises:
        LockHeldError: on entering: another process works on the run.
        ResultsError: on entering: the file is damaged, or of an unknown schema.
        UnwritableError: the file cannot be written.
    """

    def __init__(self, path: Path, command: Sequence[str] = ()) -> None:
        self.path = path
        self._command = list(command)
        self.log: RunLog | None = None
        self.header_written = False
        self._file: FileIO
        self._resources = ExitStack()
        self._old: RunLog | None = None

    def __enter__(self) -> "FileWriter":
        with ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(self.path))
                self._file = self.path.open("ab", buffering=0)
                stack.callback(lambda: self._file.close())
                log = read_run(self.path)
                self.log = log if log is not None and log.records else None  # without rows there is nothing to continue
                self.header_written = self.log is not None
                older = self.log is not None and self.log.lines[0]["schema_version"] < SCHEMA_VERSION
                self._old = self.log if older else None
                length = self.log.length if self.log else 0
                if os.fstat(self._file.fileno()).st_size != length:
                    self._file.truncate(length)
            except OSError as error:
                raise self._unwritable(error) from error
            self._resources = stack.pop_all()
        return self

    def _upgrade(self) -> None:
        """Rewrite an older schema's lines in this one, in one rename.

        Only when a line follows: by then the run is known to be resumable.
        """
        if self._old is None:
            return
        new = self.path.with_name(f".{self.path.name}.new")
        file = new.open("wb", buffering=0)
        try:
            _write(file, b"".join(_encode(line) for line in [self._old.header, *self._old.lines[1:]]))
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
        self._resources.close()

    def write_header(self, header: Line) -> None:
        command = {"command": self._command} if self._command else {}
        self.append({"kind": "header", "schema_version": SCHEMA_VERSION, **header, **command})
        self.header_written = True
        self._sync_folder()

    def write(self, record: RoundRecord) -> None:
        self.append({"kind": "round", **{k: v for k, v in asdict(record).items() if v is not None}})

    def write_failure(self, error: str, trace: str) -> None:
        self.append({"kind": "failure", "error": error, "traceback": trace})

    def write_skipped(self, why: str) -> None:
        self.append({"kind": "skipped", "why": why})

    def write_continuation(self, facts: Line) -> None:
        self.append({"kind": "continuation", **facts})

    def append(self, line: Line) -> None:
        """Add a line; it is permanent when this returns."""
        encoded = _encode(line)
        try:
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
                self._file.truncate(before)  # full disk: leave no torn line before the next one
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
    """Write all of it and fsync. An unbuffered file may take less than given, and buffers nothing."""
    n_written = 0
    while n_written < len(content):
        n_written += file.write(content[n_written:])
    os.fsync(file.fileno())


def _encode(line: Line) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def write_timings(path: Path, header: Mapping[str, Any], timings: Sequence[Timing]) -> None:
    """The whole file in one rename: a reader sees the previous one or this one.

    Raises:
        ResultsError: the folder is not writable.
    """
    first = {"kind": "timings", "schema_version": TIMINGS_VERSION, **header}
    lines = [first, *({"kind": "timing", **asdict(timing)} for timing in timings)]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_atomic(path, text.encode(), "make room, or allow it")
