"""The words of a command line: ``key=value`` pairs with comma lists, flags, and the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dgal_bench.errors import ConfigError, did_you_mean

FLAGS = ("--print-config", "--dry-run", "--out", "--common", "--again", "--push", "--version", "--help")

WITH_VALUE = {"--out": "a folder: --out DIR", "--common": "a cell: --common digits/margin/seed-0"}

OF_VERB = {"dashboard": {"--dry-run": "a file: --dry-run spec.json"}}
"""Flags that have a value with this verb alone."""


@dataclass(frozen=True)
class Command:
    """What was asked for: ``values`` of each key, the words that are neither keys nor flags, and the flags."""

    values: Mapping[str, list[str]]
    words: Sequence[str]
    flags: Mapping[str, str]

    def one(self, key: str, default: str) -> str:
        """The single value of a key that does not make a grid."""
        values = self.values.get(key, [default])
        if len(values) != 1:
            raise ConfigError(f"{key} takes one value, not {len(values)}: {key}={','.join(values)}")
        return values[0]


def split_values(text: str) -> list[str]:
    """``a,b`` -> [a, b]; a comma inside brackets or quotes does not split: ``[1,2]``."""
    values, depth, quote, current = [], 0, "", ""
    for character in text:
        if character == "," and depth == 0 and not quote:
            values.append(current)
            current = ""
            continue
        current += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
    values = [value.strip() for value in [*values, current]]
    return [value for value in values if value]


def parse(arguments: Sequence[str], verb: str = "") -> Command:
    """Split what follows a verb; a flag that is not one of FLAGS is an error."""
    with_value = WITH_VALUE | OF_VERB.get(verb, {})
    values: dict[str, list[str]] = {}
    words: list[str] = []
    flags: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            name, _, value = argument.partition("=")
            if name not in FLAGS:
                raise ConfigError(f"unknown flag '{name}'{did_you_mean(name, FLAGS)}")
            if value and name not in with_value:
                raise ConfigError(f"{name} takes no value")
            flags[name] = value or (next(rest, "") if name in with_value else "")
            if name in with_value and not flags[name]:
                raise ConfigError(f"{name} needs {with_value[name]}")
        elif "=" in argument:
            key, _, text = argument.partition("=")
            if key in values:
                raise ConfigError(f"{key}= is given twice: join the values with a comma")
            values[key] = split_values(text)
        else:
            words.append(argument)
    return Command(values, words, flags)
