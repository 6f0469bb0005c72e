"""What the rows of a cell must keep among themselves and to the protocol in its header."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgal_bench.record import PHASES, RoundRecord

SLICE_SECONDS = 0.1
"""Between two readings of the clock another process may cut in, for a scheduler's slice or two: no phase has those."""

QUERY_FIELDS = (
    "indices", "classes", "n_candidates", "n_scored", "boundary_share", "ties", "query_seconds", "seconds",
)  # fmt: skip
"""Of a row, what only a query leaves."""

DURATIONS = ("train_seconds", "test_seconds", "extra_seconds", "rehearsal_seconds", "query_seconds")


@dataclass(frozen=True)
class Protocol:
    """What a header says of its rows; ``restricted``: what one of a fixed size leaves. None: it does not tell."""

    rounds: int
    batch_size: int
    n_initial: int
    pool: int | None
    n_classes: int | None
    restricted: int | None


@dataclass(frozen=True)
class Before:
    """What stands before a row: how many rows, and which positions are labeled."""

    n_rows: int
    labeled: Collection[int]


Check = Callable[[Protocol, Before, RoundRecord], Iterator[str]]


def protocol_of(header: Mapping[str, Any]) -> Protocol:
    """Of a header in this version's terms, whose shape is as it should be. Raises nothing."""
    config, data = header["config"], header["data"]
    restrict = config["strategy"].get("restrict", {})
    fixed = restrict.get("kind") in ("diffusion", "uniform") and "plugin" not in restrict
    return Protocol(
        config["rounds"],
        config["batch_size"],
        len(header["initial"]),
        pool=data.get("pool", header["setup"].get("graph", {}).get("n_points")),  # of before: what the graph is of
        n_classes=data.get("n_classes", config["dataset"].get("n_classes")),
        restricted=restrict.get("restricted_size") if fixed else None,
    )


def in_order(protocol: Protocol, before: Before, row: RoundRecord) -> Iterator[str]:
    if row.round != before.n_rows:
        yield f"round {row.round}, where round {before.n_rows} should be"
    elif row.round > protocol.rounds:
        yield f"round {row.round} of a cell of {protocol.rounds} rounds"


def n_labeled(protocol: Protocol, before: Before, row: RoundRecord) -> Iterator[str]:
    expected = protocol.n_initial + protocol.batch_size * before.n_rows
    if row.n_labeled != expected:
        yield (
            f"n_labeled {row.n_labeled}, where {protocol.n_initial} first labels and {before.n_rows} batches of "
            f"{protocol.batch_size} make {expected}"
        )


def query_or_none(protocol: Protocol, before: Before, row: RoundRecord) -> Iterator[str]:
    """A query's fields stand together, in every row but the last of a finished cell."""
    given = [name for name in QUERY_FIELDS if getattr(row, name) is not None]
    if given and len(given) < len(QUERY_FIELDS):
        yield f"without {', '.join(name for name in QUERY_FIELDS if name not in given)}, which a query leaves, too"
    elif given and before.n_rows == protocol.rounds:
        yield f"a query in round {protocol.rounds}, the last, which has none"
    elif not given and before.n_rows < protocol.rounds:
        yield f"no query in round {before.n_rows} of {protocol.rounds}"


def batch(protocol: Protocol, before: Before, row: RoundRecord) -> Iterator[str]:
    picked = row.indices or []
    for name, found in (("indices", row.indices), ("classes", row.classes)):
        if found is not None and len(found) != protocol.batch_size:
            yield f"{len(found)} {name}, where a batch has {protocol.batch_size}"
    yield from distinct_in("indices", picked, protocol.pool)
    if again := [position for position in dict.fromkeys(picked) if position in before.labeled]:
        yield f"{_some(again)} in indices, labeled before"
    top = protocol.n_classes
    if wrong := [label for label in row.classes or [] if label < 0 or (top is not None and label >= top)]:
        yield f"{_some(wrong)} in classes, where there are {top}"


def distinct_in(name: str, positions: Sequence[int], pool: int | None) -> Iterator[str]:
    if wrong := [position for position in positions if position < 0 or (pool is not None and position >= pool)]:
        yield f"{_some(wrong)} in {name}, outside the pool of {pool}"
    if n_twice := len(positions) - len(set(positions)):
        yield f"{n_twice} of {len(positions)} {name} stand there twice"


def _some(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:3])) + (f" and {len(values) - 3} more" if len(values) > 3 else "")


def shares(protocol: Protocol, before: Before, row: RoundRecord) -> Iterator[str]:
    found = {name: getattr(row, name) for name in ("accuracy", "reach", "boundary_share", "ties")}
    for name in ("accuracy", "unreached", "converged_accuracy", "converged_unreached"):
        found[f"propagated.{name}"] = (row.propagated or {}).get(name)
    yield from (
        f"{name} {share}, not in 0..1" for name, share in found.items() if share is not None and not 0 <= share <= 1
    )


def counts(protocol: Protocol, before: Before, row: RoundRecord) -> Iterator[str]:
    """Candidates fill a batch and are unlabeled; nothing outside the pool is scored."""
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


def phases(protocol: Protocol, before: Before, row: RoundRecord) -> Iterator[str]:
    """Known ones, none negative, and not more in them than the whole query took (or far less)."""
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
    """Seconds of the query that no phase accounts for; negative: phases make more than the query took."""
    return (row.query_seconds or 0.0) - sum((row.seconds or {}).values())


def tolerance(row: RoundRecord) -> float:
    """2 %, or 0.2 ms where that is more."""
    return max(0.02 * (row.query_seconds or 0.0), 2e-4)


CHECKS: tuple[Check, ...] = (in_order, n_labeled, query_or_none, batch, shares, counts, phases)


def row_problems(
    protocol: Protocol, initial: Sequence[int], rows: Sequence[tuple[int, RoundRecord | None]]
) -> Iterator[tuple[int, str]]:
    """Line number and problem of each; a row is None where its shape is wrong already."""
    labeled = set(initial)
    for n_rows, (number, row) in enumerate(rows):
        if row is None:
            continue
        for check in CHECKS:
            yield from ((number, what) for what in check(protocol, Before(n_rows, labeled), row))
        labeled.update(row.indices or [])


def loose_clocks(rows: Sequence[tuple[int, RoundRecord]]) -> list[tuple[int, str]]:
    """The queries whose phases leave out more than they should."""
    return [
        (number, f"{1e3 * in_no_phase(row):.1f} ms of {1e3 * row.query_seconds:.1f} ms are in no phase")
        for number, row in rows
        if row.query_seconds is not None and row.seconds is not None and in_no_phase(row) > tolerance(row)
    ]
