"""What a results file says: its versions, its rows and what readers make of them, and every field with its type.

A reader checks the fields that it needs (``check_header`` and the tables above it); ``dgal-bench validate`` checks
every field (``find_misfits`` and the dataclasses of lines).
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from dgal_bench.core.errors import ResultsError

SCHEMA_VERSION = 2
"""Raised when older lines would change their meaning, or could no longer be read.

1: ``jobs`` counts the runs of one command; the oldest headers lack weights, files and facts of the data. Every run has
   begun: its header names the initial set.
2: ``jobs`` counts all runs on the machine, ``busy_elsewhere`` is the cores that other processes kept busy; a header
   without an initial set is of a run that failed or was skipped before it began; lines of kind ``skipped``.
"""

RESTORE = "restore the line, or remove the file to start over"

Line = Mapping[str, Any]


def _from_1(lines: Sequence[Line]) -> list[Line]:
    header, *rest = lines
    fingerprint = {"weights": None, "files": None, **header["fingerprint"]}
    config = dict(header["config"])
    if isinstance(given := config.get("representation", {}), Mapping):
        config["representation"] = {"encoder": "cnn", "path": None, "model": None, **given}
    return [{"data": {}, **header, "fingerprint": fingerprint, "config": config}, *rest]


MIGRATIONS: Mapping[int, Callable[[Sequence[Line]], list[Line]]] = {1: _from_1}
"""From each version to the next one."""


def migrate(lines: Sequence[Line], where: str) -> list[Line]:
    """The lines of a file, header first, as this version would have written them.

    Raises:
        ResultsError: line 1 is no header, or a newer version's, or lacks config or fingerprint.
    """
    version = lines[0].get("schema_version")
    if lines[0].get("kind") != "header" or not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ResultsError(
            f"{where}, line 1: schema {version if version is not None else 'no schema_version'}, where this version "
            f"reads 1 to {SCHEMA_VERSION}: use another results=DIR"
        )
    if version > SCHEMA_VERSION:
        raise ResultsError(
            f"{where}, line 1: schema {version}, where this version reads 1 to {SCHEMA_VERSION}: update dgal-bench, "
            "or use another results=DIR"
        )
    check_header(lines[0], {"config": (dict,), "fingerprint": (dict,)}, where)
    migrated = list(lines)
    for step in range(version, SCHEMA_VERSION):
        migrated = MIGRATIONS[step](migrated)
    return [{**migrated[0], "schema_version": SCHEMA_VERSION}, *migrated[1:]]


@dataclass(frozen=True)
class RoundRecord:
    """One evaluation, and the query after it (the last round has none).

    CHOICE_FIELDS are the same bits in every repetition of the run; the others are circumstances.
    """

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
    extra: dict[str, float] = field(default_factory=dict)  # facts that a strategy added
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


TIMINGS_VERSION = 1
"""Of timings files alone. Files of other versions are refused: a replay makes them again."""

COMMON = "timings-common.jsonl"


@dataclass(frozen=True)
class Timing:
    """The query of one round, repeated on the same network and pool.

    ``picks_equal``: every repeat picked what the row says; None where no row is of this strategy and state.
    """

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
    content = [log.header["fingerprint"]["config"], log.header["initial"], picks(log.records)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


# What readers need of a file.

RequiredFields = Mapping[str, tuple[type, ...]]
"""JSON types of fields that a header must have, by dotted path."""

ESSENTIAL: RequiredFields = {
    "cell": (str,), "profile": (str,), "config.seed": (int,), "config.rounds": (int,),
    "config.initial_size": (int, NoneType), "config.dataset.name": (str,), "config.strategy.name": (str,),
    "config.strategy.restrict.kind": (str,), "config.strategy.acquire.kind": (str,),
}  # fmt: skip
"""Of every run, begun or not: they say which run it is and how many rounds it has."""

NEEDED_OF_ALL: RequiredFields = {"fingerprint.algorithm_version": (int,), "fingerprint.config": (str,)}
"""Of every run whose content is compared."""

NEEDED_OF_BEGUN: RequiredFields = {
    "fingerprint.data": (str,), "fingerprint.weights": (str, NoneType), "fingerprint.files": (str, NoneType),
    "initial": (list,),
}  # fmt: skip
"""Of a run that has begun."""

NEEDED_BY_REPORT: RequiredFields = {
    "config.batch_size": (int,), "config.restricted_size": (int,), "config.graph.graph_k": (int,),
    "config.representation.kind": (str,), "config.representation.encoder": (str,),
    "config.representation.path": (str, NoneType), "config.representation.model": (str, NoneType),
    "fingerprint.device": (str,), "fingerprint.torch": (str,),
    "provenance.git.revision": (str, NoneType), "provenance.git.dirty": (bool, NoneType),
    "provenance.machine.cpu": (str,), "provenance.machine.cores": (int,), "provenance.versions": (dict,),
}  # fmt: skip
"""Of a run that has begun, for a report."""

NEEDED_OF_SETUP: RequiredFields = {
    "fingerprint.graph": (str,), "fingerprint.latents": (str,), "setup.representation.seconds": (float, int),
    "setup.representation.label_share": (dict,), "setup.graph.seconds": (float, int), "setup.graph.components": (int,),
    "setup.graph.exact": (bool,), "setup.graph.recall": (float, int),
}  # fmt: skip
"""Of a run with a graph, for a report: full supervision has none."""

OPTIONAL_FACTS: RequiredFields = {"data": (dict,), "data.n_classes": (int, NoneType), "initial_classes": (list,)}
"""Of a header that has them: older ones do not."""


def check_header(header: Line, required: RequiredFields, where: str) -> None:
    """Raises ResultsError for the first field that is missing or of another type."""
    for path, kinds in required.items():
        value: Any = header
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise ResultsError(f"{where}, line 1: a header without '{path}': {RESTORE}")
            value = value[name]
        if type(value) not in kinds:
            raise ResultsError(f"{where}, line 1: {path}: {misfit_message(value, kinds)}")


_JSON_NAMES: Mapping[type, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
    dict: "an object", NoneType: "null",
}  # fmt: skip


def misfit_message(value: Any, kinds: Collection[type]) -> str:
    """``"x", where a number should be: restore the line, ...``."""
    hidden = {int, bool} if float in kinds else set()  # a number may be whole
    expected = [name for kind, name in _JSON_NAMES.items() if kind in kinds and kind not in hidden]
    text = json.dumps(value)
    short = text if len(text) <= 40 else f"{text[:37]}..."
    return f"{short}, where {' or '.join(expected)} should be: {RESTORE}"


def check_content_facts(log: RunLog) -> None:
    """Raises ResultsError for the first fact about its content that a file lacks."""
    check_header(log.header, {**NEEDED_OF_ALL, **(NEEDED_OF_BEGUN if log.begun else {})}, str(log.path))


def check_report_facts(log: RunLog) -> None:
    """Raises ResultsError for the first fact that a report needs and the file lacks."""
    strategy = log.header["config"]["initial_size"] is not None
    check_content_facts(log)
    if log.begun:
        check_header(log.header, {**NEEDED_BY_REPORT, **(NEEDED_OF_SETUP if strategy else {})}, str(log.path))
    _check_optional_facts(log)
    for record in log.records[:-1] if strategy else ():
        if not record.query_seconds or record.query_seconds < 0 or record.n_scored is None:
            raise ResultsError(
                f"{log.path}: no seconds or no points scored of the query of round {record.round}: {RESTORE}"
            )


def _check_optional_facts(log: RunLog) -> None:
    present = {name: kinds for name, kinds in OPTIONAL_FACTS.items() if name.partition(".")[0] in log.header}
    data = log.header.get("data")
    if isinstance(data, dict) and "n_classes" not in data:
        present.pop("data.n_classes", None)
    check_header(log.header, present, str(log.path))
    if any(type(label) is not int for label in log.header.get("initial_classes", ())):
        raise ResultsError(f"{log.path}, line 1: in initial_classes: not all are whole numbers: {RESTORE}")


# Every field of every line, for validate.


@dataclass(frozen=True)
class OutlineFingerprint:
    algorithm_version: int
    config: str


@dataclass(frozen=True)
class Fingerprint(OutlineFingerprint):
    data: str
    latents: str
    graph: str
    weights: str | None
    files: str | None
    git: str | None
    torch: str
    cpu: str
    device: str
    threads: int
    vectors: str = ""  # not in older files


@dataclass(frozen=True)
class HeaderOutline:
    """The header of a run that failed or was skipped before it began."""

    kind: str
    schema_version: int
    cell: str
    profile: str
    config: dict[str, Any]
    fingerprint: OutlineFingerprint
    provenance: dict[str, Any]
    command: list[str] = field(default_factory=list, kw_only=True)  # not in older files


@dataclass(frozen=True)
class Header(HeaderOutline):
    fingerprint: Fingerprint
    data: dict[str, Any]
    network: dict[str, Any]
    setup: dict[str, Any]
    initial: list[int]
    initial_classes: list[int] = field(default_factory=list)  # not in older files


@dataclass(frozen=True)
class Failure:
    kind: str
    error: str
    traceback: str


@dataclass(frozen=True)
class Skipped:
    kind: str
    why: str


@dataclass(frozen=True)
class Continuation:
    kind: str
    changed: list[str]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Round(RoundRecord):
    kind: str = "round"


@dataclass(frozen=True)
class NamedSection:
    name: str


@dataclass(frozen=True)
class Essentials:
    """The fields of a configuration that every version has."""

    seed: int
    rounds: int
    batch_size: int
    initial_size: int | None
    dataset: NamedSection
    strategy: NamedSection


@dataclass(frozen=True)
class DataFacts:
    pool: int
    test: int
    shape: list[int]
    n_classes: int


OPEN_SHAPES = (Essentials, NamedSection)
"""Shapes that allow further fields."""

LINE_SHAPES: Mapping[str, type] = {"round": Round, "failure": Failure, "skipped": Skipped, "continuation": Continuation}
"""The kinds that may follow a header."""

NEW_IN_2 = {"kinds": {"skipped"}, "fields": {"busy_elsewhere"}}
"""What a file of schema 1 cannot hold."""

_PLAIN: Mapping[type, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: lambda value: isinstance(value, int) and not isinstance(value, bool),
    float: lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
    str: lambda value: isinstance(value, str),
    NoneType: lambda value: value is None,
}


def find_misfits(value: Any, hint: Any, name: str = "", partial: bool = False) -> Iterator[str]:
    """Where a parsed JSON value is not of the type ``hint``, one line each; ``name`` is the value's.

    ``partial``: a dataclass may lack fields and have others.
    """
    if hint is Any:
        return
    if hint in _PLAIN:
        if not _PLAIN[hint](value):
            yield _misfit(name, value, hint)
    elif is_dataclass(hint):
        yield from _field_misfits(value, hint, name, partial)
    elif isinstance(hint, UnionType):
        options = [option for option in get_args(hint) if option is not NoneType or value is None]
        if len(options) == 1:
            yield from find_misfits(value, options[0], name, partial)
        elif all(any(find_misfits(value, option, name, partial)) for option in options):
            yield _misfit(name, value, hint)
    elif get_origin(hint) is list and isinstance(value, list):
        item_hint, item_name = get_args(hint)[0], f"{name}[...]"
        if fits := _PLAIN.get(item_hint):
            value = [item for item in value if not fits(item)]
        yield from islice((text for item in value for text in find_misfits(item, item_hint, item_name, partial)), 1)
    elif get_origin(hint) is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from find_misfits(item, get_args(hint)[1], f"{name}.{key}", partial)
    else:
        yield _misfit(name, value, hint)


def _field_misfits(value: Any, hint: Any, name: str, partial: bool) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _misfit(name, value, hint)
        return
    hints, required = _declared_fields(hint)
    path = f"{name}." if name else ""
    if not partial:
        yield from (f"{path}{key} is missing" for key in required if key not in value)
    if not partial and hint not in OPEN_SHAPES:
        yield from (f"{path}{key} is no field of this kind of line" for key in value if key not in hints)
    for key, item in value.items():
        if key in hints:
            yield from find_misfits(item, hints[key], f"{path}{key}", partial)


@cache
def _declared_fields(hint: type) -> tuple[dict[str, Any], list[str]]:
    """The types of a dataclass's fields, and the names of the required ones."""
    optional = {f.name for f in fields(hint) if f.default is not MISSING or f.default_factory is not MISSING}
    return get_type_hints(hint), [f.name for f in fields(hint) if f.name not in optional]


def _misfit(name: str, value: Any, hint: Any) -> str:
    shown = repr(value)
    kind = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)
    return f"{name} is {shown if len(shown) <= 40 else shown[:37] + '...'}, not {kind}"
