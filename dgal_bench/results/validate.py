"""``dgal-bench validate``: every results file against its schema, its own header, its place and the other files."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgal_bench.core.errors import ResultsError
from dgal_bench.core.files import find_files, lock_holder
from dgal_bench.results.projection_file import file_name, read_file
from dgal_bench.results.reader import read_run, read_timings, run_files
from dgal_bench.results.rows import COMMON, PHASES, RoundRecord, RunLog, Timing, Timings
from dgal_bench.results.schema import (
    NEW_IN_2,
    ROUND,
    SCHEMAS,
    TIMING,
    TIMINGS_HEADER,
    Line,
    check_version,
    complete_header,
    config_hashes,
    find_misfits,
    header_schema,
    parse_line,
)

Problem = tuple[int, str]
"""A line's number, 0 for the whole file, and what is wrong."""


@dataclass
class FileReport:
    """Problems and notes of a file. ``header``: in this version's terms; None where it cannot be read."""

    path: Path
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    header: Line | None = None
    n_rounds: int = 0

    @property
    def begun(self) -> bool:
        return self.header is not None and "initial" in self.header


AT_MOST = 5
"""Problems of one file that are listed; the others are only counted."""


@dataclass(frozen=True)
class ValidationResult:
    """``problems`` and ``notes``: a line each. A note needs no correction."""

    problems: Sequence[str]
    notes: Sequence[str]
    n_problems: int
    n_files: int
    n_rounds: int

    @property
    def text(self) -> str:
        """A line each, and the count."""
        total = f"{self.n_problems} problem{'s' * (self.n_problems != 1)}" if self.n_problems else "nothing wrong"
        count = f"{self.n_files} files, {self.n_rounds} rounds: {total}"
        return "\n".join([*self.problems, *(f"note: {note}" for note in self.notes), count])


def validate(root: Path) -> ValidationResult:
    """Check all files of rows, timings and projections under ``root``: a folder of results, a suite or a data set.

    Raises:
        ResultsError: there is no such folder, or it holds no results file.
    """
    runs = [examine_run_file(path) for path in run_files(root)]
    check_duplicates(runs)
    check_initial_sets(runs)
    reports = [*runs, *(examine_timings(path) for path in find_files(root, "timings-*.jsonl"))]
    reports += [examine_projection(path, runs) for path in find_files(root, "projection-*.npz")]
    return ValidationResult(
        [line for report in reports for line in _problem_lines(report.path, report.problems)],
        [line for report in reports for line in _problem_lines(report.path, report.notes)]
        + [f"{path}: {what}" for path, what in leftovers(root)],
        sum(len(report.problems) for report in reports),
        len(reports),
        sum(report.n_rounds for report in reports),
    )


def _problem_lines(path: Path, problems: Sequence[Problem]) -> list[str]:
    lines = [f"{path}, line {number}: {what}" if number else f"{path}: {what}" for number, what in problems[:AT_MOST]]
    return lines + ([f"{path}: and {len(problems) - AT_MOST} more"] if len(problems) > AT_MOST else [])


def examine_run_file(path: Path) -> FileReport:
    """Every problem of a results file, without the others; raises nothing."""
    report = FileReport(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        report.problems.append((0, f"cannot be read: {error.strerror}"))
        return report
    *whole, torn = raw.split(b"\n")
    if torn:
        report.notes.append((len(whole) + 1, "torn: killed while writing; the next run cuts it"))
    if not whole:
        report.notes.append((0, "no whole header yet: the next run starts it over"))
        return report
    lines = _parse_lines(whole, report)
    if 1 not in lines:
        return report
    report.header = _complete_header(lines[1], report)
    if report.header is not None:
        header = lines.pop(1)
        _check_header(path, report.header, header, report)
        _check_lines(lines, header["schema_version"], report)
    return report


def _parse_lines(whole: Sequence[bytes], report: FileReport) -> dict[int, dict[str, Any]]:
    """The lines that are JSON objects with a kind, by number."""
    lines = {}
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            report.problems.append((number, f"not JSON: {error}"))
            continue
        if isinstance(line, dict) and isinstance(line.get("kind"), str):
            lines[number] = line
        else:
            report.problems.append((number, "not a record: no JSON object with a kind"))
    return lines


def _complete_header(line: Line, report: FileReport) -> Line | None:
    """Line 1 in this version's terms; None where it is wrong, with the problems in ``report``."""
    try:
        check_version(line, "")
    except ResultsError as error:
        report.problems.append((1, str(error).partition("line 1: ")[2]))
        return None
    header = complete_header(line)
    wrong = find_misfits(header_schema(line), header)
    report.problems += [(1, what) for what in wrong]
    return None if wrong else header


def _check_header(path: Path, header: Line, raw: Line, report: FileReport) -> None:
    """``raw`` is the header as in the file: the hash in it is of that configuration."""
    wrong = [*_place(path, header), *_hashes(raw), *(_initial(header) if report.begun else ())]
    report.problems += [(1, what) for what in wrong]


def _place(path: Path, header: Line) -> Iterator[str]:
    """A file's path and its header name the same run."""
    _, dataset, label, name = ("", "", "", *path.resolve().parts)[-4:]
    config = header["config"]
    name_in_header, strategy = config["dataset"]["name"], config["strategy"]["name"]
    if dataset != name_in_header:
        yield f"it is of data set '{name_in_header}', but in the folder '{dataset}'"
    if label != strategy and not label.startswith(f"{strategy}+"):
        yield f"it is of strategy '{strategy}', but in the folder '{label}'"
    if name != f"seed-{config['seed']}.jsonl":
        yield f"it is of seed {config['seed']}, but named {name}"
    if header["cell"] != (expected := f"{dataset}/{label}/{name.removesuffix('.jsonl')}"):
        yield f"it is of run '{header['cell']}', where its place says '{expected}'"


_HEX = re.compile("[0-9a-f]{16,64}")
_SHA256 = re.compile("[0-9a-f]{64}")


def _hashes(header: Line) -> Iterator[str]:
    fingerprint, full = header["fingerprint"], header["config"]["initial_size"] is None
    if fingerprint["config"] not in config_hashes(header):
        yield f"fingerprint.config {fingerprint['config'][:8]} is not the hash of the configuration beside it"
    for name in ("data", "latents", "graph", "weights", "files"):
        value = fingerprint.get(name)
        if value is None or (full and name in ("latents", "graph") and value == "none"):
            continue
        if not (_SHA256 if name == "data" else _HEX).fullmatch(value):
            yield f"fingerprint.{name} '{value[:20]}' is no hash"


def _initial(header: Line) -> Iterator[str]:
    initial, size, protocol = header["initial"], header["config"]["initial_size"], protocol_of(header)
    expected = protocol.pool if size is None else size
    if expected is not None and len(initial) != expected:
        yield f"{len(initial)} first labels, where initial_size={expected}"
    yield from check_positions("first labels", initial, protocol.pool)
    classes, n_classes = header.get("initial_classes"), protocol.n_classes
    if classes is not None and len(classes) != len(initial):
        yield f"{len(classes)} initial_classes of {len(initial)} first labels"
    if wrong := [label for label in classes or [] if label < 0 or (n_classes is not None and label >= n_classes)]:
        yield f"{wrong[0]} in initial_classes, where there are {n_classes}"


def _check_lines(lines: Mapping[int, Line], version: int, report: FileReport) -> None:
    rows: list[tuple[int, RoundRecord | None]] = []
    for number, line in lines.items():
        wrong = list(_line_misfits(line, version))
        report.problems += [(number, what) for what in wrong]
        if line["kind"] == "round":
            rows.append((number, None if wrong else parse_line(ROUND, line, f"line {number}")))
    report.n_rounds = len(rows)
    report.problems += [*_order(lines, rows, report)]
    if report.header is not None and report.begun:
        report.problems += row_problems(protocol_of(report.header), report.header["initial"], rows)
    _check_clocks([(number, row) for number, row in rows if row is not None], report)
    report.problems.sort(key=lambda problem: problem[0])


def _line_misfits(line: Line, version: int) -> Iterator[str]:
    kind = line["kind"]
    if kind == "header":
        yield "a second header"
    elif kind not in SCHEMAS or (version == 1 and kind in NEW_IN_2["kinds"]):
        yield f"unknown kind '{kind}', none of {', '.join(SCHEMAS)}"
    else:
        yield from find_misfits(SCHEMAS[kind], line)
        if version == 1:
            yield from (f"{name} is no field of schema 1" for name in NEW_IN_2["fields"] & line.keys())


def _order(
    lines: Mapping[int, Line], rows: Sequence[tuple[int, RoundRecord | None]], report: FileReport
) -> Iterator[Problem]:
    """A run that never began says why; a continuation follows a failure; nothing follows the last round."""
    if report.header is None:
        return
    kinds = {number: line["kind"] for number, line in lines.items()}
    if not report.begun:
        yield from ((number, "a round, but the header names no initial set") for number, _ in rows)
        if not {"failure", "skipped"} & set(kinds.values()):
            yield 0, "the header names no initial set, but no line says why the run did not begin"
    n_rounds = report.header["config"]["rounds"]
    if len(rows) > n_rounds:
        last = rows[n_rounds][0]
        yield from ((number, f"{kind} after the last round") for number, kind in kinds.items() if number > last)
    for before, number in zip(kinds, list(kinds)[1:], strict=False):
        if kinds[before] == "failure" and kinds[number] == "round":
            yield number, "a round after a failure, with no continuation between them"


def _check_clocks(rows: Sequence[tuple[int, RoundRecord]], report: FileReport) -> None:
    """Time in no phase is a problem if most queries have it; a few are notes: another process interrupted them."""
    loose = loose_clocks(rows)
    n_queries = sum(row.query_seconds is not None for _, row in rows)
    if len(loose) > max(2, n_queries / 2):
        report.problems.append((0, f"in {len(loose)} of {n_queries} queries over 2 % are in no phase"))
        return
    reported = {line for line, what in report.problems if "query_seconds" in what}
    report.notes += [(number, f"{what}: another process cut in") for number, what in loose if number not in reported]


# The rows of a run, against each other and the protocol in its header.

SLICE_SECONDS = 0.1
"""Another process may interrupt between two readings of the clock, for one or two time slices: in no phase."""

QUERY_FIELDS = (
    "indices", "classes", "n_candidates", "n_scored", "boundary_share", "ties", "query_seconds", "seconds",
)  # fmt: skip
"""Fields of a row that a query leaves."""

DURATIONS = ("train_seconds", "test_seconds", "extra_seconds", "rehearsal_seconds", "query_seconds")


@dataclass(frozen=True)
class RunProtocol:
    """What a header says about its rows; ``restricted``: candidates of a fixed-size restriction. None: not known."""

    rounds: int
    batch_size: int
    n_initial: int
    pool: int | None
    n_classes: int | None
    restricted: int | None


@dataclass(frozen=True)
class RowsBefore:
    """The number of rows before a row, and the positions labeled by then."""

    n_rows: int
    labeled: Collection[int]


Check = Callable[[RunProtocol, RowsBefore, RoundRecord], Iterator[str]]


def protocol_of(header: Mapping[str, Any]) -> RunProtocol:
    """From a header in this version's terms whose shape was checked. Raises nothing."""
    config, data = header["config"], header["data"]
    restrict = config["strategy"].get("restrict", {})
    fixed = restrict.get("kind") in ("diffusion", "uniform") and "plugin" not in restrict
    return RunProtocol(
        config["rounds"],
        config["batch_size"],
        len(header["initial"]),
        pool=data.get("pool", header["setup"].get("graph", {}).get("n_points")),  # older files: the points of the graph
        n_classes=data.get("n_classes", config["dataset"].get("n_classes")),
        restricted=restrict.get("restricted_size") if fixed else None,
    )


def check_order(protocol: RunProtocol, before: RowsBefore, row: RoundRecord) -> Iterator[str]:
    if row.round != before.n_rows:
        yield f"round {row.round}, where round {before.n_rows} should be"
    elif row.round > protocol.rounds:
        yield f"round {row.round} of a run of {protocol.rounds} rounds"


def check_n_labeled(protocol: RunProtocol, before: RowsBefore, row: RoundRecord) -> Iterator[str]:
    expected = protocol.n_initial + protocol.batch_size * before.n_rows
    if row.n_labeled != expected:
        yield (
            f"n_labeled {row.n_labeled}, where {protocol.n_initial} first labels and {before.n_rows} batches of "
            f"{protocol.batch_size} make {expected}"
        )


def check_query_fields(protocol: RunProtocol, before: RowsBefore, row: RoundRecord) -> Iterator[str]:
    """Every row has all fields of a query, except the last of a finished run, which has none."""
    present = [name for name in QUERY_FIELDS if getattr(row, name) is not None]
    if present and len(present) < len(QUERY_FIELDS):
        yield f"without {', '.join(name for name in QUERY_FIELDS if name not in present)}, which a query leaves, too"
    elif present and before.n_rows == protocol.rounds:
        yield f"a query in round {protocol.rounds}, the last, which has none"
    elif not present and before.n_rows < protocol.rounds:
        yield f"no query in round {before.n_rows} of {protocol.rounds}"


def check_batch(protocol: RunProtocol, before: RowsBefore, row: RoundRecord) -> Iterator[str]:
    picked = row.indices or []
    for name, values in (("indices", row.indices), ("classes", row.classes)):
        if values is not None and len(values) != protocol.batch_size:
            yield f"{len(values)} {name}, where a batch has {protocol.batch_size}"
    yield from check_positions("indices", picked, protocol.pool)
    if again := [position for position in dict.fromkeys(picked) if position in before.labeled]:
        yield f"{_some(again)} in indices, labeled before"
    top = protocol.n_classes
    if wrong := [label for label in row.classes or [] if label < 0 or (top is not None and label >= top)]:
        yield f"{_some(wrong)} in classes, where there are {top}"


def check_positions(name: str, positions: Sequence[int], pool: int | None) -> Iterator[str]:
    if wrong := [position for position in positions if position < 0 or (pool is not None and position >= pool)]:
        yield f"{_some(wrong)} in {name}, outside the pool of {pool}"
    if n_twice := len(positions) - len(set(positions)):
        yield f"{n_twice} of {len(positions)} {name} stand there twice"


def _some(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:3])) + (f" and {len(values) - 3} more" if len(values) > 3 else "")


def check_shares(protocol: RunProtocol, before: RowsBefore, row: RoundRecord) -> Iterator[str]:
    shares = {name: getattr(row, name) for name in ("accuracy", "reach", "boundary_share", "ties")}
    for name in ("accuracy", "unreached", "converged_accuracy", "converged_unreached"):
        shares[f"propagated.{name}"] = (row.propagated or {}).get(name)
    yield from (
        f"{name} {share}, not in 0..1" for name, share in shares.items() if share is not None and not 0 <= share <= 1
    )


def check_counts(protocol: RunProtocol, before: RowsBefore, row: RoundRecord) -> Iterator[str]:
    """Candidates fill a batch and are unlabeled; at most the pool is scored."""
    at_most = None if protocol.pool is None else protocol.pool - row.n_labeled
    if row.n_candidates is not None:
        if row.n_candidates < protocol.batch_size or (at_most is not None and row.n_candidates > at_most):
            yield f"n_candidates {row.n_candidates}, not in {protocol.batch_size}..{at_most}, a batch to all unlabeled"
        elif protocol.restricted is not None:
            expected = protocol.restricted if at_most is None else min(protocol.restricted, at_most)
            if row.n_candidates != expected:
                yield f"n_candidates {row.n_candidates}, where the restriction leaves {expected}"
    if row.n_scored is not None and (row.n_scored < 0 or (protocol.pool is not None and row.n_scored > protocol.pool)):
        yield f"n_scored {row.n_scored}, of a pool of {protocol.pool}"
    for name in ("epochs", "threads", "jobs", "halved_to"):
        value = getattr(row, name)
        if value is not None and value < 1:
            yield f"{name} {value}, where 1 is the least"


def check_phases(protocol: RunProtocol, before: RowsBefore, row: RoundRecord) -> Iterator[str]:
    """The phases are known, none is negative, and together they take as long as the query."""
    timed = {name: getattr(row, name) for name in (*DURATIONS, "load", "busy_elsewhere")}
    timed |= {f"seconds.{name}": value for name, value in (row.seconds or {}).items()}
    yield from (f"{name} {value:g} is negative" for name, value in timed.items() if value is not None and value < 0)
    if row.seconds is None or row.query_seconds is None:
        return
    if unknown := sorted(row.seconds.keys() - PHASES):
        yield f"phase '{unknown[0]}' is none of {', '.join(sorted(PHASES))}"
    if missing := sorted({"select", "acquire"} - row.seconds.keys()):
        yield f"no phase '{missing[0]}', which every query has"
    if row.n_scored and not {"embed", "infer"} & row.seconds.keys():
        yield f"{row.n_scored} points scored, but no phase 'infer' or 'embed'"
    gap = in_no_phase(row)
    if gap < -tolerance(row) or gap > max(tolerance(row), SLICE_SECONDS):
        in_phases = row.query_seconds - gap
        yield f"query_seconds {row.query_seconds:.6f}, but its phases make {in_phases:.6f}: more than 2 % apart"


def in_no_phase(row: RoundRecord) -> float:
    """Seconds of the query in no phase; negative: the phases take longer than the query."""
    return (row.query_seconds or 0.0) - sum((row.seconds or {}).values())


def tolerance(row: RoundRecord) -> float:
    """2 %, or 0.2 ms if that is more."""
    return max(0.02 * (row.query_seconds or 0.0), 2e-4)


CHECKS: tuple[Check, ...] = (
    check_order,
    check_n_labeled,
    check_query_fields,
    check_batch,
    check_shares,
    check_counts,
    check_phases,
)


def row_problems(
    protocol: RunProtocol, initial: Sequence[int], rows: Sequence[tuple[int, RoundRecord | None]]
) -> Iterator[Problem]:
    """``rows``: line number and row; None where its shape is wrong."""
    labeled = set(initial)
    for n_rows, (number, row) in enumerate(rows):
        if row is None:
            continue
        for check in CHECKS:
            yield from ((number, what) for what in check(protocol, RowsBefore(n_rows, labeled), row))
        labeled.update(row.indices or [])


def loose_clocks(rows: Sequence[tuple[int, RoundRecord]]) -> list[Problem]:
    """Queries with more time in no phase than ``tolerance`` allows."""
    return [
        (number, f"{1e3 * in_no_phase(row):.1f} ms of {1e3 * row.query_seconds:.1f} ms are in no phase")
        for number, row in rows
        if row.query_seconds is not None and row.seconds is not None and in_no_phase(row) > tolerance(row)
    ]


# The files of a results folder, against each other, and leftovers.


def check_duplicates(reports: Sequence[FileReport]) -> None:
    """A suite has each run once, by the hash of its configuration."""
    first: dict[tuple[Path, str], Path] = {}
    for report in reports:
        if report.header is None:
            continue
        suite = report.path.resolve().parents[2]
        other = first.setdefault((suite, report.header["fingerprint"]["config"]), report.path)
        if other != report.path:
            report.problems.append((1, f"the same run as {other}"))


def check_initial_sets(reports: Sequence[FileReport]) -> None:
    """Every strategy of a seed starts from the same labels: a problem of each file that differs from the majority."""
    begun: dict[tuple[Any, ...], list[FileReport]] = defaultdict(list)
    for report in reports:
        if report.header is not None and report.begun:
            config, fingerprint = report.header["config"], report.header["fingerprint"]
            names = ("seed", "initial_size", "balanced")
            content = (config["dataset"]["name"], fingerprint["data"], fingerprint["algorithm_version"])
            begun[(*content, *(config.get(name) for name in names))].append(report)
    for group in begun.values():
        sets: dict[tuple[int, ...], list[FileReport]] = defaultdict(list)
        for report in group:
            sets[tuple((report.header or {})["initial"])].append(report)
        usual = max(sets, key=lambda initial: len(sets[initial]))
        for initial, odd in sets.items():
            for report in odd if initial != usual else []:
                report.problems.append((1, f"other first labels than those of {sets[usual][0].path}"))


def leftovers(root: Path) -> list[tuple[Path, str]]:
    """Locks and temporary files of processes that work now or were killed. All are harmless."""
    notes = []
    patterns = ("seed-*.jsonl.lock", ".seed-*.jsonl.*", ".timings-*.jsonl.*", ".projection-*.npz.*")
    rest = sorted(path for pattern in patterns for path in find_files(root, pattern))
    for path in [path for path in rest if path.suffix == ".lock"]:
        run = path.with_suffix("")
        if (worker := lock_holder(run)) is not None:
            rest.remove(path)
            notes.append((run, f"{worker} is at work on it: what it writes from now on is not in here"))
    return notes + [(path, "left behind by a process that was killed: it may be removed") for path in rest]


def examine_projection(path: Path, runs: Sequence[FileReport]) -> FileReport:
    """Every problem of a projection, which only figures read; ``runs``: of the same root. Raises nothing."""
    report = FileReport(path)
    try:
        projection = read_file(path)
    except ResultsError as error:
        report.problems.append((0, str(error).removeprefix(f"{path} ")))
        return report
    if projection is None:
        return report  # removed meanwhile
    if path.name != file_name(projection.features_sha256):
        report.problems.append((0, f"of features {projection.features_sha256[:8]}, but its name says otherwise"))
    headers = [run.header for run in runs if path.parent in run.path.parents and run.header is not None and run.begun]
    if not any(header["fingerprint"]["latents"] == projection.features_sha256 for header in headers):
        report.notes.append((0, "of features that no run here uses"))
    return report


# Timings files, against their shape and the run whose states were used.


def examine_timings(path: Path) -> FileReport:
    """Every problem of a timings file; raises nothing."""
    report = FileReport(path)
    try:
        timings = read_timings(path)
    except ResultsError as error:
        report.problems.append((0, str(error).removeprefix(str(path)).lstrip(", :")))
        return report
    if timings is None:
        return report  # removed meanwhile
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        schema = TIMINGS_HEADER if number == 1 else TIMING
        report.problems += [(number, what) for what in find_misfits(schema, json.loads(line))]
    if not report.problems:
        report.problems += _timings_problems(timings)
        _check_run(timings, report)
    return report


def _timings_problems(timings: Timings) -> Iterator[Problem]:
    queries = [(timing.strategy, timing.round) for timing in timings.timings]
    if n_twice := len(queries) - len(set(queries)):
        yield 0, f"{n_twice} of {len(queries)} timings are of a strategy and round that stand there twice"
    for number, timing in enumerate(timings.timings, start=2):
        yield from ((number, what) for what in _timing_problems(timing, timings.repeats))


def _timing_problems(timing: Timing, repeats: int) -> Iterator[str]:
    if len(timing.query_seconds) != repeats:
        yield f"{len(timing.query_seconds)} query_seconds, where repeats={repeats}"
    if unknown := sorted(timing.seconds.keys() - PHASES):
        yield f"phase '{unknown[0]}' is none of {', '.join(sorted(PHASES))}"
    if min(timing.seconds.values(), default=0.0) < 0:
        yield "a phase has negative seconds"
    total = sorted(timing.query_seconds)[(len(timing.query_seconds) - 1) // 2]  # the repeat whose phases these are
    gap, allowed = total - sum(timing.seconds.values()), max(0.02 * total, 2e-4)
    if gap < -allowed or gap > max(allowed, SLICE_SECONDS):
        yield f"the median repeat took {total:.6f} s, but its phases make {total - gap:.6f}: more than 2 % apart"
    if timing.jobs < 1 or timing.n_candidates < 1 or timing.n_scored < 0:
        yield f"jobs {timing.jobs}, n_candidates {timing.n_candidates}, n_scored {timing.n_scored}: too few"


def _check_run(timings: Timings, report: FileReport) -> None:
    """The run whose states were used must be there; if its rows have changed since, a report ignores the timings."""
    try:
        log = _run_of(timings)
    except ResultsError:
        return  # a problem of that file
    if log is None or not log.begun:
        report.problems.append((1, f"timings of {timings.header['cell']}, which has no rows here: replay again"))
        return
    beyond = [round_ for round_ in timings.rounds if not 0 <= round_ < log.rounds]
    if beyond:
        report.problems.append((1, f"round {beyond[0]} of a run of {log.rounds} queries"))
    if not timings.of(log):
        report.notes.append((1, f"of other rows than {log.path} has now: replay again"))
    elif not timings.picks_equal:
        report.notes.append((0, "the replay picked otherwise than the rows: its times are of another network's query"))


def _run_of(timings: Timings) -> RunLog | None:
    if timings.path.name == COMMON:
        label, name = ("", "", *str(timings.header["cell"]).split("/"))[-2:]
        return read_run(timings.path.parent / label / f"{name}.jsonl")
    return read_run(timings.path.with_name(timings.path.name.removeprefix("timings-")))
