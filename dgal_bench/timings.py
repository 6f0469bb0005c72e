"""The times of queries that were asked again, apart from the rows: files of JSON lines, written whole.

Line 1 is the header; then one line per strategy and round (``kind: timing``). ``timings-seed-0.jsonl`` beside
``seed-0.jsonl`` is of that cell alone; ``timings-common.jsonl`` in the folder of a data set is of every strategy on the
state of one cell.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgal_bench.disk import below, write_whole
from dgal_bench.errors import ResultsError
from dgal_bench.record import CellLog, picks

TIMINGS_VERSION = 1
"""Of these files alone: they can be made again, so another version's are refused."""

COMMON = "timings-common.jsonl"


@dataclass(frozen=True)
class Timing:
    """The query of one round, asked several times on the same network and pool.

    ``picks_equal``: every time the picks of the row; None where no row is of this strategy and state.
    """

    strategy: str
    round: int
    query_seconds: list[float]  # of each repeat
    seconds: dict[str, float]  # by exclusive phase, of the median repeat (the lower of two)
    n_candidates: int
    n_scored: int
    picks_equal: bool | None
    jobs: int  # as in a row: the cells at work on this machine, the replay included
    load: float
    busy_elsewhere: float | None

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.query_seconds)


@dataclass(frozen=True, eq=False)
class Timings:
    """A timings file: whose state was timed and where, and each strategy's query at each round."""

    path: Path
    header: Mapping[str, Any]
    timings: tuple[Timing, ...]

    @property
    def rounds(self) -> list[int]:
        return [int(round_) for round_ in self.header["rounds"]]

    @property
    def repeats(self) -> int:
        return int(self.header["repeats"])

    @property
    def own(self) -> list[Timing]:
        """Those of the strategy whose state it is, which has rows to be compared with."""
        return [timing for timing in self.timings if timing.picks_equal is not None]

    @property
    def picks_equal(self) -> bool:
        """Whether the network was the rows': the cell's own strategy picked the same again, in every round."""
        return bool(self.own) and all(timing.picks_equal for timing in self.own)

    def of(self, log: CellLog) -> bool:
        """Whether these are of the rows that the cell has now, and not of rows that were there before."""
        return bool(self.header["picks"] == digest(log))


def digest(log: CellLog) -> str:
    """What a cell's states follow from: its fingerprint's content, its initial set and its picks, in order."""
    content = [log.header["fingerprint"]["config"], log.header["initial"], picks(log.records)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def timings_path(cell: Path) -> Path:
    """``timings-seed-0.jsonl`` for ``seed-0.jsonl``."""
    return cell.with_name(f"timings-{cell.name}")


def write_timings(path: Path, header: Mapping[str, Any], timings: Sequence[Timing]) -> None:
    """The whole file in one rename: a reader sees the last one or this one.

    Raises:
        ResultsError: the folder takes no file.
    """
    first = {"kind": "timings", "schema_version": TIMINGS_VERSION, **header}
    lines = [first, *({"kind": "timing", **asdict(timing)} for timing in timings)]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_whole(path, text.encode(), "make room, or allow it")


def read_timings(path: Path) -> Timings | None:
    """The timings at ``path``; None where there are none.

    Raises:
        ResultsError: the file is damaged, or another version's.
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
        raise _damaged(path, error) from error
    if version != TIMINGS_VERSION:
        raise ResultsError(
            f"{path}, line 1: timings of schema {version}, where this version reads {TIMINGS_VERSION}: remove it, "
            "and replay again"
        )
    try:
        timings = tuple(_timing(line) for line in lines)
        missing = {"cell", "common", "picks", "rounds", "repeats", "fingerprint", "provenance"} - header.keys()
        if missing or not timings or {timing.round for timing in timings} != set(header["rounds"]):
            raise ValueError(f"no {', '.join(sorted(missing)) or 'timing of some round'}")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return Timings(path, header, timings)


def _timing(line: Mapping[str, Any]) -> Timing:
    if line["kind"] != "timing":
        raise ValueError(f"a line of kind {line['kind']}")
    timing = Timing(**{name: value for name, value in line.items() if name != "kind"})
    if not timing.query_seconds or min(timing.query_seconds) <= 0:
        raise ValueError(f"no seconds of {timing.strategy} in round {timing.round}")
    return timing


def _damaged(path: Path, error: Exception) -> ResultsError:
    return ResultsError(f"{path} is damaged ({error}): remove it, and replay again")


def read_all_timings(root: Path) -> list[Timings]:
    """Every timings file under ``root``, in order of path; raises ResultsError for a damaged one."""
    return [found for path in below(root, "timings-*.jsonl") if (found := read_timings(path)) is not None]
