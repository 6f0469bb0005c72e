"""The configuration: a typed schema, composed from ``conf/`` groups and ``key=value`` overrides with OmegaConf.

Light on purpose: importing it imports no torch, since a worker's thread counts must be set before torch is.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from math import isfinite
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dgal_bench.errors import ConfigError, did_you_mean

# The names of the literal registries, known here so that a misspelt kind fails before anything is imported or run;
# a test holds them against the registries.
KINDS = {
    "net.kind": ("cnn",),
    "training.optimizer": ("adam", "sgd"),
    "representation.kind": ("pca", "pixels", "vae"),
    "graph.kernel": ("gaussian_k", "local_scaling", "uniform"),
    "graph.symmetrize": ("max", "mean", "none"),
    "graph.backend": ("auto", "faiss", "torch"),
    "device": ("auto", "cpu", "cuda"),
}
GROUPS = ("dataset", "representation", "profile", "strategy")


def available_cores() -> int:
    """The cores that this process may use, where the system can tell; else all."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@dataclass(frozen=True)
class DatasetConfig:
    name: str
    n_classes: int
    pool_size: int | None
    test_size: int | None


@dataclass(frozen=True)
class NetConfig:
    kind: str
    channels: list[int]
    kernels: list[int]
    pools: list[bool]
    feature_dim: int


@dataclass(frozen=True)
class TrainingConfig:
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    train_batch_size: int
    patience: int
    min_delta: float
    min_epochs: int
    max_epochs: int


@dataclass(frozen=True)
class RepresentationConfig:
    kind: str
    seed: int | str
    latent_dim: int
    recon_weight: float
    lr: float
    train_batch_size: int
    max_epochs: int
    patience: int
    holdout: float
    threads: int | None


@dataclass(frozen=True)
class GraphConfig:
    graph_k: int
    kernel: str
    symmetrize: str
    backend: str
    exact_limit: int


@dataclass(frozen=True)
class StrategyConfig:
    """``restrict`` and ``acquire``: a ``kind`` out of the registries, and that part's own settings."""

    name: str
    restrict: dict[str, Any]
    acquire: dict[str, Any]


@dataclass(frozen=True)
class RunConfig:
    """Everything that a cell's result depends on. Its hash is part of the cell's fingerprint."""

    seed: int
    profile: str
    rounds: int
    batch_size: int
    initial_size: int
    balanced: bool
    restricted_size: int
    predict_batch_size: int
    threads: int
    deterministic: bool
    device: str
    dataset: DatasetConfig
    net: NetConfig
    training: TrainingConfig
    representation: RepresentationConfig
    graph: GraphConfig
    strategy: StrategyConfig

    @property
    def hash(self) -> str:
        """sha256 of the configuration's canonical JSON."""
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()

    @property
    def representation_seed(self) -> int:
        """``representation.seed``, or the cell's own where that says ``cell``."""
        seed = self.representation.seed
        return self.seed if seed == "cell" else int(seed)

    @property
    def setup_threads(self) -> int:
        """``representation.threads``, or all the cores this process may use."""
        threads = self.representation.threads
        return available_cores() if threads is None else threads


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain Python types."""
    return dataclasses.asdict(config)


def conf_dir() -> Path:
    """The folder of the groups: inside the package when installed from a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "conf"


def group_names(group: str) -> list[str]:
    """The choices of a group: the names of its files."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


@cache
def _file(relative: str) -> DictConfig:
    return OmegaConf.load(conf_dir() / relative)  # type: ignore[return-value]


def read_group(group: str, name: str) -> DictConfig:
    """The content of ``conf/<group>/<name>.yaml``; a miss names the nearest."""
    if name not in group_names(group):
        raise ConfigError(f"unknown {group} '{name}'{did_you_mean(name, group_names(group))}")
    return _file(f"{group}/{name}.yaml")


def compose(choices: Mapping[str, str], overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration of one cell.

    Args:
        choices: a name for each of GROUPS.
        overrides: ``a.b=value`` strings, applied last.

    Raises:
        ConfigError: an unknown name, a misspelt key or a value of the wrong type.
    """
    profile = read_group("profile", choices["profile"])
    parts = [
        _file("config.yaml"),
        read_group("dataset", choices["dataset"]),
        read_group("representation", choices["representation"]),
        OmegaConf.create({"profile": choices["profile"]}),
        profile.get("all") or {},
        profile.get(choices["dataset"]) or {},
        read_group("strategy", choices["strategy"]),
    ]
    composed = OmegaConf.merge(*parts)
    for override in overrides:
        check_key(override.partition("=")[0], _plain(composed))
    try:
        composed = OmegaConf.merge(composed, *map(_parsed, overrides))
        typed = OmegaConf.merge(OmegaConf.structured(RunConfig), composed)
        config: RunConfig = OmegaConf.to_object(typed)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    check_values(config)
    return config


def _parsed(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except YAMLError as error:
        raise ConfigError(f"{override}: the value is not valid YAML; is a bracket or quote left open?") from error


def _one_line(error: OmegaConfBaseException) -> str:
    key = error.full_key if isinstance(error.full_key, str) else ""
    message = (error.msg if isinstance(error.msg, str) else str(error)).splitlines()[0]
    return f"{key}: {message}" if key else message


def _plain(config: Any) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


def keys(config: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Every dotted key of a nested mapping, inner nodes included."""
    found: set[str] = set()
    for name, value in config.items():
        found.add(prefix + name)
        if isinstance(value, Mapping):
            found |= keys(value, f"{prefix}{name}.")
    return found


def check_key(key: str, composed: Mapping[str, Any], extra: Iterable[str] = ()) -> None:
    """Refuse a key that the configuration does not have; a part's own settings are checked where it is built.

    ``extra``: names that are known elsewhere, to be suggested too.
    """
    known = keys(composed) | set(extra)
    if key not in known and not key.startswith(("strategy.restrict.", "strategy.acquire.")):
        raise ConfigError(f"unknown key '{key}'{_near_key(key, known)}")


def _near_key(key: str, known: set[str]) -> str:
    """The nearest key, also when only its last word was given (``graph_k`` for ``graph.graph_k``)."""
    last = [name for name in sorted(known) if name.split(".")[-1] == key.split(".")[-1]]
    return f"; did you mean '{last[0]}'?" if last else did_you_mean(key, known)


def check_values(config: RunConfig) -> None:
    """Bounds that need no data: each miss says the value and the knob."""
    _check_kinds(config)
    at_least = {
        "rounds": (config.rounds, 1),
        "batch_size": (config.batch_size, 1),
        "initial_size": (config.initial_size, 1),
        "predict_batch_size": (config.predict_batch_size, 1),
        "threads": (config.threads, 1),
        "training.train_batch_size": (config.training.train_batch_size, 2),
        "training.max_epochs": (config.training.max_epochs, 1),
        "representation.latent_dim": (config.representation.latent_dim, 1),
        "representation.train_batch_size": (config.representation.train_batch_size, 2),
        "representation.max_epochs": (config.representation.max_epochs, 1),
        "representation.patience": (config.representation.patience, 1),
        "representation.threads": (config.setup_threads, 1),
        "graph.graph_k": (config.graph.graph_k, 1),
        "training.patience": (config.training.patience, 1),
        "net.channels": (min(config.net.channels, default=0), 1),
        "net.kernels": (min(config.net.kernels, default=0), 1),
        "net.feature_dim": (config.net.feature_dim, 1),
    }
    for key, (value, least) in at_least.items():
        if value < least:
            raise ConfigError(f"{key}={value} is too small: use {least} or more")
    if config.restricted_size < config.batch_size:
        raise ConfigError(
            f"restricted_size={config.restricted_size} is below batch_size={config.batch_size}: "
            "a batch cannot be picked from fewer candidates; raise restricted_size"
        )
    _check_training(config.training)
    if not 0 < config.representation.holdout <= 0.5:
        raise ConfigError(f"representation.holdout={config.representation.holdout}: use a share above 0 and up to 0.5")
    seed = config.representation.seed
    if isinstance(seed, str) and seed != "cell":
        raise ConfigError(f"representation.seed={seed}: use a number, or 'cell' for one representation per seed")
    lengths = {len(config.net.channels), len(config.net.kernels), len(config.net.pools)}
    if len(lengths) > 1:
        raise ConfigError("net.channels, net.kernels and net.pools must have the same length")


def _check_kinds(config: RunConfig) -> None:
    for key, choices in KINDS.items():
        kind: Any = reduce(getattr, key.split("."), config)
        if kind not in choices:
            raise ConfigError(f"unknown {key} '{kind}'{did_you_mean(str(kind), choices)}")


def _check_training(training: TrainingConfig) -> None:
    for name in ("lr", "momentum", "weight_decay", "min_delta"):
        value = getattr(training, name)
        if not (isfinite(value) and value >= 0):
            raise ConfigError(f"training.{name}={value}: use a number of 0 or more")
    if training.optimizer == "adam" and training.momentum:
        raise ConfigError(f"training.momentum={training.momentum} is sgd's: set training.momentum=0 with adam")


def check_budget(config: RunConfig, n_points: int) -> None:
    """Refuse a cell that asks more of the data than there is."""
    wanted = config.initial_size + config.rounds * config.batch_size
    if wanted > n_points:
        raise ConfigError(
            f"{config.dataset.name}: initial_size={config.initial_size} + rounds={config.rounds} x "
            f"batch_size={config.batch_size} = {wanted} labels, but the pool has {n_points} points: lower one of them"
        )
    if config.graph.graph_k >= n_points:
        raise ConfigError(
            f"graph.graph_k={config.graph.graph_k}, but a point of {n_points} has only {n_points - 1} neighbours: "
            f"use {n_points - 1} or less"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``a.b: old -> new`` for every leaf that differs."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        left, right = old.get(key), new.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return found


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that ``to_dict`` was given, with its types checked again."""
    typed = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(dict(values)))
    return OmegaConf.to_object(typed)  # type: ignore[return-value]
