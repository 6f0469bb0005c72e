"""What the lines of a results file are made of: every field's name and type, and what in a line is otherwise."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from dgal_bench.record import RoundRecord


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
    vectors: str = ""  # files of before do not say


@dataclass(frozen=True)
class Outline:
    """The header of a cell that failed or was skipped before it began."""

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
    initial_classes: list[int] = field(default_factory=list)  # files of before do not say


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


def misfits(value: Any, hint: Any, name: str = "", partial: bool = False) -> Iterator[str]:
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
            yield from misfits(value, options[0], name, partial)
        elif all(any(misfits(value, option, name, partial)) for option in options):
            yield _otherwise(name, value, hint)
    elif get_origin(hint) is list and isinstance(value, list):
        wrong = (found for item in value for found in misfits(item, get_args(hint)[0], f"{name}[...]", partial))
        yield from (found for found, _ in zip(wrong, range(1), strict=False))
    elif get_origin(hint) is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from misfits(item, get_args(hint)[1], f"{name}.{key}", partial)
    elif not _PLAIN.get(hint, lambda _: False)(value):
        yield _otherwise(name, value, hint)


def _of_fields(value: Any, hint: Any, name: str, partial: bool) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _otherwise(name, value, hint)
        return
    hints, needed = _declared(hint)
    path = f"{name}." if name else ""
    if not partial:
        yield from (f"{path}{key} is missing" for key in needed if key not in value)
    if not partial and hint not in OPEN:
        yield from (f"{path}{key} is no field of this kind of line" for key in value if key not in hints)
    for key, item in value.items():
        if key in hints:
            yield from misfits(item, hints[key], f"{path}{key}", partial)


@cache
def _declared(hint: type) -> tuple[dict[str, Any], list[str]]:
    """The types of a dataclass's fields, and the fields that must be there."""
    optional = {f.name for f in fields(hint) if f.default is not MISSING or f.default_factory is not MISSING}
    return get_type_hints(hint), [f.name for f in fields(hint) if f.name not in optional]


def _otherwise(name: str, value: Any, hint: Any) -> str:
    shown = repr(value)
    kind = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)
    return f"{name} is {shown if len(shown) <= 40 else shown[:37] + '...'}, not {kind}"
