"""The record of a cell, read: JSON lines, one file a cell, from which a killed run goes on.

Line 1 is the header; then one line per evaluation (``kind: round``), and where they happened ``kind: failure`` (the
error that ended a try), ``kind: skipped`` (why the cell cannot be) and ``kind: continuation`` (who went on, and what
was different).
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from dgal_bench.config import SECTIONS
from dgal_bench.disk import below
from dgal_bench.errors import ResultsError
from dgal_bench.schema import ESSENTIAL, RESTORE, check, migrated, misfit


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
    jobs: int  # cells at work on this machine, this one included; of schema 1: those of this command
    load: float  # the machine's 1-minute load average
    busy_elsewhere: float | None = None  # cores that other processes kept busy during the round; None: not known
    indices: list[int] | None = None  # the batch, in order of preference
    classes: list[int] | None = None  # the oracle's answers
    n_candidates: int | None = None
    candidates: str | None = None  # hash of their positions; None in files of before
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
    "n_candidates", "candidates", "n_scored", "boundary_share", "ties", "extra", "propagated",
)  # fmt: skip


PHASES = frozenset({"embed", "index", "search", "diffuse", "select", "infer", "acquire", "aux_train"})
"""Of a query, exclusive."""


def choice(record: RoundRecord) -> dict[str, Any]:
    """The fields that a repetition must reproduce bit for bit."""
    return {name: getattr(record, name) for name in CHOICE_FIELDS}


@dataclass(frozen=True, eq=False)
class CellLog:
    """A results file read back, in this version's terms.

    ``lines`` are its whole lines as they stand there, ``length`` their bytes, before any torn last one.
    """

    path: Path
    header: Mapping[str, Any]
    records: tuple[RoundRecord, ...]
    failure: Mapping[str, Any] | None
    skipped: Mapping[str, Any] | None
    continuations: tuple[Mapping[str, Any], ...]
    lines: tuple[Mapping[str, Any], ...]
    length: int

    @property
    def rounds(self) -> int:
        return int(self.header["config"]["rounds"])

    @property
    def done(self) -> bool:
        return len(self.records) == self.rounds + 1

    @property
    def status(self) -> str:
        """done, failed, skipped or partial (begun, and nothing the matter)."""
        return "done" if self.done else "failed" if self.failure else "skipped" if self.skipped else "partial"

    @property
    def begun(self) -> bool:
        """Whether it has ever started: otherwise the header says only which cell it is, and the next line why not."""
        return "initial" in self.header


def read_cell(path: Path) -> CellLog | None:
    """The log at ``path``; None where there is none or not even a whole header was written.

    A torn last line (killed while writing) is left out. Anything else that does not parse is an error.

    Raises:
        ResultsError: a line before the last is damaged, rows are out of order, another schema wrote the file, or what
            every reader relies on is not there or something else; it names file, line and field.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    return parse_cell(path, raw)


def parse_cell(path: Path, raw: bytes) -> CellLog | None:
    """The log in the bytes of a results file; ``path`` is its name, for messages too. See read_cell."""
    whole = raw[: raw.rfind(b"\n") + 1]
    found = [_parse(path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]
    if not found:
        return None
    lines = migrated(found, str(path))
    sections = {f"config.{name}": (dict,) for name in SECTIONS if name in lines[0]["config"]}
    check(lines[0], {**ESSENTIAL, **sections}, str(path))
    for number, line in enumerate(lines[1:], start=2):
        _check_line(path, number, line)
    records = tuple(_record(path, n, line) for n, line in enumerate(lines, start=1) if line["kind"] == "round")
    if [r.round for r in records] != list(range(len(records))):
        raise ResultsError(f"{path}: rounds {[r.round for r in records]} are not 0, 1, 2, ...: the file was changed")
    if records:
        check(lines[0], {"initial": (list,)}, str(path))
    last = lines[-1]
    return CellLog(
        path,
        lines[0],
        records,
        failure=last if last["kind"] == "failure" else None,
        skipped=last if last["kind"] == "skipped" else None,
        continuations=tuple(line for line in lines if line["kind"] == "continuation"),
        lines=tuple(found),
        length=len(whole),
    )


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise ResultsError(f"{path}, line {number}: not JSON ({error}): {RESTORE}") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("kind"), str):
        raise ResultsError(f"{path}, line {number}: not a record: {RESTORE}")
    return parsed


@dataclass(frozen=True)
class _Kinds:
    """The JSON types of a field, and of what is in it where it is a list or an object."""

    outer: frozenset[type]
    inner: frozenset[type]

    @classmethod
    def of(cls, hint: Any) -> "_Kinds":
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        inner = {get_args(one)[-1] for one in options if get_args(one)}
        noted = {bool} if float in inner else set()  # of a plugin's fact, which may be true or false
        return cls(_json({get_origin(one) or one for one in options}), _json(inner | noted))


def _json(kinds: set[type]) -> frozenset[type]:
    return frozenset(kinds | {int} if float in kinds else kinds)  # 1.0 may stand there as 1


_FIELDS: Mapping[str, Mapping[str, _Kinds]] = {
    "round": {f.name: _Kinds.of(f.type) for f in fields(RoundRecord)},
    "failure": {"error": _Kinds.of(str)},
    "skipped": {"why": _Kinds.of(str)},
    "continuation": {"changed": _Kinds.of(list[str])},
}
"""By kind of line what readers rely on; which fields a round must have, RoundRecord says."""


def _check_line(path: Path, number: int, line: Mapping[str, Any]) -> None:
    for name, kinds in _FIELDS.get(line["kind"], {}).items():
        if name in line:
            value = line[name]
            if type(value) not in kinds.outer:  # not isinstance: true is no number
                raise ResultsError(f"{path}, line {number}: {name}: {misfit(value, kinds.outer)}")
            for one in (value.values() if isinstance(value, dict) else value) if value and kinds.inner else ():
                if type(one) not in kinds.inner:
                    raise ResultsError(f"{path}, line {number}: in {name}: {misfit(one, kinds.inner)}")
        elif line["kind"] != "round":
            raise ResultsError(f"{path}, line {number}: a {line['kind']} without '{name}': {RESTORE}")


def _record(path: Path, number: int, line: Mapping[str, Any]) -> RoundRecord:
    known = {f.name for f in fields(RoundRecord)}
    try:
        return RoundRecord(**{name: value for name, value in line.items() if name in known})
    except TypeError as error:
        raise ResultsError(f"{path}, line {number}: not a round record ({error})") from error


def cell_files(root: Path) -> list[Path]:
    """The results files under ``root``, in order.

    Raises:
        ResultsError: there is no such folder, it cannot be read, or there is none in it.
    """
    if not os.path.isdir(root):
        raise ResultsError(f"{root} is not a folder of results: run 'dgal-bench bench results={root}' first")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ResultsError(f"{root} cannot be read: Permission denied")
    files = below(root, "seed-*.jsonl")
    if not files:
        raise ResultsError(f"{root} holds no results: run 'dgal-bench bench results={root}' first")
    return files


def read_results(root: Path) -> list[CellLog]:
    """Every cell under ``root``, in order of path; a file being started (no header yet) is left out.

    Raises:
        ResultsError: there is no such folder, no cell in it, or a file is damaged.
    """
    logs = [log for path in cell_files(root) if (log := read_cell(path)) is not None]
    if not logs:
        raise ResultsError(f"{root} holds no results: run 'dgal-bench bench results={root}' first")
    return logs


def picks(records: Sequence[RoundRecord]) -> list[int]:
    """Every position labeled by a query so far, in order."""
    return [position for record in records for position in record.indices or []]
