"""What benchmarks/acquisition.py measures, in which order, and what each measurement is expected to need."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

CRITERIA = ("badge", "coreset", "margin")
IMPLEMENTATIONS = ("ours", "reference", "scikit-activeml")
N_FEATURES = 50
N_CENTRES = 100  # labeled points that coreset starts from
MEMORY_SHARE = 0.6  # of the machine's memory; what needs more is not started

# A call under SHORT_SECONDS is repeated, within about REPEAT_SECONDS in all.
SHORT_SECONDS = 2.0
REPEAT_SECONDS = 6.0
FEWEST_REPEATS, MOST_REPEATS = 3, 7

_START_SECONDS = 4.5  # a process: its imports and inputs


@dataclass(frozen=True, order=True)
class Case:
    """One measurement: ``picks`` of ``points`` by one implementation of a criterion.

    ``classes`` is None for coreset, which looks at features only.
    """

    criterion: str
    points: int
    classes: int | None
    picks: int
    implementation: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        return cls(row["criterion"], row["points"], row["classes"], row["picks"], row["implementation"])

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def sizes(self) -> tuple[str, int, int | None, int]:
        """What the implementations that are compared have in common."""
        return self.criterion, self.points, self.classes, self.picks

    def is_larger_than(self, other: "Case") -> bool:
        """The same code on at least as many points, classes and picks: it cannot take less."""
        return (self.criterion, self.implementation) == (other.criterion, other.implementation) and all(
            (mine or 0) >= (its or 0) for mine, its in zip(self.sizes[1:], other.sizes[1:], strict=True)
        )


def cases(criteria: Sequence[str], quick: bool) -> list[Case]:
    """Small before large, so that what is too slow is known early; a curve over N at 10 classes and 50 picks."""
    if quick:
        grid = {(2_000, 10, 10)}
    else:
        grid = {(n, c, b) for n in (60_000, 125_000) for c in (10, 26, 100) for b in (50, 200)}
        grid |= {(n, 10, 50) for n in (15_000, 30_000)}
    found: dict[Case, None] = {}
    for criterion in criteria:
        for n, c, b in sorted(grid, key=lambda sizes: sizes[0] * sizes[1] * sizes[2]):
            for implementation in IMPLEMENTATIONS:
                found[Case(criterion, n, None if criterion == "coreset" else c, b, implementation)] = None
    return list(found)


def needed_bytes(case: Case) -> int:
    """Roughly what a measurement takes beyond its inputs, where that is much."""
    dense = case.points * (case.classes or 0) * N_FEATURES
    match case.criterion, case.implementation:
        case "badge", "reference":
            return 2 * dense * 4  # float32 gradients, and their differences to one of them
        case "badge", "scikit-activeml":
            return 2 * dense * 8 + 2 * case.points * case.picks * 8  # float64, squares; utilities and distances
        case _, "scikit-activeml":
            return 2 * case.points * case.picks * 8  # a utility per pick and point
        case _:
            return 8 * case.points * N_FEATURES * 4


def memory_bytes() -> int:
    """Of the whole machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def floor_bytes(case: Case) -> int:
    """What any implementation must read that keeps N (C + d) floats: badge and coreset all for each pick, margin once.

    Coreset's first pass over its labeled centres counts as one pick.
    """
    match case.criterion:
        case "badge":
            return case.points * ((case.classes or 0) + N_FEATURES) * 4 * case.picks
        case "coreset":
            return case.points * N_FEATURES * 4 * (case.picks + 1)
        case _:
            return case.points * (case.classes or 0) * 4


def n_calls(first_seconds: float) -> int:
    """How often a call is made in all whose first took so long."""
    if first_seconds > SHORT_SECONDS:
        return 1
    return min(MOST_REPEATS, max(FEWEST_REPEATS, int(REPEAT_SECONDS / max(first_seconds, 1e-9))))


def expected_seconds(case: Case) -> float:
    """One call on some machine of today: for the estimate of the time left only."""
    points, picks = case.points, case.picks
    dense = points * (case.classes or 0) * N_FEATURES
    match case.criterion, case.implementation:
        case "badge", "ours":
            return points * ((case.classes or 0) + N_FEATURES) * picks * 4e-10
        case "badge", _:
            return dense * picks * 3e-9
        case "coreset", "ours":
            return points * N_FEATURES * (picks + N_CENTRES) * 4e-10
        case "coreset", "reference":
            return points * N_FEATURES * picks * (N_CENTRES + picks / 2) * 1.5e-9
        case "coreset", _:
            return points * N_FEATURES * picks * 2e-9
        case _, other:
            return points * (case.classes or 0) * 1e-8 + (points * picks * 1e-8 if other == "scikit-activeml" else 0)


def seconds_left(waiting: Iterable[Case], pace: Mapping[tuple[str, str], float], limit: float) -> float:
    """Roughly, for the cases that still wait; ``pace`` corrects the expectation by (criterion, implementation)."""
    total = 0.0
    for case in waiting:
        call = min(limit, expected_seconds(case) * pace.get((case.criterion, case.implementation), 1.0))
        total += _START_SECONDS + call * n_calls(call)
    return total
