"""Reads results files: JSON lines, one file for each run, from which a killed run is continued; and timings files.

Line 1 is the header; then one line per evaluation (``kind: round``), and where they happened ``kind: failure`` (the
error that ended an attempt), ``kind: skipped`` (why the run is impossible) and ``kind: continuation`` (where it was
resumed, and what was different).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from dgal_bench.config.schema import SECTIONS
from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import find_files
from dgal_bench.results.rows import (
    ESSENTIAL,
    RESTORE,
    TIMINGS_VERSION,
    RoundRecord,
    RunLog,
    Timing,
    Timings,
    check_header,
    migrate,
    misfit_message,
)


def read_run(path: Path) -> RunLog | None:
    """The log at ``path``; None where there is no file, or no complete header in it.

    A torn last line (killed while writing) is left out. Anything else that does not parse is an error.

    Raises:
        ResultsError: a complete line is damaged, rows are out of order, the schema is unknown, or a field that every
            reader needs is missing or of another type; the message names file, line and field.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    return parse_run(path, raw)


def parse_run(path: Path, raw: bytes) -> RunLog | None:
    """As ``read_run``, from the bytes of the file; ``path`` is the name that the log and messages give."""
    whole = raw[: raw.rfind(b"\n") + 1]
    parsed = [_parse_line(path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]
    if not parsed:
        return None
    lines = migrate(parsed, str(path))
    sections = {f"config.{name}": (dict,) for name in SECTIONS if name in lines[0]["config"]}
    check_header(lines[0], {**ESSENTIAL, **sections}, str(path))
    for number, line in enumerate(lines[1:], start=2):
        _check_line(path, number, line)
    records = tuple(_record(path, n, line) for n, line in enumerate(lines, start=1) if line["kind"] == "round")
    if [r.round for r in records] != list(range(len(records))):
        raise ResultsError(f"{path}: rounds {[r.round for r in records]} are not 0, 1, 2, ...: the file was changed")
    if records:
        check_header(lines[0], {"initial": (list,)}, str(path))
    last = lines[-1]
    return RunLog(
        path,
        lines[0],
        records,
        failure=last if last["kind"] == "failure" else None,
        skipped=last if last["kind"] == "skipped" else None,
        continuations=tuple(line for line in lines if line["kind"] == "continuation"),
        lines=tuple(parsed),
        length=len(whole),
    )


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise ResultsError(f"{path}, line {number}: not JSON ({error}): {RESTORE}") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("kind"), str):
        raise ResultsError(f"{path}, line {number}: not a record: {RESTORE}")
    return parsed


@dataclass(frozen=True)
class _Kinds:
    """JSON types of a field, and of the items of a list or the values of an object."""

    outer: frozenset[type]
    inner: frozenset[type]

    @classmethod
    def of(cls, hint: Any) -> "_Kinds":
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        inner = {get_args(option)[-1] for option in options if get_args(option)}
        if float in inner:
            inner.add(bool)  # a plugin's fact in ``extra`` may be true or false
        return cls(_json_types({get_origin(option) or option for option in options}), _json_types(inner))


def _json_types(kinds: set[type]) -> frozenset[type]:
    return frozenset(kinds | {int} if float in kinds else kinds)  # 1.0 may be written as 1


_FIELDS: Mapping[str, Mapping[str, _Kinds]] = {
    "round": {f.name: _Kinds.of(f.type) for f in fields(RoundRecord)},
    "failure": {"error": _Kinds.of(str)},
    "skipped": {"why": _Kinds.of(str)},
    "continuation": {"changed": _Kinds.of(list[str])},
}
"""By kind of line the fields that readers need. RoundRecord decides which of a round's fields are required."""


def _check_line(path: Path, number: int, line: Mapping[str, Any]) -> None:
    for name, kinds in _FIELDS.get(line["kind"], {}).items():
        if name in line:
            value = line[name]
            if type(value) not in kinds.outer:  # not isinstance: true is no number
                raise ResultsError(f"{path}, line {number}: {name}: {misfit_message(value, kinds.outer)}")
            for item in (value.values() if isinstance(value, dict) else value) if value and kinds.inner else ():
                if type(item) not in kinds.inner:
                    raise ResultsError(f"{path}, line {number}: in {name}: {misfit_message(item, kinds.inner)}")
        elif line["kind"] != "round":
            raise ResultsError(f"{path}, line {number}: a {line['kind']} without '{name}': {RESTORE}")


def _record(path: Path, number: int, line: Mapping[str, Any]) -> RoundRecord:
    names = {f.name for f in fields(RoundRecord)}
    try:
        return RoundRecord(**{name: value for name, value in line.items() if name in names})
    except TypeError as error:
        raise ResultsError(f"{path}, line {number}: not a round record ({error})") from error


def run_files(root: Path) -> list[Path]:
    """The results files under ``root``, in order.

    Raises:
        ResultsError: there is no such folder, it cannot be read, or it holds no results file.
    """
    if not os.path.isdir(root):
        raise ResultsError(f"{root} is not a folder of results: run 'dgal-bench bench results={root}' first")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ResultsError(f"{root} cannot be read: Permission denied")
    files = find_files(root, "seed-*.jsonl")
    if not files:
        raise ResultsError(f"{root} holds no results: run 'dgal-bench bench results={root}' first")
    return files


def read_results(root: Path) -> list[RunLog]:
    """Every run under ``root``, in order of path; a file without a complete header is left out.

    Raises:
        ResultsError: there is no such folder, no run in it, or a file is damaged.
    """
    logs = [log for path in run_files(root) if (log := read_run(path)) is not None]
    if not logs:
        raise ResultsError(f"{root} holds no results: run 'dgal-bench bench results={root}' first")
    return logs


def timings_path(run: Path) -> Path:
    """``timings-seed-0.jsonl`` for ``seed-0.jsonl``."""
    return run.with_name(f"timings-{run.name}")


def read_timings(path: Path) -> Timings | None:
    """The timings at ``path``; None where there is no file.

    Raises:
        ResultsError: the file is damaged, or of another version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read: {error}: remove it, or replay again") from error
    try:
        header, *lines = [json.loads(line) for line in text.splitlines()]
        version = header["schema_version"] if header["kind"] == "timings" else None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_error(path, error) from error
    if version != TIMINGS_VERSION:
        raise ResultsError(
            f"{path}, line 1: timings of schema {version}, where this version reads {TIMINGS_VERSION}: remove it, "
            "and replay again"
        )
    try:
        timings = tuple(_parse_timing(line) for line in lines)
        missing = {"cell", "common", "picks", "rounds", "repeats", "fingerprint", "provenance"} - header.keys()
        if missing or not timings or {timing.round for timing in timings} != set(header["rounds"]):
            raise ValueError(f"no {', '.join(sorted(missing)) or 'timing of some round'}")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_error(path, error) from error
    return Timings(path, header, timings)


def _parse_timing(line: Mapping[str, Any]) -> Timing:
    if line["kind"] != "timing":
        raise ValueError(f"a line of kind {line['kind']}")
    timing = Timing(**{name: value for name, value in line.items() if name != "kind"})
    if not timing.query_seconds or min(timing.query_seconds) <= 0:
        raise ValueError(f"no seconds of {timing.strategy} in round {timing.round}")
    return timing


def _damaged_error(path: Path, error: Exception) -> ResultsError:
    return ResultsError(f"{path} is damaged ({error}): remove it, and replay again")


def read_all_timings(root: Path) -> list[Timings]:
    """Every timings file under ``root``, in order of path; raises ResultsError for a damaged one."""
    return [timings for path in find_files(root, "timings-*.jsonl") if (timings := read_timings(path)) is not None]
