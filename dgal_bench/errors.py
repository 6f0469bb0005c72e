"""What a user can get wrong, said in one line; and lookups that name the nearest right spelling."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A user's mistake: shown as one line, without a traceback. ``exit_code`` is the process's."""

    exit_code = 2


class ConfigError(UserError):
    """A key, kind or value of the configuration is wrong."""


class ResultsError(UserError):
    """A results file or folder cannot be used as it is."""


class DataError(UserError):
    """A data set is missing, truncated or of the wrong shape."""

    exit_code = 3


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'margin'? (choices: ...)"``: the nearest where one is near, the choices where they are few."""
    known = sorted(choices)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    few = f" (choices: {', '.join(known)})" if len(known) <= 30 else ""
    return hint + few


def choose(choices: Mapping[str, T], name: str, what: str) -> T:
    """The entry called ``name``; a miss raises ConfigError naming the nearest and all choices."""
    if name not in choices:
        raise ConfigError(f"unknown {what} '{name}'{did_you_mean(name, choices)}")
    return choices[name]
