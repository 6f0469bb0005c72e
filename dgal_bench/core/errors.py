"""A user's mistakes, each an error of one line; and lookups that name the nearest right spelling."""

import traceback
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A user's mistake: shown as one line, without a traceback. ``exit_code`` is the process's."""

    exit_code = 2


class ConfigError(UserError):
    """A key, kind or value of the configuration is wrong."""


class NotApplicableError(ConfigError):
    """A strategy cannot work on these data: its runs are skipped, not failed."""


class StrategyError(UserError):
    """A strategy broke its contract: its run fails, the others go on."""


class ResultsError(UserError):
    """A results file or folder cannot be used as it is."""


class CacheError(ResultsError):
    """The cache cannot be used: its disk is full or not writable."""


class DataError(UserError):
    """A data set is missing, truncated or of the wrong shape."""

    exit_code = 3


def did_you_mean(name: str, choices: Iterable[str], n: int = 1) -> str:
    """``"; did you mean 'margin'? (choices: ...)"``: the ``n`` nearest, and all choices where they are few."""
    names = sorted(choices)
    near = get_close_matches(name, names, n=n, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    listing = f" (choices: {', '.join(names)})" if len(names) <= 30 else ""
    return hint + listing


def choose(choices: Mapping[str, T], name: str, what: str) -> T:
    """The entry called ``name``; a miss raises ConfigError naming the nearest and all choices."""
    if name not in choices:
        raise ConfigError(f"unknown {what} '{name}'{did_you_mean(name, choices)}")
    return choices[name]


def error_text(error: BaseException, most: int = 300) -> str:
    """At most so many characters of an error's message, on one line; its type where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def innermost_error(error: BaseException, within: str = "") -> str:
    """``TypeError: message (my_strategies.py, line 7)``: the last line outside installed libraries before the error.

    ``within``: only frames of files whose path contains this.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if within in f.filename]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<" not in frame.filename]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}{where}"
