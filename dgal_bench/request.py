"""What a command asks for: where and how to run, and the grid of cells, every word of it checked."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from dgal_bench import plugins
from dgal_bench.arguments import Command
from dgal_bench.checks import above_zero
from dgal_bench.compose import GROUPS, PART_SETTINGS, check_key, compose
from dgal_bench.config import to_dict
from dgal_bench.engines import ENGINES
from dgal_bench.errors import ConfigError, ResultsError, choose
from dgal_bench.sweep import Settings

if TYPE_CHECKING:
    from dgal_bench.retiming.plan import Wanted

DEFAULTS = {"dataset": "digits", "representation": "default", "profile": "cpu", "seed": "0"}

SLURM = ("cluster", "partition", "account", "qos", "constraint", "time", "mem_gb", "setup", "folder")
"""Of engine=slurm: what a job asks for. ``cluster=local`` runs jobs as processes here, to try a command out."""

# Keys that say where and how to run. They change no result, so they are in no configuration (a plugin's hash is: it
# stands beside the kind of each of its parts).
PLACES = (
    "results", "suite", "data", "cache", "jobs", "resume", "retry", "offline", "plugins", "full_supervision", "engine",
    "gpus", "gpus_per_cell", "ray.address", "past", *(f"slurm.{name}" for name in SLURM),
)  # fmt: skip


def settings_of(command: Command, default_suite: str, suite: Mapping[str, object] = MappingProxyType({})) -> Settings:
    """Where and how to run; the plugins it names are loaded, so that their strategies can be asked for."""
    resume = command.one("resume", "")
    if resume not in ("", "anyway"):
        raise ConfigError(f"resume={resume}: the only choice is resume=anyway")
    results, engine = results_root(command), command.one("engine", "local")
    choose(dict.fromkeys(ENGINES), engine, "engine")
    _only_of(command, engine)
    return Settings(
        results=results,
        suite=command.one("suite", default_suite),
        data=data_root(command),
        cache=cache_root(command),
        jobs=_positive("jobs", command.one("jobs", "")) if "jobs" in command.values else None,
        resume_anyway=resume == "anyway",
        offline=offline(command),
        plugins=plugins.install(_plugins(command)),
        full_supervision=_truth(command, "full_supervision", str(suite.get("full_supervision", False))),
        engine=engine,
        retry=_retry(command),
        gpus=_whole("gpus", command.one("gpus", "")) if "gpus" in command.values else None,
        gpus_per_cell=above_zero(
            "gpus_per_cell", command.one("gpus_per_cell", "1"), "a number above 0, such as 0.5 for two cells on a GPU"
        ),
        ray_address=command.one("ray.address", "") or None,
        slurm=_slurm(command),
        past=[Path(text) for text in command.values.get("past", [str(results)])],
    )


def _slurm(command: Command) -> dict[str, str]:
    """A list of partitions is Slurm's own, with commas, and no grid."""
    given = {name: command.values[f"slurm.{name}"] for name in SLURM if f"slurm.{name}" in command.values}
    if empty := [name for name, values in given.items() if not values]:
        raise ConfigError(f"slurm.{empty[0]}= is empty: leave it out")
    return {name: ",".join(values) for name, values in given.items()}


def _only_of(command: Command, engine: str) -> None:
    """Refuse what another engine than the one chosen would be told."""
    for key in command.values:
        of = key.partition(".")[0]
        if of in ENGINES and key in PLACES and of != engine:
            raise ConfigError(f"{key}= is for engine={of}, this one is {engine}")


def _retry(command: Command) -> list[str]:
    statuses = command.values.get("retry", [])
    for status in statuses:
        choose(dict.fromkeys(("failed", "skipped")), status, "retry")
    return statuses


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
        seed=_whole("seed", command.one("seed", "")) if "seed" in command.values else None,
        rounds=_rounds(command),
        repeats=_positive("repeats", command.one("repeats", "3")),
        common=command.flags.get("--common"),
        again="--again" in command.flags,
        offline=offline(command),
        plugins=plugins.install(_plugins(command)),
    )


def _rounds(command: Command) -> list[int] | None:
    """None: the first, the middle and the last; none at all: every one."""
    rounds = command.values.get("rounds")
    if rounds == []:
        raise ConfigError("rounds= is an empty list: use rounds=0,7,14 or rounds=all")
    return None if rounds is None else [] if rounds == ["all"] else [_whole("rounds", text) for text in rounds]


def _plugins(command: Command) -> list[str]:
    if command.values.get("plugins") == []:
        raise ConfigError("plugins= is an empty list: name a .py file or an entry point")
    return command.values.get("plugins", [])


def results_root(command: Command) -> Path:
    """The results folder, there or not; refused where it can never be one."""
    results = Path(command.one("results", "results/runs"))
    nearest = next(path for path in (results, *results.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise ResultsError(f"results={results} cannot be a folder, {nearest} is a file: set another results=DIR")
    return results


def data_root(command: Command) -> Path:
    return Path(command.one("data", os.environ.get("DGAL_DATA", "data")))


def cache_root(command: Command) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dgal_bench"
    return Path(command.one("cache", os.environ.get("DGAL_CACHE", str(home))))


def offline(command: Command) -> bool:
    return _truth(command, "offline", os.environ.get("DGAL_OFFLINE", "false"), " (also in $DGAL_OFFLINE)")


def _truth(command: Command, key: str, default: str, where: str = "") -> bool:
    choices = {"true": True, "false": False, "1": True, "0": False}
    text = command.one(key, default).lower()
    if text not in choices:
        raise ConfigError(f"{key}={text}: use true or false{where}")
    return choices[text]


def only_places(command: Command, *known: str) -> None:
    """Refuse keys that the verb would ignore."""
    if other := [key for key in command.values if key not in known]:
        takes = f"the keys of this verb are {', '.join(known)}" if known else "this verb takes none"
        raise ConfigError(f"{other[0]}= means nothing here: {takes}")


def _whole(key: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{key}={text}: use a whole number of 0 or more")
    return int(text)


def _positive(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{key}={text}: use a whole number of 1 or more")
    return int(text)


def axes_of(command: Command, suite: Mapping[str, object]) -> dict[str, list[str]]:
    """The grid: defaults, then the suite's axes, then the command line's."""
    axes = {key: [value] for key, value in DEFAULTS.items()}
    for key, values in (item for item in suite.items() if item[0] not in PLACES):
        axes[key] = [str(value) for value in values] if isinstance(values, list) else [str(values)]
    axes |= {key: values for key, values in command.values.items() if key not in PLACES}
    _check_keys(axes)
    return axes


def _check_keys(axes: Mapping[str, Sequence[str]]) -> None:
    """A misspelt place or group has no dot and may be near a name that the configuration does not know."""
    sample = to_dict(compose({**DEFAULTS, "strategy": "random"}))
    for key in axes:
        if key not in GROUPS:
            check_key(key, sample, extra=(*PLACES, *PART_SETTINGS))


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


def check_writable(results: Path) -> None:
    """Say so before hours of work, not after."""
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"results={results} cannot be written: {error.strerror}: set results=DIR") from error
    if not os.access(results, os.W_OK):
        raise ResultsError(f"results={results} cannot be written: set results=DIR")
