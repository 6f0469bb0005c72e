"""What readers make of results files: a round, a run's file, and the queries of a run timed again."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

# How pydantic checks lines. As JSON: there strict types take an object for a dataclass, but no text for a number.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class RoundRecord:
    """One evaluation, and the query after it (the last round has none).

    CHOICE_FIELDS are the same bits in every repetition of the run; the others are circumstances.
    """

    __pydantic_config__ = STRICT

    round: int
    n_labeled: int
    accuracy: float  # share of the test split, 0..1
    underfit: bool  # the training loss stayed above (ln C)/2
    epochs: int
    train_loss: float  # nats, mean of the last epoch
    reach: float  # share of points with h > 0 within T steps from the labels of this round
    train_seconds: float
    test_seconds: float
    threads: int
    jobs: int  # runs at work on this machine, this one included; in schema 1: those of this command
    load: float  # the machine's 1-minute load average
    busy_elsewhere: float | None = None  # cores that other processes kept busy during the round; None: not measured
    indices: list[int] | None = None  # the batch, in order of preference
    classes: list[int] | None = None  # the oracle's answers
    n_candidates: int | None = None
    candidates: str | None = None  # hash of their positions; None in older files
    n_scored: int | None = None  # different points passed through the task network
    boundary_share: float | None = None  # differently labeled graph neighbours of the batch, mean share
    ties: float | None = None  # share of the restricted set that the tie-break chose
    query_seconds: float | None = None
    seconds: dict[str, float] | None = None  # by exclusive phase
    extra: dict[str, float | bool] = field(default_factory=dict)  # facts that a strategy added
    propagated: dict[str, float] | None = None  # the test split classified by labels propagated over the graph alone
    extra_seconds: float = 0.0  # for facts of this row, in no other time: reach, propagated
    rehearsal_seconds: float | None = None  # of one untimed query, before the first clock of the process
    halved_to: int | None = None  # images per pass, where predict_batch_size of them did not fit in memory


CHOICE_FIELDS = (
    "round", "n_labeled", "accuracy", "underfit", "epochs", "train_loss", "reach", "indices", "classes",
    "n_candidates", "candidates", "n_scored", "boundary_share", "ties", "extra", "propagated",
)  # fmt: skip

PHASES = frozenset({"embed", "index", "search", "diffuse", "select", "infer", "acquire", "aux_train"})
"""Phases of a query: each of its seconds counts in one of them."""


def choice(record: RoundRecord) -> dict[str, Any]:
    """The fields that a repetition must reproduce bit for bit."""
    return {name: getattr(record, name) for name in CHOICE_FIELDS}


@dataclass(frozen=True, eq=False)
class RunLog:
    """A results file in this version's terms.

    ``lines``: its complete lines, not migrated; ``length``: their bytes, without a torn last line.
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
        """done, failed, skipped or partial (rounds are missing, no failure)."""
        return "done" if self.done else "failed" if self.failure else "skipped" if self.skipped else "partial"

    @property
    def begun(self) -> bool:
        """Otherwise the header says only which run it is, and the next line why it did not begin."""
        return "initial" in self.header


def picks(records: Sequence[RoundRecord]) -> list[int]:
    """Positions labeled by the queries so far, in order."""
    return [position for record in records for position in record.indices or []]


COMMON = "timings-common.jsonl"


def timings_path(run: Path) -> Path:
    """``timings-seed-0.jsonl`` for ``seed-0.jsonl``."""
    return run.with_name(f"timings-{run.name}")


@dataclass(frozen=True)
class Timing:
    """The query of one round, repeated on the same network and pool.

    ``picks_equal``: every repeat picked what the row says; None where no row is of this strategy and state.
    """

    __pydantic_config__ = STRICT

    strategy: str
    round: int
    query_seconds: list[float]  # of each repeat
    seconds: dict[str, float]  # by exclusive phase, of the median repeat (the lower of two)
    n_candidates: int
    n_scored: int
    picks_equal: bool | None
    jobs: int  # as in a row: runs at work on this machine, the replay included
    load: float
    busy_elsewhere: float | None

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.query_seconds)


@dataclass(frozen=True, eq=False)
class Timings:
    """A timings file: the run whose states were used, where, and each strategy's query in each round."""

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
        """Timings of the strategy whose states these are: its rows can be compared."""
        return [timing for timing in self.timings if timing.picks_equal is not None]

    @property
    def picks_equal(self) -> bool:
        """Whether the run's own strategy picked the same again in every round: the network was that of the rows."""
        return bool(self.own) and all(timing.picks_equal for timing in self.own)

    def of(self, log: RunLog) -> bool:
        """Whether these belong to the rows that the run has now, not to earlier ones."""
        return bool(self.header["picks"] == state_digest(log))


def state_digest(log: RunLog) -> str:
    """Hash of what determines a run's states: configuration, initial set, and picks in order."""
    content = [log.lines[0]["fingerprint"]["config"], log.header["initial"], picks(log.records)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
