"""The command line's words as typed options: where and how a sweep or replay runs, and the grid of runs."""

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
from dgal_bench.results.wandb_process import WANDB, Tracking, check_project, decide_mode

if TYPE_CHECKING:
    from dgal_bench.engines.replay import ReplayOptions
    from dgal_bench.engines.sweep import SweepSettings


FLAGS = ("--print-config", "--dry-run", "--out", "--common", "--again", "--push", "--version", "--help")

FLAGS_WITH_VALUE = {"--out": "a folder: --out DIR", "--common": "a run: --common digits/margin/seed-0"}

VERB_FLAGS = {"dashboard": {"--dry-run": "a file: --dry-run spec.json"}}
"""Flags that take a value only with this verb."""


@dataclass(frozen=True)
class Command:
    """What follows a verb: the ``values`` of each key, the words that are neither keys nor flags, and the flags."""

    values: Mapping[str, list[str]]
    words: Sequence[str]
    flags: Mapping[str, str]

    def single(self, key: str, default: str) -> str:
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


def parse_bool(command: Command, key: str, default: str, hint: str = "") -> bool:
    choices = {"true": True, "false": False, "1": True, "0": False}
    text = command.single(key, default).lower()
    if text not in choices:
        raise ConfigError(f"{key}={text}: use true or false{hint}")
    return choices[text]


def parse_whole(key: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{key}={text}: use a whole number of 0 or more")
    return int(text)


def parse_count(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{key}={text}: use a whole number of 1 or more")
    return int(text)


def only_keys(command: Command, *known: str) -> None:
    """Refuse keys that the verb would ignore."""
    if others := [key for key in command.values if key not in known]:
        takes = f"the keys of this verb are {', '.join(known)}" if known else "this verb takes none"
        raise ConfigError(f"{others[0]}= means nothing here: {takes}")


def only_settings(command: Command) -> None:
    """Refuse bare words, and flags of other verbs."""
    if command.words:
        word = command.words[0]
        raise ConfigError(f"'{word}' is no key=value: this verb takes settings, as in strategy={word}")
    only_flags(command, "--print-config", "--dry-run")


def only_flags(command: Command, *known: str) -> None:
    if others := [flag for flag in command.flags if flag not in known]:
        has = f"the flags of this verb are {', '.join(known)}" if known else "this verb has no flags"
        raise ConfigError(f"{others[0]} means nothing here: {has}")


def results_root(command: Command) -> Path:
    """The results folder, which need not exist; refused where a file is in its place."""
    results = Path(command.single("results", "results/runs"))
    nearest = next(path for path in (results, *results.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise ResultsError(f"results={results} cannot be a folder, {nearest} is a file: set another results=DIR")
    return results


def check_writable(results: Path) -> None:
    """Refuse a folder that takes no files before hours of work, not after."""
    ensure_writable(results, f"results={results}", "set results=DIR")


def data_root(command: Command) -> Path:
    return Path(command.single("data", os.environ.get("DGAL_DATA", "data")))


def cache_root(command: Command) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dgal_bench"
    return Path(command.single("cache", os.environ.get("DGAL_CACHE", str(home))))


def offline(command: Command) -> bool:
    return parse_bool(command, "offline", os.environ.get("DGAL_OFFLINE", "false"), " (also in $DGAL_OFFLINE)")


def plugins_of(command: Command) -> tuple[str, ...]:
    """Load the plugins, so that their strategies are choices; returns absolute paths, for other processes."""
    if command.values.get("plugins") == []:
        raise ConfigError("plugins= is an empty list: name a .py file or an entry point")
    from dgal_bench.strategies import plugins

    return plugins.install(command.values.get("plugins", []))


def tracking_of(command: Command) -> Tracking | None:
    """How a sweep is mirrored to W&B; None: it is not."""
    tracking = command.single("tracking", "off")
    choose(dict.fromkeys(("off", "wandb")), tracking, "tracking")
    if tracking == "wandb":
        return wandb_of(command)
    if unused := [key for key in WANDB if key in command.values]:
        raise ConfigError(f"{unused[0]}= is for tracking=wandb, this one is off")
    return None


def wandb_of(command: Command) -> Tracking:
    """The project and how to reach it, with wandb.mode=auto decided."""
    project, entity = project_of(command)
    return decide_mode(
        Tracking(
            mode=command.single("wandb.mode", "auto"),
            project=project,
            entity=entity or None,
            images=tuple(parse_whole("wandb.images", text) for text in command.values.get("wandb.images", [])),
            data=str(data_root(command).absolute()),
            cache=str(cache_root(command).absolute()),
        ),
        offline(command),
    )


def project_of(command: Command) -> tuple[str, str]:
    """The project and its entity; an empty entity is the default of the user who owns the W&B key."""
    if empty := [key for key in WANDB if command.values.get(key) == []]:
        raise ConfigError(f"{empty[0]}= is empty: leave it out")
    project = command.single("wandb.project", os.environ.get("WANDB_PROJECT") or "dgal_bench")
    check_project(project)
    return project, command.single("wandb.entity", os.environ.get("WANDB_ENTITY") or "")


DEFAULTS = {"dataset": "digits", "representation": "default", "profile": "cpu", "seed": "0"}

SLURM = ("cluster", "partition", "account", "qos", "constraint", "time", "mem_gb", "setup", "folder")
"""Settings of engine=slurm. ``cluster=local`` runs jobs as processes on this machine, to try a command out."""

# Keys that say where and how to run. They change no result, so they are in no configuration (a plugin's hash is: it
# stands beside the kind of each of its parts).
EXECUTION_KEYS = (
    "results", "suite", "data", "cache", "jobs", "resume", "retry", "offline", "plugins", "full_supervision", "engine",
    "gpus", "gpus_per_cell", "ray.address", "past", "report", *(f"slurm.{name}" for name in SLURM),
    "tracking", *WANDB,
)  # fmt: skip


def settings_of(
    command: Command, default_suite: str, suite: Mapping[str, object] = MappingProxyType({})
) -> "SweepSettings":
    """Where and how to run; loads the plugins that the command names."""
    from dgal_bench.engines import ENGINES
    from dgal_bench.engines.sweep import SweepSettings

    resume = command.single("resume", "")
    if resume not in ("", "anyway"):
        raise ConfigError(f"resume={resume}: the only choice is resume=anyway")
    results, engine = results_root(command), command.single("engine", "local")
    choose(dict.fromkeys(ENGINES), engine, "engine")
    for key in command.values:
        owner = key.partition(".")[0]
        if owner in ENGINES and key in EXECUTION_KEYS and owner != engine:
            raise ConfigError(f"{key}= is for engine={owner}, this one is {engine}")
    return SweepSettings(
        results=results,
        suite=command.single("suite", default_suite),
        data=data_root(command),
        cache=cache_root(command),
        jobs=parse_count("jobs", command.single("jobs", "")) if "jobs" in command.values else None,
        resume_anyway=resume == "anyway",
        offline=offline(command),
        plugins=plugins_of(command),
        full_supervision=parse_bool(command, "full_supervision", str(suite.get("full_supervision", False))),
        engine=engine,
        retry=_retry_statuses(command),
        gpus=parse_whole("gpus", command.single("gpus", "")) if "gpus" in command.values else None,
        gpus_per_cell=parse_positive(
            "gpus_per_cell", command.single("gpus_per_cell", "1"), "a number above 0, such as 0.5 for two runs on a GPU"
        ),
        ray_address=command.single("ray.address", "") or None,
        slurm=_slurm_options(command),
        past=[Path(text) for text in command.values.get("past", [str(results)])],
    )


def _slurm_options(command: Command) -> dict[str, str]:
    """By name. Commas stay in a value: a list of partitions is Slurm's own, not a grid."""
    options = {name: command.values[f"slurm.{name}"] for name in SLURM if f"slurm.{name}" in command.values}
    if empty := [name for name, values in options.items() if not values]:
        raise ConfigError(f"slurm.{empty[0]}= is empty: leave it out")
    return {name: ",".join(values) for name, values in options.items()}


def _retry_statuses(command: Command) -> list[str]:
    statuses = command.values.get("retry", [])
    for status in statuses:
        choose(dict.fromkeys(("failed", "skipped")), status, "retry")
    return statuses


def wants_report(command: Command) -> bool:
    """Whether a sweep ends with tables and figures, which take some seconds."""
    return parse_bool(command, "report", "true")


def axes_of(command: Command, suite: Mapping[str, object]) -> dict[str, list[str]]:
    """The grid: defaults, then the suite's axes, then the command line's."""
    axes = {key: [value] for key, value in DEFAULTS.items()}
    for key, values in (item for item in suite.items() if item[0] not in EXECUTION_KEYS):
        axes[key] = [str(value) for value in values] if isinstance(values, list) else [str(values)]
    axes |= {key: values for key, values in command.values.items() if key not in EXECUTION_KEYS}
    # a misspelt key without a dot may be near one that the configuration does not know
    known = to_dict(compose({**DEFAULTS, "strategy": "random"}))
    for key in axes:
        if key not in GROUPS:
            check_key(key, known, extra=(*EXECUTION_KEYS, *PART_SETTINGS))
    return axes


def replay_of(command: Command) -> "ReplayOptions":
    """What to time again; loads the plugins that the command names."""
    from dgal_bench.engines.replay import ReplayOptions

    if len(command.words) != 1:
        raise ConfigError("replay takes one results folder: dgal-bench replay RESULTS")
    only_flags(command, "--common", "--again")
    only_keys(command, "seed", "rounds", "repeats", "data", "cache", "offline", "plugins")
    if "--common" in command.flags and "seed" in command.values:
        raise ConfigError("--common says which seed: leave seed= out")
    return ReplayOptions(
        results=Path(command.words[0]),
        data=data_root(command),
        cache=cache_root(command),
        seed=parse_whole("seed", command.single("seed", "")) if "seed" in command.values else None,
        rounds=_rounds(command),
        repeats=parse_count("repeats", command.single("repeats", "3")),
        common=command.flags.get("--common"),
        again="--again" in command.flags,
        offline=offline(command),
        plugins=plugins_of(command),
    )


def _rounds(command: Command) -> list[int] | None:
    """None: the first, the middle and the last round; an empty list: every round."""
    rounds = command.values.get("rounds")
    if rounds == []:
        raise ConfigError("rounds= is an empty list: use rounds=0,7,14 or rounds=all")
    return None if rounds is None else [] if rounds == ["all"] else [parse_whole("rounds", text) for text in rounds]
