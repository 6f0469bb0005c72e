"""The record of a cell: an append-only JSON-lines file, fsynced line by line, from which a killed run goes on.

Line 1 is the header; then one line per evaluation (``kind: round``), and where they happened ``kind: failure`` (the
error that ended a try) and ``kind: continuation`` (who went on, and what was different).
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dgal_bench.errors import ResultsError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RoundRecord:
    """One evaluation, and the query that followed it unless it was the last.

    CHOICE_FIELDS are the same bits whenever the cell is run again; the rest are circumstances.
    """

    round: int
    n_labeled: int
    accuracy: float  # share of the test split, 0..1
    underfit: bool  # the training loss stayed above (ln C)/2
    epochs: int
    train_loss: float  # nats, mean of the last epoch
    reach: float  # share of points with h > 0 within T steps of the labels known so far
    train_seconds: float
    test_seconds: float
    threads: int
    jobs: int  # cells run side by side by this command
    load: float  # the machine's 1-minute load average
    indices: list[int] | None = None  # the batch, in order of preference
    classes: list[int] | None = None  # the oracle's answers
    n_candidates: int | None = None
    n_scored: int | None = None  # different points passed through the task network
    boundary_share: float | None = None  # differently labeled graph neighbours of the batch, mean share
    ties: float | None = None  # share of the restricted set that the tie-break chose
    query_seconds: float | None = None
    seconds: dict[str, float] | None = None  # by exclusive phase
    extra: dict[str, float] = field(default_factory=dict)  # what else a strategy noted
    propagated: dict[str, float] | None = None  # the test split classified by labels propagated over the graph alone
    extra_seconds: float = 0.0  # spent on facts of this row that are in no other time: reach, propagated
    rehearsal_seconds: float | None = None  # of one untimed query, before the first clock of the process
    halved_to: int | None = None  # images per pass, where predict_batch_size of them ran out of memory


CHOICE_FIELDS = (
    "round", "n_labeled", "accuracy", "underfit", "epochs", "train_loss", "reach", "indices", "classes",
    "n_candidates", "n_scored", "boundary_share", "ties", "extra", "propagated",
)  # fmt: skip


def choice(record: RoundRecord) -> dict[str, Any]:
    """The fields that a repetition must reproduce bit for bit."""
    return {name: getattr(record, name) for name in CHOICE_FIELDS}


@dataclass(frozen=True, eq=False)
class CellLog:
    """A results file read back: ``length`` is the bytes of its whole lines, before any torn last one."""

    path: Path
    header: dict[str, Any]
    records: tuple[RoundRecord, ...]
    failure: dict[str, Any] | None
    continuations: tuple[dict[str, Any], ...]
    length: int

    @property
    def rounds(self) -> int:
        return int(self.header["config"]["rounds"])

    @property
    def done(self) -> bool:
        return len(self.records) == self.rounds + 1

    @property
    def status(self) -> str:
        return "done" if self.done else "failed" if self.failure else "partial"


def read_cell(path: Path) -> CellLog | None:
    """The log at ``path``; None where there is none or not even a whole header was written.

    A torn last line (killed while writing) is left out. Anything else that does not parse is an error.

    Raises:
        ResultsError: a line before the last is damaged, rows are out of order, or another schema wrote the file.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    whole = raw[: raw.rfind(b"\n") + 1]
    lines = [_parse(path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]
    if not lines:
        return None
    header = lines[0]
    if header.get("schema_version") != SCHEMA_VERSION or header.get("kind") != "header":
        found = header.get("schema_version", "no schema_version")
        raise ResultsError(
            f"{path}, line 1: schema {found}, where this version reads {SCHEMA_VERSION}: use another results=DIR"
        )
    records = tuple(_record(path, n, line) for n, line in enumerate(lines, start=1) if line.get("kind") == "round")
    if [r.round for r in records] != list(range(len(records))):
        raise ResultsError(f"{path}: rounds {[r.round for r in records]} are not 0, 1, 2, ...: the file was changed")
    return CellLog(
        path,
        header,
        records,
        failure=lines[-1] if lines[-1]["kind"] == "failure" else None,
        continuations=tuple(line for line in lines if line["kind"] == "continuation"),
        length=len(whole),
    )


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise ResultsError(
            f"{path}, line {number}: not JSON ({error}): restore the line, or remove the file to start over"
        ) from error
    if not isinstance(parsed, dict) or "kind" not in parsed:
        raise ResultsError(f"{path}, line {number}: not a record: restore the line, or remove the file to start over")
    return parsed


def _record(path: Path, number: int, line: Mapping[str, Any]) -> RoundRecord:
    known = {f.name for f in fields(RoundRecord)}
    try:
        return RoundRecord(**{name: value for name, value in line.items() if name in known})
    except TypeError as error:
        raise ResultsError(f"{path}, line {number}: not a round record ({error})") from error


def read_results(root: Path) -> list[CellLog]:
    """Every cell under ``root``, in order of path; a file being started (no header yet) is left out.

    Raises:
        ResultsError: there is no such folder, no cell in it, or a file is damaged.
    """
    if not os.path.isdir(root):
        raise ResultsError(f"{root} is not a folder of results: run 'dgal-bench bench results={root}' first")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ResultsError(f"{root} cannot be read: Permission denied")
    logs = [log for path in sorted(root.rglob("seed-*.jsonl")) if (log := read_cell(path)) is not None]
    if not logs:
        raise ResultsError(f"{root} holds no results: run 'dgal-bench bench results={root}' first")
    return logs


class Recorder:
    """The one writer of a cell's file: holds its lock, cuts a torn last line, appends and fsyncs.

    ``with Recorder(path) as recorder:`` then ``recorder.log`` is what the file held (None: nothing whole).
    """

    def __init__(self, path: Path, patience_seconds: float = 15.0) -> None:
        self.path = path
        self.log: CellLog | None = None
        self._patience = patience_seconds
        self.header_written = False
        self._file: BinaryIO

    def __enter__(self) -> "Recorder":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        except OSError as error:
            raise ResultsError(f"{self.path} cannot be written: {error.strerror}: set results=DIR") from error
        try:
            self._lock()
            self.log = read_cell(self.path)
            self.header_written = self.log is not None
            self._file.truncate(self.log.length if self.log else 0)
        except BaseException:
            self._file.close()
            raise
        return self

    def _lock(self) -> None:
        """Wait a little: the workers of a killed run die within moments of it."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ResultsError(f"{self.path} is being written by another process: let it finish") from None
                time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write_header(self, header: Mapping[str, Any]) -> None:
        self._append({"kind": "header", "schema_version": SCHEMA_VERSION, **header})
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        self.header_written = True

    def write(self, record: RoundRecord) -> None:
        self._append({"kind": "round", **{k: v for k, v in asdict(record).items() if v is not None}})

    def write_failure(self, error: str, trace: str) -> None:
        self._append({"kind": "failure", "error": error, "traceback": trace})

    def write_continuation(self, facts: Mapping[str, Any]) -> None:
        self._append({"kind": "continuation", **facts})

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ResultsError(f"{self.path} cannot be written: {error.strerror}; what it holds is kept") from error


def picks(records: Sequence[RoundRecord]) -> list[int]:
    """Every position labeled by a query so far, in order."""
    return [position for record in records for position in record.indices or []]
