"""From a row of a table back to its cells: the command that runs one of them again, from its configuration alone."""

import json
import re
import shlex
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from dgal_bench.compose import compose
from dgal_bench.config import to_dict
from dgal_bench.errors import UserError
from dgal_bench.record import CellLog
from dgal_bench.strategies import resolved

FOLDER = "again"
"""Beside the default results, not among them: a report over both would find each cell twice."""


def command(log: CellLog) -> str | None:
    """``dgal-bench run dataset=digits strategy=dgmg seed=3 ...``; None where this version cannot say it.

    That is for full supervision, which has no strategy, and for rows whose configuration had other keys.
    """
    config = log.header["config"]
    if config["initial_size"] is None:
        return None
    settings = _settings(_frozen(config))
    if settings is None:
        return None
    return " ".join(["dgal-bench run", *map(shlex.quote, settings), f"seed={config['seed']}", f"results={FOLDER}"])


def _frozen(config: Mapping[str, Any]) -> str:
    """The configuration less its seed, as text: the same for all seeds of a strategy, which are composed once."""
    return json.dumps({key: value for key, value in config.items() if key != "seed"}, sort_keys=True)


@lru_cache(maxsize=4096)
def _settings(text: str) -> tuple[str, ...] | None:
    """Groups to choose, and every setting in which the configuration differs from what they make."""
    wanted = json.loads(text)
    names = (wanted["dataset"].get("kind"), wanted["strategy"]["name"], wanted.get("profile"))
    if None in names:
        return None
    choices = dict(zip(("dataset", "strategy", "profile"), names, strict=True)) | {"representation": "default"}
    try:
        base = compose(choices)
        known = to_dict(base) | {"strategy": to_dict(resolved(base.strategy))}
    except (UserError, TypeError):
        return None  # a plugin's strategy, or a group that is no more
    del known["seed"]
    if _keys(known) != _keys(wanted):
        return None
    chosen = [f"{key}={value}" for key, value in choices.items() if key != "representation"]
    return (*chosen, *(f"{key}={_text(value)}" for key, value in _changes(known, wanted).items()))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(old[key], Mapping):
            found |= _changes(old[key], value, f"{prefix}{key}.")
        elif value != old[key]:
            found[f"{prefix}{key}"] = value
    return found


def _keys(config: Mapping[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in config.items():
        found |= _keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}"}
    return found


def _text(value: Any) -> str:
    """As the command line reads it."""
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./@+-]+", value) else json.dumps(value)  # a comma would make it a grid
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
