"""One results file, from its bytes: what is wrong with it, and what of it the others must agree with."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dgal_bench.config import RunConfig, hash_of
from dgal_bench.errors import ResultsError
from dgal_bench.record import RoundRecord
from dgal_bench.schema import migrated
from dgal_bench.validate.rows import distinct_in, loose_clocks, protocol_of, row_problems
from dgal_bench.validate.shapes import LINES, NEW_IN_2, DataFacts, Essentials, Header, Outline, misfits

Line = Mapping[str, Any]
Found = tuple[int, str]
"""A line's number, 0 for the file as a whole, and what is wrong."""

_HEX = re.compile("[0-9a-f]{16,64}")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass
class Report:
    """What was found in a file. ``header`` is there, in this version's terms, where it could be made sense of."""

    path: Path
    problems: list[Found] = field(default_factory=list)
    notes: list[Found] = field(default_factory=list)
    header: Line | None = None
    n_rounds: int = 0

    @property
    def begun(self) -> bool:
        return self.header is not None and "initial" in self.header


def examine(path: Path) -> Report:
    """Every problem of a results file by itself; raises nothing."""
    report = Report(path)
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
    lines = _parsed(whole, report)
    if 1 not in lines:
        return report
    report.header = _header(lines[1], report)
    if report.header is not None:
        header = lines.pop(1)
        _check_header(path, report.header, header, report)
        _check_lines(lines, header["schema_version"], report)
    return report


def _parsed(whole: Sequence[bytes], report: Report) -> dict[int, dict[str, Any]]:
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


def _header(line: Line, report: Report) -> Line | None:
    """Line 1 in this version's terms; None, and the reason told, where nothing else can be judged without it."""
    try:
        migrated([{**line, "config": {}, "fingerprint": {}}], "")  # asks for the version alone
    except ResultsError as error:
        report.problems.append((1, str(error).partition("line 1: ")[2]))
        return None
    wrong = [*misfits(line.get("config"), Essentials, "config")]
    wrong += [*misfits(line.get("fingerprint"), dict[str, Any], "fingerprint")]
    if not wrong:
        (header,) = migrated([line], "")
        begun = "initial" in header or line["schema_version"] == 1
        wrong = [*misfits(dict(header), Header if begun else Outline)]
    report.problems += [(1, what) for what in wrong]
    return None if wrong else header


def _check_header(path: Path, header: Line, raw: Line, report: Report) -> None:
    """``raw`` is the header as it stands in the file: what the hash of its configuration is of."""
    config = header["config"]
    found = [*misfits(config, RunConfig, "config", partial=True), *_place(path, header), *_hashes(raw)]
    if report.begun:
        found += [*misfits(header["data"], DataFacts, "data", partial=True), *_initial(header)]
    report.problems += [(1, what) for what in found]


def _place(path: Path, header: Line) -> Iterator[str]:
    """A file's place says which cell it is, and so does its header."""
    _, dataset, label, name = ("", "", "", *path.resolve().parts)[-4:]
    config = header["config"]
    filed, strategy = config["dataset"]["name"], config["strategy"]["name"]
    if dataset != filed:
        yield f"it is of data set '{filed}', but in the folder '{dataset}'"
    if label != strategy and not label.startswith(f"{strategy}+"):
        yield f"it is of strategy '{strategy}', but in the folder '{label}'"
    if name != f"seed-{config['seed']}.jsonl":
        yield f"it is of seed {config['seed']}, but named {name}"
    if header["cell"] != (expected := f"{dataset}/{label}/{name.removesuffix('.jsonl')}"):
        yield f"it is of cell '{header['cell']}', where its place says '{expected}'"


def _hashes(header: Line) -> Iterator[str]:
    said, full = header["fingerprint"], header["config"]["initial_size"] is None
    if said["config"] not in config_hashes(header["config"], header["schema_version"]):
        yield f"fingerprint.config {said['config'][:8]} is not the hash of the configuration beside it"
    for name in ("data", "latents", "graph", "weights", "files"):
        value = said.get(name)
        looks = (_SHA256 if name == "data" else _HEX).fullmatch(value) if value is not None else True
        if not looks and not (full and name in ("latents", "graph") and value == "none"):
            yield f"fingerprint.{name} '{value[:20]}' is no hash"


def config_hashes(config: Line, version: int) -> set[str]:
    """What may stand for a configuration: RunConfig.hash; in schema 1 also that of before, of paths and all."""
    with_paths = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return {hash_of(config)} | ({with_paths} if version == 1 else set())


def _initial(header: Line) -> Iterator[str]:
    initial, size = header["initial"], header["config"]["initial_size"]
    pool = protocol_of(header).pool
    expected = pool if size is None else size
    if expected is not None and len(initial) != expected:
        yield f"{len(initial)} first labels, where initial_size={expected}"
    yield from distinct_in("first labels", initial, pool)
    classes, n_classes = header.get("initial_classes"), protocol_of(header).n_classes
    if classes is not None and len(classes) != len(initial):
        yield f"{len(classes)} initial_classes of {len(initial)} first labels"
    if wrong := [label for label in classes or [] if label < 0 or (n_classes is not None and label >= n_classes)]:
        yield f"{wrong[0]} in initial_classes, where there are {n_classes}"


def _check_lines(lines: Mapping[int, Line], version: int, report: Report) -> None:
    rows: list[tuple[int, RoundRecord | None]] = []
    for number, line in lines.items():
        wrong = list(_misfits_of(line, version))
        report.problems += [(number, what) for what in wrong]
        if line["kind"] == "round":
            rows.append((number, None if wrong else _record(line)))
    report.n_rounds = len(rows)
    report.problems += [*_order(lines, rows, report)]
    if report.header is not None and report.begun:
        report.problems += row_problems(protocol_of(report.header), report.header["initial"], rows)
    _check_clocks([(number, row) for number, row in rows if row is not None], report)
    report.problems.sort(key=lambda found: found[0])


def _misfits_of(line: Line, version: int) -> Iterator[str]:
    kind = line["kind"]
    if kind == "header":
        yield "a second header"
    elif kind not in LINES or (version == 1 and kind in NEW_IN_2["kinds"]):
        yield f"unknown kind '{kind}', none of {', '.join(LINES)}"
    else:
        yield from misfits(line, LINES[kind])
        if version == 1:
            yield from (f"{name} is no field of schema 1" for name in NEW_IN_2["fields"] & line.keys())


def _record(line: Line) -> RoundRecord:
    names = {f.name for f in fields(RoundRecord)}
    return RoundRecord(**{name: value for name, value in line.items() if name in names})


def _order(
    lines: Mapping[int, Line], rows: Sequence[tuple[int, RoundRecord | None]], report: Report
) -> Iterator[Found]:
    """A cell that never began says why; a failure is gone on from by a continuation; the last round is the end."""
    if report.header is None:
        return
    kinds = {number: line["kind"] for number, line in lines.items()}
    if not report.begun:
        yield from ((number, "a round, but the header names no initial set") for number, _ in rows)
        if not {"failure", "skipped"} & set(kinds.values()):
            yield 0, "the header names no initial set, but no line says why the cell did not begin"
    n_rounds = report.header["config"]["rounds"]
    if len(rows) > n_rounds:
        last = rows[n_rounds][0]
        yield from ((number, f"{kind} after the last round") for number, kind in kinds.items() if number > last)
    for before, number in zip(kinds, list(kinds)[1:], strict=False):
        if kinds[before] == "failure" and kinds[number] == "round":
            yield number, "a round after a failure, with no continuation between them"


def _check_clocks(rows: Sequence[tuple[int, RoundRecord]], report: Report) -> None:
    """Where most queries have too much in no phase something is amiss; in one of them, another process cut in."""
    loose = loose_clocks(rows)
    n_queries = sum(row.query_seconds is not None for _, row in rows)
    if len(loose) > max(2, n_queries / 2):
        report.problems.append((0, f"in {len(loose)} of {n_queries} queries over 2 % are in no phase"))
        return
    known = set(report.problems)
    report.notes += [
        (number, f"{what}: another process cut in")
        for number, what in loose
        if not any(number == line and "query_seconds" in said for line, said in known)
    ]
