"""Where and how a sweep runs, and its grid of runs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from dgal_bench.config.compose import GROUPS, PART_SETTINGS, check_key, compose, split_values
from dgal_bench.config.schema import parse_positive, to_dict
from dgal_bench.core.errors import ConfigError, ResultsError, choose, did_you_mean
from dgal_bench.core.files import ensure_writable
from dgal_bench.results.tracking import WANDB, Tracking, check_project, decide_mode

if TYPE_CHECKING:
    from dgal_bench.engines.replay import ReplayOptions
    from dgal_bench.engines.sweep import SweepSettings


KNOWN_FLAGS = ("--print-config", "--dry-run", "--out", "--common", "--again", "--push", "--version", "--help")

FLAGS_WITH_VALUE = {"--out": "a folder: --out DIR", "--common": "a run: --common digits/margin/seed-0"}

VERB_FLAGS = {"dashboard": {"--dry-run": "a file: --dry-run spec.json"}}
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


def parse_arguments(arguments: Sequence[str], verb: str = "") -> Command:
    """Split what follows a verb; a flag that is not one of FLAGS is an error."""
    with_value = FLAGS_WITH_VALUE | VERB_FLAGS.get(verb, {})
    values: dict[str, list[str]] = {}
    words: list[str] = []
    flags: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            name, _, value = argument.partition("=")
            if name not in KNOWN_FLAGS:
                raise ConfigError(f"unknown flag '{name}'{did_you_mean(name, KNOWN_FLAGS)}")
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


# One word of a command at a time: a switch, a number, and what a verb has no use for.


def parse_bool(command: Command, key: str, default: str, where: str = "") -> bool:
    choices = {"true": True, "false": False, "1": True, "0": False}
    text = command.one(key, default).lower()
    if text not in choices:
        raise ConfigError(f"{key}={text}: use true or false{where}")
    return choices[text]


def parse_whole(key: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{key}={text}: use a whole number of 0 or more")
    return int(text)


def parse_count(key: str, text: str) -> int:
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


# Where things are for a command: results, data, caches, plugins; and whether a network is.


def results_root(command: Command) -> Path:
    """The results folder, there or not; refused where it can never be one."""
    results = Path(command.one("results", "results/runs"))
    nearest = next(path for path in (results, *results.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise ResultsError(f"results={results} cannot be a folder, {nearest} is a file: set another results=DIR")
    return results


def check_writable(results: Path) -> None:
    """Say so before hours of work, not after."""
    ensure_writable(results, f"results={results}", "set results=DIR")


def data_root(command: Command) -> Path:
    return Path(command.one("data", os.environ.get("DGAL_DATA", "data")))


def cache_root(command: Command) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dgal_bench"
    return Path(command.one("cache", os.environ.get("DGAL_CACHE", str(home))))


def offline(command: Command) -> bool:
    return parse_bool(command, "offline", os.environ.get("DGAL_OFFLINE", "false"), " (also in $DGAL_OFFLINE)")


def plugins_of(command: Command) -> tuple[str, ...]:
    """Loaded, so that their strategies can be asked for; with absolute paths, for another process."""
    if command.values.get("plugins") == []:
        raise ConfigError("plugins= is an empty list: name a .py file or an entry point")
    from dgal_bench.strategies import plugins

    return plugins.install(command.values.get("plugins", []))


# What a command says of W&B: whether it is told, and how it is reached.


def tracking_of(command: Command) -> Tracking | None:
    """How W&B is told of a sweep; None: not at all."""
    tracking = command.one("tracking", "off")
    choose(dict.fromkeys(("off", "wandb")), tracking, "tracking")
    if tracking == "wandb":
        return wandb_of(command)
    if given := [key for key in WANDB if key in command.values]:
        raise ConfigError(f"{given[0]}= is for tracking=wandb, this one is off")
    return None


def wandb_of(command: Command) -> Tracking:
    """The project and how to reach it, with wandb.mode=auto decided."""
    project, entity = project_of(command)
    return decide_mode(
        Tracking(
            mode=command.one("wandb.mode", "auto"),
            project=project,
            entity=entity or None,
            images=tuple(parse_whole("wandb.images", text) for text in command.values.get("wandb.images", [])),
            data=str(data_root(command).absolute()),
            cache=str(cache_root(command).absolute()),
        ),
        offline(command),
    )


def project_of(command: Command) -> tuple[str, str]:
    """The project, and whose it is: an empty name is W&B's own default of whoever has the key."""
    if empty := [key for key in WANDB if command.values.get(key) == []]:
        raise ConfigError(f"{empty[0]}= is empty: leave it out")
    project = command.one("wandb.project", os.environ.get("WANDB_PROJECT") or "dgal_bench")
    check_project(project)
    return project, command.one("wandb.entity", os.environ.get("WANDB_ENTITY") or "")


DEFAULTS = {"dataset": "digits", "representation": "default", "profile": "cpu", "seed": "0"}

SLURM = ("cluster", "partition", "account", "qos", "constraint", "time", "mem_gb", "setup", "folder")
"""Of engine=slurm: what a job asks for. ``cluster=local`` runs jobs as processes here, to try a command out."""

# Keys that say where and how to run. They change no result, so they are in no configuration (a plugin's hash is: it
# stands beside the kind of each of its parts).
PLACES = (
    "results", "suite", "data", "cache", "jobs", "resume", "retry", "offline", "plugins", "full_supervision", "engine",
    "gpus", "gpus_per_cell", "ray.address", "past", "report", *(f"slurm.{name}" for name in SLURM),
    "tracking", *WANDB,
)  # fmt: skip


def settings_of(
    command: Command, default_suite: str, suite: Mapping[str, object] = MappingProxyType({})
) -> "SweepSettings":
    """Where and how to run; the plugins it names are loaded, so that their strategies can be asked for."""
    from dgal_bench.engines import ENGINES
    from dgal_bench.engines.sweep import SweepSettings

    resume = command.one("resume", "")
    if resume not in ("", "anyway"):
        raise ConfigError(f"resume={resume}: the only choice is resume=anyway")
    results, engine = results_root(command), command.one("engine", "local")
    choose(dict.fromkeys(ENGINES), engine, "engine")
    _only_of(command, engine)
    return SweepSettings(
        results=results,
        suite=command.one("suite", default_suite),
        data=data_root(command),
        cache=cache_root(command),
        jobs=parse_count("jobs", command.one("jobs", "")) if "jobs" in command.values else None,
        resume_anyway=resume == "anyway",
        offline=offline(command),
        plugins=plugins_of(command),
        full_supervision=parse_bool(command, "full_supervision", str(suite.get("full_supervision", False))),
        engine=engine,
        retry=_retry(command),
        gpus=parse_whole("gpus", command.one("gpus", "")) if "gpus" in command.values else None,
        gpus_per_cell=parse_positive(
            "gpus_per_cell", command.one("gpus_per_cell", "1"), "a number above 0, such as 0.5 for two runs on a GPU"
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
    from dgal_bench.engines import ENGINES

    for key in command.values:
        of = key.partition(".")[0]
        if of in ENGINES and key in PLACES and of != engine:
            raise ConfigError(f"{key}= is for engine={of}, this one is {engine}")


def _retry(command: Command) -> list[str]:
    statuses = command.values.get("retry", [])
    for status in statuses:
        choose(dict.fromkeys(("failed", "skipped")), status, "retry")
    return statuses


def wants_report(command: Command) -> bool:
    """Whether a sweep is to end with tables and figures; without them it is over some seconds earlier."""
    return parse_bool(command, "report", "true")


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


# What a replay is to time again.


def replay_of(command: Command) -> "ReplayOptions":
    """What is to be timed again; the plugins it names are loaded."""
    from dgal_bench.engines.replay import ReplayOptions

    if len(command.words) != 1:
        raise ConfigError("replay takes one results folder: dgal-bench replay RESULTS")
    only_flags(command, "--common", "--again")
    only_places(command, "seed", "rounds", "repeats", "data", "cache", "offline", "plugins")
    if "--common" in command.flags and "seed" in command.values:
        raise ConfigError("--common says which seed: leave seed= out")
    return ReplayOptions(
        results=Path(command.words[0]),
        data=data_root(command),
        cache=cache_root(command),
        seed=parse_whole("seed", command.one("seed", "")) if "seed" in command.values else None,
        rounds=_rounds(command),
        repeats=parse_count("repeats", command.one("repeats", "3")),
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
    return None if rounds is None else [] if rounds == ["all"] else [parse_whole("rounds", text) for text in rounds]
