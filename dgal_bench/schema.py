"""The versions of a results file, and what makes an old one readable: one step from each version to the next."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType
from typing import Any

from dgal_bench.errors import ResultsError

SCHEMA_VERSION = 2
"""Raised when lines written before would mean something else, or could no longer be read.

1: ``jobs`` counts the cells of the command alone; headers of before weights, files and facts of the data say nothing
   of them. Every file has begun: its header names the initial set.
2: ``jobs`` counts the cells on the machine, whoever runs them, and ``busy_elsewhere`` what else kept it busy; a header
   without an initial set is of a cell that failed or was skipped before it began; lines of kind ``skipped``.
"""

RESTORE = "restore the line, or remove the file to start over"

Line = Mapping[str, Any]

Wanted = Mapping[str, tuple[type, ...]]
"""What a header must say, by dotted path, and of which JSON types."""

ESSENTIAL: Wanted = {
    "cell": (str,), "profile": (str,), "config.seed": (int,), "config.rounds": (int,),
    "config.initial_size": (int, NoneType), "config.dataset.name": (str,), "config.strategy.name": (str,),
    "config.strategy.restrict.kind": (str,), "config.strategy.acquire.kind": (str,),
}  # fmt: skip
"""Of every cell, whether it has begun or not: without them nobody knows which it is, or how far it is to go."""


def _from_1(lines: Sequence[Line]) -> list[Line]:
    header, *rest = lines
    fingerprint = {"weights": None, "files": None, **header["fingerprint"]}
    config = dict(header["config"])
    if isinstance(given := config.get("representation", {}), Mapping):
        config["representation"] = {"encoder": "cnn", "path": None, "model": None, **given}
    return [{"data": {}, **header, "fingerprint": fingerprint, "config": config}, *rest]


MIGRATIONS: Mapping[int, Callable[[Sequence[Line]], list[Line]]] = {1: _from_1}
"""From that version to the next one."""


def migrated(lines: Sequence[Line], where: str) -> list[Line]:
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
    check(lines[0], {"config": (dict,), "fingerprint": (dict,)}, where)
    done = list(lines)
    for step in range(version, SCHEMA_VERSION):
        done = MIGRATIONS[step](done)
    return [{**done[0], "schema_version": SCHEMA_VERSION}, *done[1:]]


def check(header: Line, wanted: Wanted, where: str) -> None:
    """Raises ResultsError for the first that is not there, or is something else."""
    for path, kinds in wanted.items():
        value: Any = header
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise ResultsError(f"{where}, line 1: a header without '{path}': {RESTORE}")
            value = value[name]
        if type(value) not in kinds:
            raise ResultsError(f"{where}, line 1: {path}: {misfit(value, kinds)}")


_JSON_NAMES: Mapping[type, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
    dict: "an object", NoneType: "null",
}  # fmt: skip


def misfit(value: Any, kinds: Collection[type]) -> str:
    """``"x", where a number should be: restore the line, ...``."""
    hidden = {int, bool} if float in kinds else set()  # a number may be whole
    expected = [name for kind, name in _JSON_NAMES.items() if kind in kinds and kind not in hidden]
    found = json.dumps(value)
    short = found if len(found) <= 40 else f"{found[:37]}..."
    return f"{short}, where {' or '.join(expected)} should be: {RESTORE}"
