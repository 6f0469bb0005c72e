"""Query times for a report: from a replay where there is one, else from the rows; and whether other work ran meanwhile.

Both are judgements of rows and timings, never stored in them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dgal_bench.core.system import revision
from dgal_bench.results.rows import RunLog, Timings, timings_path

BUSY_CORES = 0.1
"""If other processes keep more than this busy during a round, its query counts as timed beside other work."""

REPLAY, ROWS = "replay", "rows"

CountSeconds = Callable[[float, Mapping[str, float]], float]
"""From a query's seconds, and those of its phases, the seconds that count."""


def all_phases(seconds: float, phases: Mapping[str, float]) -> float:
    return seconds


def without_phases(*left_out: str) -> CountSeconds:
    return lambda seconds, phases: seconds - sum(phases.get(phase, 0.0) for phase in left_out)


class HasLoad(Protocol):
    """A row or a timing, with what else ran on the machine."""

    @property
    def jobs(self) -> int: ...
    @property
    def busy_elsewhere(self) -> float | None: ...


def is_disturbed(measurements: Iterable[HasLoad]) -> bool:
    """Whether other runs or other processes' work are known to have run during any of them."""
    return any(one.jobs > 1 or (one.busy_elsewhere or 0.0) > BUSY_CORES for one in measurements)


def busy_state(measurements: Iterable[HasLoad]) -> bool | None:
    """``is_disturbed``, but None where it is False and the load of some was not recorded."""
    all_ = list(measurements)
    unknown = any(one.busy_elsewhere is None for one in all_)
    return True if is_disturbed(all_) else None if unknown else False


def either_busy(*sides: bool | None) -> bool | None:
    """``busy_state`` of all sides together."""
    return True if True in sides else None if None in sides else False


@dataclass(frozen=True)
class Times:
    """``seconds``: means of one query by seed; ``busy``: whether other work ran meanwhile, None: not known."""

    source: str  # REPLAY or ROWS
    seconds: Mapping[int, float]
    busy: bool | None


def from_rows(runs: Mapping[int, RunLog], count_seconds: CountSeconds = all_phases) -> Times:
    """The rows' own query times, of finished runs by seed."""
    queries = {
        seed: [record for record in log.records if record.query_seconds is not None] for seed, log in runs.items()
    }
    means = {
        seed: sum(count_seconds(record.query_seconds or 0.0, record.seconds or {}) for record in records) / len(records)
        for seed, records in queries.items()
    }
    return Times(ROWS, means, busy_state(record for records in queries.values() for record in records))


def from_replay(timings: Mapping[int, Timings], count_seconds: CountSeconds = all_phases) -> Times | None:
    """From replays by seed: the median over repeats, the mean over rounds; None without any."""
    if not timings:
        return None
    means = {
        seed: sum(count_seconds(one.median_seconds, one.seconds) for one in replayed.timings) / len(replayed.timings)
        for seed, replayed in timings.items()
    }
    return Times(REPLAY, means, busy_state(one for replayed in timings.values() for one in replayed.timings))


def comparable(one: Timings, other: Timings) -> bool:
    """Whether rounds and machine are the same, so that the ratio of the seconds compares the strategies alone."""
    return one.rounds == other.rounds and machine(one.header) == machine(other.header)


def machine(header: Mapping[str, Any]) -> str:
    """``AMD EPYC (AVX2), 2 cores, torch 2.15.0, dgal-bench e6c1a10b``: the maker of rows or timings."""
    provenance, fingerprint = header["provenance"], header["fingerprint"]
    # An installed wheel has a version, but no revision.
    code = (provenance["git"]["revision"] or provenance["versions"].get("dgal-bench", "?"))[:8]
    code += " (modified)" if provenance["git"]["dirty"] else ""
    device = processor(provenance["machine"]) if fingerprint["device"] == "cpu" else fingerprint["device"]
    return f"{device}, {provenance['machine']['cores']} cores, torch {fingerprint['torch']}, dgal-bench {code}"


def hardware(header: Mapping[str, Any], now: Mapping[str, Any] | None = None) -> str:
    """``AMD EPYC (AVX2), 2 cores``: of a header, or of the provenance ``now`` of a continuation."""
    facts = (now or header["provenance"])["machine"]
    device = None if header["fingerprint"]["device"] == "cpu" else facts.get("gpu") or header["fingerprint"]["device"]
    return f"{device or processor(facts)}, {facts['cores']} cores"


def processor(facts: Mapping[str, Any]) -> str:
    """``AMD EPYC (AVX2)``: with the vector units that torch uses: a trained network's bits depend on them."""
    return f"{facts['cpu']} ({facts['vectors']})" if facts.get("vectors") else str(facts["cpu"])


def machine_of_run(log: RunLog) -> str:
    """The kind of machine of a run; all of them in order if it was continued on another one."""
    later = [hardware(log.header, one["provenance"]) for one in log.continuations if "provenance" in one]
    return ", then ".join(dict.fromkeys([hardware(log.header), *later]))


def same_code_and_machine(header: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether timings were made by the code, the torch and the machine of the provenance ``now``."""
    old = header["provenance"]
    return (
        revision(old["git"]) == revision(now["git"])
        and old["versions"] == now["versions"]
        and old["machine"] == now["machine"]
    )


def is_usable(timings: Timings, log: RunLog) -> bool:
    """Whether the timings are of that run's current rows and reproduced its picks."""
    return timings.of(log) and timings.picks_equal


def by_run(timings: Sequence[Timings]) -> dict[Path, Timings]:
    """The timings of single runs, by their file."""
    return {one.path: one for one in timings if one.header["common"] is None}


def timings_of(log: RunLog, known: Mapping[Path, Timings]) -> Timings | None:
    """The usable timings of a finished run."""
    found = known.get(timings_path(log.path))
    return found if found is not None and log.done and is_usable(found, log) else None
