"""Where and how a sweep runs, and its grid of cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from dgal_bench.arguments import Command
from dgal_bench.checks import above_zero
from dgal_bench.compose import GROUPS, PART_SETTINGS, check_key, compose
from dgal_bench.config import to_dict
from dgal_bench.engines import ENGINES
from dgal_bench.errors import ConfigError, choose
from dgal_bench.request.places import cache_root, data_root, offline, plugins_of, results_root
from dgal_bench.request.words import positive, truth, whole
from dgal_bench.sweep import Settings
from dgal_bench.tracking.settings import WANDB

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
        jobs=positive("jobs", command.one("jobs", "")) if "jobs" in command.values else None,
        resume_anyway=resume == "anyway",
        offline=offline(command),
        plugins=plugins_of(command),
        full_supervision=truth(command, "full_supervision", str(suite.get("full_supervision", False))),
        engine=engine,
        retry=_retry(command),
        gpus=whole("gpus", command.one("gpus", "")) if "gpus" in command.values else None,
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


def wants_report(command: Command) -> bool:
    """Whether a sweep is to end with tables and figures; without them it is over some seconds earlier."""
    return truth(command, "report", "true")


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
