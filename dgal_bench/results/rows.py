"""What the lines of a results file are made of: every field's name and type, and what in a line is otherwise."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from dgal_bench.core.errors import ResultsError

# The versions of a results file, and what makes an old one readable: one step from each version to the next.


SCHEMA_VERSION = 2
"""Raised when lines written before would mean something else, or could no longer be read.

1: ``jobs`` counts the runs of the command alone; headers of before weights, files and facts of the data say nothing
   of them. Every file has begun: its header names the initial set.
2: ``jobs`` counts the runs on the machine, whoever runs them, and ``busy_elsewhere`` what else kept it busy; a header
   without an initial set is of a run that failed or was skipped before it began; lines of kind ``skipped``.
"""

RESTORE = "restore the line, or remove the file to start over"

Line = Mapping[str, Any]

RequiredFields = Mapping[str, tuple[type, ...]]
"""What a header must say, by dotted path, and of which JSON types."""

ESSENTIAL: RequiredFields = {
    "cell": (str,), "profile": (str,), "config.seed": (int,), "config.rounds": (int,),
    "config.initial_size": (int, NoneType), "config.dataset.name": (str,), "config.strategy.name": (str,),
    "config.strategy.restrict.kind": (str,), "config.strategy.acquire.kind": (str,),
}  # fmt: skip
"""Of every run, whether it has begun or not: without them nobody knows which it is, or how far it is to go."""


def _from_1(lines: Sequence[Line]) -> list[Line]:
    header, *rest = lines
    fingerprint = {"weights": None, "files": None, **header["fingerprint"]}
    config = dict(header["config"])
    if isinstance(given := config.get("representation", {}), Mapping):
        config["representation"] = {"encoder": "cnn", "path": None, "model": None, **given}
    return [{"data": {}, **header, "fingerprint": fingerprint, "config": config}, *rest]


MIGRATIONS: Mapping[int, Callable[[Sequence[Line]], list[Line]]] = {1: _from_1}
"""From that version to the next one."""


def migrate(lines: Sequence[Line], where: str) -> list[Line]:
    """The lines of a file, header first, as if this version had written them.

    Raises:
        ResultsError: line 1 is no header, a newer version's, or without config or fingerprint.
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
    done = list(lines)
    for step in range(version, SCHEMA_VERSION):
        done = MIGRATIONS[step](done)
    return [{**done[0], "schema_version": SCHEMA_VERSION}, *done[1:]]


def check_header(header: Line, wanted: RequiredFields, where: str) -> None:
    """Raises ResultsError for the first that is not there, or is something else."""
    for path, kinds in wanted.items():
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
    found = json.dumps(value)
    short = found if len(found) <= 40 else f"{found[:37]}..."
    return f"{short}, where {' or '.join(expected)} should be: {RESTORE}"


@dataclass(frozen=True)
class RoundRecord:
    """One evaluation, and the query that followed it unless it was the last.

    CHOICE_FIELDS are the same bits whenever the run is run again; the rest are circumstances.
    """

    round: int
    n_labeled: int
    accuracy: float  # share of the test split, 0..1
    underfit: bool  # the training loss stayed above (ln C)/2
    epochs: int
    train_loss: float  # nats, mean of the last epoch
    reach: float  # share of points with h > 0 within T steps of the labels known so far
    train_seconds: float
    test_seconds: float
    threads: int
    jobs: int  # runs at work on this machine, this one included; of schema 1: those of this command
    load: float  # the machine's 1-minute load average
    busy_elsewhere: float | None = None  # cores that other processes kept busy during the round; None: not known
    indices: list[int] | None = None  # the batch, in order of preference
    classes: list[int] | None = None  # the oracle's answers
    n_candidates: int | None = None
    candidates: str | None = None  # hash of their positions; None in older files
    n_scored: int | None = None  # different points passed through the task network
    boundary_share: float | None = None  # differently labeled graph neighbours of the batch, mean share
    ties: float | None = None  # share of the restricted set that the tie-break chose
    query_seconds: float | None = None
    seconds: dict[str, float] | None = None  # by exclusive phase
    extra: dict[str, float] = field(default_factory=dict)  # what else a strategy noted
    propagated: dict[str, float] | None = None  # the test split classified by labels propagated over the graph alone
    extra_seconds: float = 0.0  # spent on facts of this row that are in no other time: reach, propagated
    rehearsal_seconds: float | None = None  # of one untimed query, before the first clock of the process
    halved_to: int | None = None  # images per pass, where predict_batch_size of them ran out of memory


CHOICE_FIELDS = (
    "round", "n_labeled", "accuracy", "underfit", "epochs", "train_loss", "reach", "indices", "classes",
    "n_candidates", "candidates", "n_scored", "boundary_share", "ties", "extra", "propagated",
)  # fmt: skip


PHASES = frozenset({"embed", "index", "search", "diffuse", "select", "infer", "acquire", "aux_train"})
"""Of a query, exclusive."""


def choice(record: RoundRecord) -> dict[str, Any]:
    """The fields that a repetition must reproduce bit for bit."""
    return {name: getattr(record, name) for name in CHOICE_FIELDS}


@dataclass(frozen=True, eq=False)
class RunLog:
    """A results file read back, in this version's terms.

    ``lines`` are its whole lines as they stand there, ``length`` their bytes, before any torn last one.
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
        """done, failed, skipped or partial (begun, and nothing the matter)."""
        return "done" if self.done else "failed" if self.failure else "skipped" if self.skipped else "partial"

    @property
    def begun(self) -> bool:
        """Whether it has ever started: otherwise the header says only which run it is, and the next line why not."""
        return "initial" in self.header


def picks(records: Sequence[RoundRecord]) -> list[int]:
    """Every position labeled by a query so far, in order."""
    return [position for record in records for position in record.indices or []]


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
    jobs: int  # as in a row: the runs at work on this machine, the replay included
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
        """Whether the network was the rows': the run's own strategy picked the same again, in every round."""
        return bool(self.own) and all(timing.picks_equal for timing in self.own)

    def of(self, log: RunLog) -> bool:
        """Whether these are of the rows that the run has now, and not of rows that were there before."""
        return bool(self.header["picks"] == state_digest(log))


def state_digest(log: RunLog) -> str:
    """What a run's states follow from: its fingerprint's content, its initial set and its picks, in order."""
    content = [log.header["fingerprint"]["config"], log.header["initial"], picks(log.records)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class OutlinePrint:
    algorithm_version: int
    config: str


@dataclass(frozen=True)
class Fingerprint(OutlinePrint):
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
    vectors: str = ""  # older files do not say


@dataclass(frozen=True)
class Outline:
    """The header of a run that failed or was skipped before it began."""

    kind: str
    schema_version: int
    cell: str
    profile: str
    config: dict[str, Any]
    fingerprint: OutlinePrint
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Header(Outline):
    fingerprint: Fingerprint
    data: dict[str, Any]
    network: dict[str, Any]
    setup: dict[str, Any]
    initial: list[int]
    initial_classes: list[int] = field(default_factory=list)  # older files do not say


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
class Named:
    name: str


@dataclass(frozen=True)
class Essentials:
    """What the configuration of any version says, among much else."""

    seed: int
    rounds: int
    batch_size: int
    initial_size: int | None
    dataset: Named
    strategy: Named


@dataclass(frozen=True)
class DataFacts:
    pool: int
    test: int
    shape: list[int]
    n_classes: int


OPEN = (Essentials, Named)
"""These may have other fields beside those that are here."""

LINES: Mapping[str, type] = {"round": Round, "failure": Failure, "skipped": Skipped, "continuation": Continuation}
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
    """What of a parsed JSON value is not as the type says, one line each; ``name`` is the value's own.

    ``partial``: fields of a dataclass may be missing, and others there.
    """
    if hint is Any:
        return
    if is_dataclass(hint):
        yield from _of_fields(value, hint, name, partial)
    elif isinstance(hint, UnionType):
        options = [option for option in get_args(hint) if option is not NoneType or value is None]
        if len(options) == 1:
            yield from find_misfits(value, options[0], name, partial)
        elif all(any(find_misfits(value, option, name, partial)) for option in options):
            yield _expected(name, value, hint)
    elif get_origin(hint) is list and isinstance(value, list):
        wrong = (found for item in value for found in find_misfits(item, get_args(hint)[0], f"{name}[...]", partial))
        yield from (found for found, _ in zip(wrong, range(1), strict=False))
    elif get_origin(hint) is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from find_misfits(item, get_args(hint)[1], f"{name}.{key}", partial)
    elif not _PLAIN.get(hint, lambda _: False)(value):
        yield _expected(name, value, hint)


def _of_fields(value: Any, hint: Any, name: str, partial: bool) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _expected(name, value, hint)
        return
    hints, needed = _declared_fields(hint)
    path = f"{name}." if name else ""
    if not partial:
        yield from (f"{path}{key} is missing" for key in needed if key not in value)
    if not partial and hint not in OPEN:
        yield from (f"{path}{key} is no field of this kind of line" for key in value if key not in hints)
    for key, item in value.items():
        if key in hints:
            yield from find_misfits(item, hints[key], f"{path}{key}", partial)


@cache
def _declared_fields(hint: type) -> tuple[dict[str, Any], list[str]]:
    """The types of a dataclass's fields, and the fields that must be there."""
    optional = {f.name for f in fields(hint) if f.default is not MISSING or f.default_factory is not MISSING}
    return get_type_hints(hint), [f.name for f in fields(hint) if f.name not in optional]


def _expected(name: str, value: Any, hint: Any) -> str:
    shown = repr(value)
    kind = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)
    return f"{name} is {shown if len(shown) <= 40 else shown[:37] + '...'}, not {kind}"


# What a report takes from a file beside what every file must say: looked for once, before anything is reckoned.


NEEDED_OF_ALL: RequiredFields = {"fingerprint.algorithm_version": (int,), "fingerprint.config": (str,)}
"""Of every run."""

NEEDED_OF_BEGUN: RequiredFields = {
    "fingerprint.data": (str,), "fingerprint.weights": (str, NoneType), "fingerprint.files": (str, NoneType),
    "initial": (list,),
}  # fmt: skip
"""Of one that has begun."""

NEEDED_BY_REPORT: RequiredFields = {
    "config.batch_size": (int,), "config.restricted_size": (int,), "config.graph.graph_k": (int,),
    "config.representation.kind": (str,), "config.representation.encoder": (str,),
    "config.representation.path": (str, NoneType), "config.representation.model": (str, NoneType),
    "fingerprint.device": (str,), "fingerprint.torch": (str,),
    "provenance.git.revision": (str, NoneType), "provenance.git.dirty": (bool, NoneType),
    "provenance.machine.cpu": (str,), "provenance.machine.cores": (int,), "provenance.versions": (dict,),
}  # fmt: skip
"""Of one that has begun, for a report alone."""

NEEDED_OF_SETUP: RequiredFields = {
    "fingerprint.graph": (str,), "fingerprint.latents": (str,), "setup.representation.seconds": (float, int),
    "setup.representation.label_share": (dict,), "setup.graph.seconds": (float, int), "setup.graph.components": (int,),
    "setup.graph.exact": (bool,), "setup.graph.recall": (float, int),
}  # fmt: skip
"""Of one that needs a graph: full supervision does not."""


OPTIONAL_FACTS: RequiredFields = {"data": (dict,), "data.n_classes": (int, NoneType), "initial_classes": (list,)}
"""Of whichever says so."""


def check_content_facts(log: RunLog) -> None:
    """Raises ResultsError where a file does not tell what its rows are of."""
    check_header(log.header, {**NEEDED_OF_ALL, **(NEEDED_OF_BEGUN if log.begun else {})}, str(log.path))


def check_report_facts(log: RunLog) -> None:
    """Raises ResultsError for the first that a report would miss."""
    strategy = log.header["config"]["initial_size"] is not None
    check_content_facts(log)
    if log.begun:
        check_header(log.header, {**NEEDED_BY_REPORT, **(NEEDED_OF_SETUP if strategy else {})}, str(log.path))
    _check_options(log)
    for record in log.records[:-1] if strategy else ():
        if not record.query_seconds or record.query_seconds < 0 or record.n_scored is None:
            raise ResultsError(
                f"{log.path}: no seconds or no points scored of the query of round {record.round}: {RESTORE}"
            )


def _check_options(log: RunLog) -> None:
    """What a header may say of the evaluation: of the right type where it does."""
    there = {name: kinds for name, kinds in OPTIONAL_FACTS.items() if name.partition(".")[0] in log.header}
    data = log.header.get("data")
    if isinstance(data, dict) and "n_classes" not in data:
        there.pop("data.n_classes", None)
    check_header(log.header, there, str(log.path))
    if any(type(one) is not int for one in log.header.get("initial_classes", ())):
        raise ResultsError(f"{log.path}, line 1: in initial_classes: not all are whole numbers: {RESTORE}")
