"""Reads results files: JSON lines, one file for each run, from which a killed run is continued; and timings files.

Line 1 is the header; then one line per evaluation (``kind: round``), and where they happened ``kind: failure`` (the
error that ended an attempt), ``kind: skipped`` (why the run is impossible) and ``kind: continuation`` (where it was
resumed, and what was different).
"""

import json
import os
from pathlib import Path
from typing import Any

from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import find_files
from dgal_bench.results.rows import RunLog, Timings
from dgal_bench.results.schema import (
    RESTORE,
    SCHEMAS,
    TIMING,
    TIMINGS_HEADER,
    TIMINGS_VERSION,
    parse_line,
    read_header,
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
    lines = [_parse_json(line, f"{path}, line {number}") for number, line in enumerate(whole.splitlines(), start=1)]
    if not lines:
        return None
    header, records = read_header(lines[0], str(path)), []
    for number, line in enumerate(lines[1:], start=2):
        if line["kind"] in SCHEMAS:
            parsed = parse_line(SCHEMAS[line["kind"]], line, f"{path}, line {number}")
            records += [parsed] if line["kind"] == "round" else []
    if [r.round for r in records] != list(range(len(records))):
        raise ResultsError(f"{path}: rounds {[r.round for r in records]} are not 0, 1, 2, ...: the file was changed")
    if records and "initial" not in header:
        raise ResultsError(f"{path}, line 1: initial is missing, and there are rounds: {RESTORE}")
    return RunLog(
        path,
        header,
        tuple(records),
        failure=lines[-1] if lines[-1]["kind"] == "failure" else None,
        skipped=lines[-1] if lines[-1]["kind"] == "skipped" else None,
        continuations=tuple(line for line in lines if line["kind"] == "continuation"),
        lines=tuple(lines),
        length=len(whole),
    )


def _parse_json(line: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise ResultsError(f"{where}: not JSON ({error}): {RESTORE}") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("kind"), str):
        raise ResultsError(f"{where}: not a record: {RESTORE}")
    return parsed


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


def read_timings(path: Path) -> Timings | None:
    """The timings at ``path``; None where there is no file.

    Raises:
        ResultsError: the file is damaged, or of another version.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error}: remove it, or replay again") from error
    try:
        header, *lines = [_parse_json(line, f"line {number}") for number, line in enumerate(raw.splitlines(), start=1)]
        if (version := header.get("schema_version")) != TIMINGS_VERSION or header["kind"] != "timings":
            raise ResultsError(f"line 1: timings of schema {version}, where this version reads {TIMINGS_VERSION}")
        parse_line(TIMINGS_HEADER, header, "line 1")
        timings = tuple(parse_line(TIMING, line, f"line {number}") for number, line in enumerate(lines, start=2))
        if {line["kind"] for line in lines} != {"timing"} or {each.round for each in timings} != set(header["rounds"]):
            raise ResultsError("no timing of some round, or a line of another kind")
        for timing in timings:
            if not timing.query_seconds or min(timing.query_seconds) <= 0:
                raise ResultsError(f"no seconds of {timing.strategy} in round {timing.round}")
    except (ResultsError, ValueError) as error:
        what = str(error).removesuffix(f": {RESTORE}")
        raise ResultsError(f"{path} is damaged ({what}): remove it, and replay again") from error
    return Timings(path, header, timings)


def read_all_timings(root: Path) -> list[Timings]:
    """Every timings file under ``root``, in order of path; raises ResultsError for a damaged one."""
    return [timings for path in find_files(root, "timings-*.jsonl") if (timings := read_timings(path)) is not None]
