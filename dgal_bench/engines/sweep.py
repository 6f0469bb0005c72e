"""Plans the runs of a command, and compares them with the rows that the results folder has already."""

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dgal_bench.config.compose import GROUPS, compose
from dgal_bench.config.schema import TRAINING_SETTINGS, RunConfig, StrategyConfig, to_dict
from dgal_bench.core.errors import ConfigError
from dgal_bench.results.reader import read_run
from dgal_bench.results.resume import ALGORITHM_VERSION, check_resumable
from dgal_bench.results.rows import RunLog
from dgal_bench.strategies import resolve_parts

# Between a strategy's name and its own settings: dgmg+strategy.restrict.score=margin.
_OWN_SETTING = re.compile(r"\+(?=[a-z_.]+=)")

FULL_SUPERVISION = "full_supervision"
"""In place of a strategy's name, for the reference line."""

AXES = ("dataset", "representation", "profile", "seed", "strategy")


@dataclass(frozen=True)
class SweepSettings:
    """Where and how to run: nothing that a result depends on."""

    results: Path
    suite: str
    data: Path
    cache: Path
    jobs: int | None  # runs side by side; None: as many as fit
    resume_anyway: bool
    offline: bool
    plugins: Sequence[str]
    full_supervision: bool
    engine: str = "local"
    retry: Sequence[str] = ()  # statuses of runs to try again
    gpus: int | None = None  # None: all of this machine
    gpus_per_cell: float = 1.0
    ray_address: str | None = None  # None: start Ray on this machine
    slurm: Mapping[str, str] = field(default_factory=dict)
    past: Sequence[Path] = ()  # folders whose rows a dry run estimates from


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run to execute: its configuration, its file, and the words of ``dgal-bench run`` that compose it."""

    config: RunConfig
    path: Path
    command: Sequence[str] = ()

    @property
    def name(self) -> str:
        return f"{self.config.dataset.name}/{self.path.parent.name}/{self.path.stem}"

    @property
    def setup_key(self) -> str:
        """Equal for runs that share data, representation, graph and the network's shape (checked in the setup)."""
        names = ["dataset", "net"] + ([] if self.config.full_supervision else ["representation", "trainer", "graph"])
        parts = {name: to_dict(getattr(self.config, name)) for name in names}
        seed = self.config.representation_seed
        return json.dumps([parts, seed, self.config.device], sort_keys=True)


def plan_runs(axes: Mapping[str, Sequence[str]], settings: SweepSettings) -> list[PlannedRun]:
    """Every combination of the axes as a run, all strategies of a seed before the next seed.

    A strategy may have settings of its own, ``dgmg+strategy.restrict.score=margin``; they are part of its folder's
    name, as is a key other than AXES with several values: ``dgmg+graph.graph_k=10``.

    Raises:
        ConfigError: a name, key or value is wrong.
    """
    if empty := [key for key, values in axes.items() if not values]:
        raise ConfigError(f"{empty[0]}= is an empty list: give at least one value")
    others = [key for key in axes if key not in AXES]
    jobs = []
    order = [key for key in AXES if key != "strategy"]
    for values in itertools.product(*(axes[key] for key in [*order, "strategy", *others])):
        point = dict(zip([*order, "strategy", *others], values, strict=True))
        point["strategy"], *own = _OWN_SETTING.split(point["strategy"])
        choices = tuple((key, point[key]) for key in GROUPS)
        overrides = (*(f"{key}={point[key]}" for key in others), *_check_own_settings(own))
        config = dataclasses.replace(_configure(choices, overrides), seed=_seed(point["seed"]))
        varied = [key for key in ("representation", "profile", *others) if len(axes[key]) > 1]
        label = "+".join([config.strategy.name, *own, *(f"{key}={point[key]}" for key in varied)]).replace("/", "_")
        folder = settings.results / settings.suite / config.dataset.name / label
        command = [*(f"{key}={value}" for key, value in choices), f"seed={config.seed}", *overrides]
        command += [f"plugins={','.join(settings.plugins)}"] if settings.plugins else []
        jobs.append(PlannedRun(config, folder / f"seed-{config.seed}.jsonl", command))
    if settings.full_supervision:
        jobs += plan_references(axes, settings)
    if repeated := [path for path, n in Counter(job.path for job in jobs).items() if n > 1]:
        raise ConfigError(f"{repeated[0]} would be written by two runs: give each value once")
    return jobs


def plan_references(axes: Mapping[str, Sequence[str]], settings: SweepSettings) -> list[PlannedRun]:
    """Full supervision: one training on the whole labeled pool for each data set, profile and network, first seed.

    They come after the comparisons.
    """
    others = [key for key in axes if key.partition(".")[0] in TRAINING_SETTINGS and key not in AXES]
    jobs = []
    for values in itertools.product(*(axes[key] for key in ("dataset", "profile", *others))):
        point = dict(zip(("dataset", "profile", *others), values, strict=True))
        choices = point | {"representation": axes["representation"][0], "strategy": "random"}
        config = _configure(tuple((key, choices[key]) for key in GROUPS), tuple(f"{k}={point[k]}" for k in others))
        everything = {"restrict": {"kind": "everything"}, "acquire": {"kind": "random"}}
        config = dataclasses.replace(
            config, seed=_seed(axes["seed"][0]), rounds=0, initial_size=None, propagation="none",
            strategy=StrategyConfig(FULL_SUPERVISION, **everything),
        )  # fmt: skip
        varied = [f"{key}={point[key]}" for key in ("profile", *others) if len(axes[key]) > 1]
        label = "+".join([FULL_SUPERVISION, *varied]).replace("/", "_")
        folder = settings.results / settings.suite / config.dataset.name / label
        jobs.append(PlannedRun(config, folder / f"seed-{config.seed}.jsonl"))
    return jobs


def _check_own_settings(own: Sequence[str]) -> Sequence[str]:
    """A strategy's own settings; none may be an axis of the grid."""
    if wrong := [setting for setting in own if setting.partition("=")[0] in AXES]:
        raise ConfigError(f"strategy=...+{wrong[0]}: that is an axis of its own, write {wrong[0]} beside it")
    return own


@cache
def _configure(choices: tuple[tuple[str, str], ...], overrides: tuple[str, ...]) -> RunConfig:
    """The configuration of all seeds, with the defaults of the strategy's parts written out."""
    config = compose(dict(choices), overrides)
    strategy = resolve_parts(config.strategy)
    size = strategy.restrict.get("restricted_size", config.batch_size)
    if size is not None and size < config.batch_size:
        raise ConfigError(
            f"strategy.restrict.restricted_size={size} is below batch_size={config.batch_size}: raise restricted_size"
        )
    return dataclasses.replace(config, strategy=strategy)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"seed={text}: use whole numbers of 0 or more")
    return int(text)


def read_logs(jobs: Sequence[PlannedRun], settings: SweepSettings) -> dict[Path, RunLog | None]:
    """The file of each run, None if it has none; refuses rows of another configuration or algorithm.

    A file of another configuration counts as none if it has no rows: the run starts anew.
    """
    logs = {job.path: read_run(job.path) for job in jobs}
    for job in jobs:
        log = logs[job.path]
        if log is None:
            continue
        # A worker checks what only it knows (data, features, graph, machine) before it adds a row.
        fingerprint = log.header["fingerprint"] | {"config": job.config.hash, "algorithm_version": ALGORITHM_VERSION}
        if log.records:
            check_resumable(log, {"fingerprint": fingerprint, "config": to_dict(job.config)}, settings.resume_anyway)
        elif fingerprint != log.header["fingerprint"]:
            logs[job.path] = None
    return logs


def runs_to_do(
    jobs: Iterable[PlannedRun], logs: Mapping[Path, RunLog | None], settings: SweepSettings
) -> list[PlannedRun]:
    """Runs that are new or partial, and those whose status is in ``settings.retry``."""
    statuses = ((job, None if (log := logs[job.path]) is None else log.status) for job in jobs)
    return [job for job, status in statuses if status in (None, "partial", *settings.retry)]


def evaluations_left(job: PlannedRun, log: RunLog | None) -> int:
    """Number of rows that the run's file lacks."""
    return job.config.rounds + 1 - (len(log.records) if log else 0)
