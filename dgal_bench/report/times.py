"""Which times of queries a report tells: those of a replay where there is one, else the rows' own; and what ran beside.

A judgement of rows and timings, never stored in them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dgal_bench.core.system import revision
from dgal_bench.results.reader import timings_path
from dgal_bench.results.rows import RunLog, Timings

BUSY_CORES = 0.1
"""Kept busy by other processes during a round, a query counts as timed beside other work."""

REPLAY, ROWS = "replay", "rows"

Counted = Callable[[float, Mapping[str, float]], float]
"""Of a query's seconds and those of its phases, what is counted."""


def all_phases(seconds: float, phases: Mapping[str, float]) -> float:
    """All of it."""
    return seconds


def without_phases(*left_out: str) -> Counted:
    """All but some phases."""
    return lambda seconds, phases: seconds - sum(phases.get(phase, 0.0) for phase in left_out)


class HasLoad(Protocol):
    """A row or a timing: what ran on the machine meanwhile."""

    @property
    def jobs(self) -> int: ...
    @property
    def busy_elsewhere(self) -> float | None: ...


def is_disturbed(taken: Iterable[HasLoad]) -> bool:
    """Whether any is known to have been taken beside other runs or other processes' work."""
    return any(one.jobs > 1 or (one.busy_elsewhere or 0.0) > BUSY_CORES for one in taken)


def busy_state(taken: Iterable[HasLoad]) -> bool | None:
    """``disturbed``, but None where all that is known of some is that nothing is: it may have been alone or not."""
    found = list(taken)
    unknown = any(one.busy_elsewhere is None for one in found)
    return True if is_disturbed(found) else None if unknown else False


def either_busy(*sides: bool | None) -> bool | None:
    """What ran beside any of them."""
    return True if True in sides else None if None in sides else False


@dataclass(frozen=True)
class Times:
    """A strategy's mean seconds of one query by seed, where they come from, and whether anything ran beside.

    ``beside`` None: nobody knows.
    """

    source: str  # REPLAY or ROWS
    seconds: Mapping[int, float]
    beside: bool | None


def from_rows(runs: Mapping[int, RunLog], counted: Counted = all_phases) -> Times:
    """Of finished runs by seed."""
    queries = {
        seed: [record for record in log.records if record.query_seconds is not None] for seed, log in runs.items()
    }
    means = {
        seed: sum(counted(record.query_seconds or 0.0, record.seconds or {}) for record in asked) / len(asked)
        for seed, asked in queries.items()
    }
    return Times(ROWS, means, busy_state(record for asked in queries.values() for record in asked))


def from_replay(timings: Mapping[int, Timings], counted: Counted = all_phases) -> Times | None:
    """Of replays by seed: the median over repeats, the mean over rounds; None without any."""
    if not timings:
        return None
    means = {
        seed: sum(counted(one.median_seconds, one.seconds) for one in replayed.timings) / len(replayed.timings)
        for seed, replayed in timings.items()
    }
    return Times(REPLAY, means, busy_state(one for replayed in timings.values() for one in replayed.timings))


def comparable(one: Timings, other: Timings) -> bool:
    """Whether a ratio of their seconds says something about strategies: the same rounds, on the same machine."""
    return one.rounds == other.rounds and machine(one.header) == machine(other.header)


def machine(header: Mapping[str, Any]) -> str:
    """``AMD EPYC (AVX2), 2 cores, torch 2.15.0, dgal-bench e6c1a10b``: what made rows or timings."""
    where, print_ = header["provenance"], header["fingerprint"]
    # Installed from a wheel there is no revision, but a version.
    code = (where["git"]["revision"] or where["versions"].get("dgal-bench", "?"))[:8]
    code += " (modified)" if where["git"]["dirty"] else ""
    device = processor(where["machine"]) if print_["device"] == "cpu" else print_["device"]
    return f"{device}, {where['machine']['cores']} cores, torch {print_['torch']}, dgal-bench {code}"


def hardware(header: Mapping[str, Any], now: Mapping[str, Any] | None = None) -> str:
    """``AMD EPYC (AVX2), 2 cores``: of a header, or of the provenance ``now`` of who went on with it."""
    facts = (now or header["provenance"])["machine"]
    device = None if header["fingerprint"]["device"] == "cpu" else facts.get("gpu") or header["fingerprint"]["device"]
    return f"{device or processor(facts)}, {facts['cores']} cores"


def processor(facts: Mapping[str, Any]) -> str:
    """``AMD EPYC (AVX2)``: with the vector units that torch uses, on which a trained network's bits depend."""
    return f"{facts['cpu']} ({facts['vectors']})" if facts.get("vectors") else str(facts["cpu"])


def machine_of_run(log: RunLog) -> str:
    """The kind of machine of a run; of one that went on elsewhere all of them, in order."""
    later = [hardware(log.header, one["provenance"]) for one in log.continuations if "provenance" in one]
    return ", then ".join(dict.fromkeys([hardware(log.header), *later]))


def same_code_and_machine(header: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether timings were made by the code, the torch and the machine of the provenance ``now``."""
    then = header["provenance"]
    return (
        revision(then["git"]) == revision(now["git"])
        and then["versions"] == now["versions"]
        and then["machine"] == now["machine"]
    )


def is_usable(timings: Timings, log: RunLog) -> bool:
    """Whether these are of that run's rows and found its own picks again."""
    return timings.of(log) and timings.picks_equal


def by_run(timings: Sequence[Timings]) -> dict[Path, Timings]:
    """The timings of single runs, by the file of the run's timings."""
    return {one.path: one for one in timings if one.header["common"] is None}


def timings_of(log: RunLog, known: Mapping[Path, Timings]) -> Timings | None:
    """The usable timings of a finished run."""
    found = known.get(timings_path(log.path))
    return found if found is not None and log.done and is_usable(found, log) else None
