"""What a replay is to time again."""

from pathlib import Path
from typing import TYPE_CHECKING

from dgal_bench.arguments import Command
from dgal_bench.errors import ConfigError
from dgal_bench.request.places import cache_root, data_root, offline, plugins_of
from dgal_bench.request.words import only_flags, only_places, positive, whole

if TYPE_CHECKING:
    from dgal_bench.retiming.plan import Wanted


def replay_of(command: Command) -> "Wanted":
    """What is to be timed again; the plugins it names are loaded."""
    from dgal_bench.retiming.plan import Wanted

    if len(command.words) != 1:
        raise ConfigError("replay takes one results folder: dgal-bench replay RESULTS")
    only_flags(command, "--common", "--again")
    only_places(command, "seed", "rounds", "repeats", "data", "cache", "offline", "plugins")
    if "--common" in command.flags and "seed" in command.values:
        raise ConfigError("--common says which seed: leave seed= out")
    return Wanted(
        results=Path(command.words[0]),
        data=data_root(command),
        cache=cache_root(command),
        seed=whole("seed", command.one("seed", "")) if "seed" in command.values else None,
        rounds=_rounds(command),
        repeats=positive("repeats", command.one("repeats", "3")),
        common=command.flags.get("--common"),
        again="--again" in command.flags,
        offline=offline(command),
        plugins=plugins_of(command),
    )


def _rounds(command: Command) -> list[int] | None:
    """None: the first, the middle and the last; none at all: every one."""
    rounds = command.values.get("rounds")
    if rounds == []:
        raise ConfigError("rounds= is an empty list: use rounds=0,7,14 or rounds=all")
    return None if rounds is None else [] if rounds == ["all"] else [whole("rounds", text) for text in rounds]
