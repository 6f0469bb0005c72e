"""One word of a command at a time: a switch, a number, and what a verb has no use for."""

from dgal_bench.arguments import Command
from dgal_bench.errors import ConfigError


def truth(command: Command, key: str, default: str, where: str = "") -> bool:
    choices = {"true": True, "false": False, "1": True, "0": False}
    text = command.one(key, default).lower()
    if text not in choices:
        raise ConfigError(f"{key}={text}: use true or false{where}")
    return choices[text]


def whole(key: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{key}={text}: use a whole number of 0 or more")
    return int(text)


def positive(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{key}={text}: use a whole number of 1 or more")
    return int(text)


def only_places(command: Command, *known: str) -> None:
    """Refuse keys that the verb would ignore."""
    if other := [key for key in command.values if key not in known]:
        takes = f"the keys of this verb are {', '.join(known)}" if known else "this verb takes none"
        raise ConfigError(f"{other[0]}= means nothing here: {takes}")


def only_settings(command: Command) -> None:
    """Refuse what the verb would ignore: bare words, and flags that are another's."""
    if command.words:
        word = command.words[0]
        raise ConfigError(f"'{word}' is no key=value: this verb takes settings, as in strategy={word}")
    only_flags(command, "--print-config", "--dry-run")


def only_flags(command: Command, *known: str) -> None:
    if other := [flag for flag in command.flags if flag not in known]:
        has = f"the flags of this verb are {', '.join(known)}" if known else "this verb has no flags"
        raise ConfigError(f"{other[0]} means nothing here: {has}")
