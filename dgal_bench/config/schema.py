"""The configuration, typed and checked. What changes a result is here and in its hash; where to run is not.

It must not import torch: a worker's thread counts are set before torch is imported.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from math import inf, isfinite, nan
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from dgal_bench.core.errors import ConfigError, ResultsError, did_you_mean


def available_cores() -> int:
    """The cores that this process may use; all where the system does not tell."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@dataclass(frozen=True)
class DatasetConfig:
    """``kind``: the reader; ``name``: the results' folder; ``n_classes`` None: as many as the data have."""

    name: str
    kind: str
    n_classes: int | None
    path: str | None
    image_size: int | None
    test_share: float
    pool_size: int | None
    test_size: int | None


@dataclass(frozen=True)
class NetConfig:
    """``kind``: cnn, mlp, vit_small or any model of timm; each uses some of the other fields."""

    kind: str
    channels: list[int]
    kernels: list[int]
    pools: list[bool]
    hidden: list[int]
    feature_dim: int
    pretrained: bool
    checkpoint_path: str | None
    input_size: int | None
    stem: str
    channels_last: bool
    amp: bool


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
    encoder: str
    latent_dim: int
    recon_weight: float
    lr: float
    train_batch_size: int
    max_epochs: int
    patience: int
    holdout: float
    threads: int | None
    amp: bool
    path: str | None
    test_path: str | None
    model: str | None
    pretrained: bool
    checkpoint_path: str | None
    input_size: int | None


@dataclass(frozen=True)
class TrainerConfig:
    """How many devices train the representation; the networks of the rounds always use one."""

    devices: int


@dataclass(frozen=True)
class GraphConfig:
    graph_k: int
    kernel: str
    symmetrize: str
    backend: str
    exact_limit: int
    recall_target: float


@dataclass(frozen=True)
class StrategyConfig:
    """``restrict`` and ``acquire``: a ``kind`` from the registries, and that part's own settings."""

    name: str
    restrict: dict[str, Any]
    acquire: dict[str, Any]


@dataclass(frozen=True)
class AdversarySettings:
    """How the adversary is trained in a round.

    ``epochs`` of |U| / train_batch_size steps, but at most ``max_steps``; a step is ``vae_steps`` of the VAE, each on
    a new batch, and one of the discriminator. The paper's App. A can also be read as 1e-4 for both rates.
    """

    latent_dim: int
    recon_weight: float
    encoder: str = "cnn"
    max_steps: int | None = None
    epochs: int = 100
    vae_steps: int = 2
    vae_lr: float = 5e-4
    lr: float = 1e-4
    train_batch_size: int = 128

    def steps(self, n_unlabeled: int) -> int:
        steps = self.epochs * math.ceil(n_unlabeled / self.train_batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's result depends on. Its hash is part of the run's fingerprint.

    ``initial_size`` None: the whole pool, full supervision.
    """

    seed: int
    profile: str
    rounds: int
    batch_size: int
    initial_size: int | None
    balanced: bool
    restricted_size: int
    propagation: str
    predict_batch_size: int
    threads: int
    deterministic: bool
    device: str
    dataset: DatasetConfig
    net: NetConfig
    training: TrainingConfig
    representation: RepresentationConfig
    trainer: TrainerConfig
    graph: GraphConfig
    strategy: StrategyConfig

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON, less PATH_SETTINGS, whose content is in the fingerprint, and RESOURCE_LIMITS.

        Of full supervision, which uses no strategy and no graph, TRAINING_SETTINGS alone.
        """
        return config_hash(to_dict(self))

    @property
    def full_supervision(self) -> bool:
        """Whether this is one training on the whole labeled pool, a reference line without active learning."""
        return self.initial_size is None

    @property
    def own_files(self) -> list[str]:
        """The paths of a user's own files that a result depends on."""
        sections = (to_dict(getattr(self, name)) for name in SECTIONS)
        return [
            path for section in sections for key, path in section.items() if key in PATH_SETTINGS and path is not None
        ]

    @property
    def representation_seed(self) -> int:
        """``representation.seed``, or the run's seed where that is ``cell``."""
        seed = self.representation.seed
        return self.seed if seed == "cell" else int(seed)

    @property
    def setup_threads(self) -> int:
        """``representation.threads``, or all available cores."""
        threads = self.representation.threads
        return available_cores() if threads is None else threads


TRAINING_SETTINGS = (
    "seed", "profile", "dataset", "net", "training", "threads", "deterministic", "device", "predict_batch_size",
)  # fmt: skip
"""What a training on a given set of labels depends on."""

PATH_SETTINGS = frozenset({"path", "test_path", "checkpoint_path"})
"""Settings that name a user's own files. Their content is in the fingerprint; their place changes no result."""

SECTIONS = ("dataset", "net", "representation")
"""Sections of the configuration with PATH_SETTINGS."""


def without_paths(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of the configuration with PATH_SETTINGS reduced to whether they are set."""
    return {key: value is not None if key in PATH_SETTINGS else value for key, value in section.items()}


RESOURCE_LIMITS: Mapping[str, frozenset[str]] = {"diffusion": frozenset({"memory_limit"})}
"""By a part's kind: settings that make it faster and change no pick."""


def without_limits(strategy: Mapping[str, Any]) -> dict[str, Any]:
    """A strategy's configuration with its parts less RESOURCE_LIMITS."""
    return {role: _without_limits(part) if isinstance(part, Mapping) else part for role, part in strategy.items()}


def _without_limits(part: Mapping[str, Any]) -> dict[str, Any]:
    limits = RESOURCE_LIMITS.get(str(part.get("kind")), frozenset())
    return {key: value for key, value in part.items() if key not in limits}


def comparable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that changes a result: less PATH_SETTINGS and RESOURCE_LIMITS."""
    reducers = dict.fromkeys(SECTIONS, without_paths) | {"strategy": without_limits}
    return {name: reducers[name](value) if name in reducers else value for name, value in config.items()}


def config_hash(config: Mapping[str, Any]) -> str:
    """``RunConfig.hash`` of a header's configuration, also of an older version."""
    parts = comparable_config(config)
    if config["initial_size"] is None:
        parts = {name: parts.get(name) for name in TRAINING_SETTINGS}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain Python types."""
    return dataclasses.asdict(config)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"graph": {"graph_k": 10}}`` as ``{"graph.graph_k": 10}``; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``a.b: old -> new`` for every value that differs; one that is missing counts as None."""
    left, right = flatten(old), flatten(new)
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


_PARTS: Mapping[str, Callable[..., Any]] = {
    "dataset": DatasetConfig, "net": NetConfig, "training": TrainingConfig, "representation": RepresentationConfig,
    "trainer": TrainerConfig, "graph": GraphConfig, "strategy": StrategyConfig,
}  # fmt: skip


def from_trusted_dict(values: Mapping[str, Any]) -> RunConfig:
    """The inverse of ``to_dict`` for values that ``compose`` checked: 0.1 ms, where OmegaConf takes 14."""
    return RunConfig(**{**values, **{name: part(**values[name]) for name, part in _PARTS.items()}})


def dataset_config(values: Mapping[str, Any]) -> DatasetConfig:
    """The data set of a header's configuration, whose other sections may be of another version.

    Raises:
        ResultsError: this section is of another version, too.
    """
    try:
        return DatasetConfig(**values["dataset"])
    except TypeError:
        raise ResultsError("the data set is configured as by another version of dgal-bench") from None


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(RunConfig)  # type: ignore[no-any-return]


@cache
def _field_types(part: type) -> Mapping[str, Any]:
    return get_type_hints(part)


def needs_no_conversion(value: Any, kind: Any) -> bool:
    """Whether a value is of a type of the schema as it stands, with every key of a dataclass and no other."""
    if kind is Any:
        containers: Mapping[Any, Any] = {list: list[Any], dict: dict[str, Any]}
        kind = containers.get(type(value), str | int | float | bool | None)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        kinds = _field_types(kind)
        return (
            isinstance(value, Mapping)
            and value.keys() == kinds.keys()
            and all(needs_no_conversion(value[name], kinds[name]) for name in kinds)
        )
    if get_origin(kind) is list:
        return type(value) is list and all(needs_no_conversion(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        key_kind, value_kind = get_args(kind)
        return type(value) is dict and all(
            needs_no_conversion(key, key_kind) and needs_no_conversion(item, value_kind) for key, item in value.items()
        )
    if isinstance(value, str) and ("$" in value or value == "???"):  # what OmegaConf resolves, and its missing value
        return False
    return type(value) in (get_args(kind) or (kind,))


def from_dict(values: Any) -> RunConfig:
    """The configuration of a nested mapping, every key and type checked; raises OmegaConf's errors.

    OmegaConf takes 14 ms: it is asked only where a value is to be converted or refused.
    """
    if needs_no_conversion(values, RunConfig):
        return from_trusted_dict(values)
    checked = OmegaConf.merge(_schema(), values)
    return OmegaConf.to_object(checked)  # type: ignore[return-value]


# The names of the literal registries, repeated here so that a misspelt kind fails before any import; a test compares.
KINDS = {
    "net.stem": ("auto", "small", "standard"),
    "training.optimizer": ("adam", "sgd"),
    "representation.kind": ("npy", "pca", "pixels", "timm", "vae"),
    "representation.encoder": ("cnn", "resnet18"),
    "graph.kernel": ("gaussian_k", "local_scaling", "uniform"),
    "graph.symmetrize": ("max", "mean", "none"),
    "graph.backend": ("auto", "faiss", "torch"),
    "propagation": ("all", "few", "none"),
    "device": ("auto", "cpu", "cuda"),
}


def parse_positive(key: str, text: str, use: str) -> float:
    """A number above 0 and finite; ``use``: what a user should write, for the error."""
    try:
        number = float(text)
    except ValueError:
        number = nan
    if not 0 < number < inf:
        raise ConfigError(f"{key}={text}: use {use}")
    return number


OWN_KINDS = ("cnn", "mlp")
"""Networks of ``net.kind`` that are ours; a test compares them with the registry."""

_COMMON = ("resnet18", "resnet50", "vit_small")  # the paper's, known without timm's list, which takes a second


def check_backbone(key: str, name: str, own: Sequence[str] = ()) -> None:
    """Refuse a name that timm does not have; ``own``: further choices."""
    if name in (*_COMMON, *own):
        return
    import timm

    architecture, dot, _ = name.partition(".")
    if not timm.is_model(architecture):
        near = did_you_mean(name, {*own, *_COMMON, *timm.list_models()}, n=3)
        raise ConfigError(f"unknown {key} '{name}'{near or ': it is no network of timm'}")
    if dot and name not in (tags := timm.list_pretrained(f"{architecture}.*")):
        raise ConfigError(f"{key}={name}: timm has no such weights of {architecture}{did_you_mean(name, tags)}")


def _check_net(net: NetConfig) -> None:
    check_backbone("net.kind", net.kind, OWN_KINDS)
    lengths = {len(net.channels), len(net.kernels), len(net.pools)}
    if len(lengths) > 1:
        raise ConfigError("net.channels, net.kernels and net.pools must have the same length")


def _or_1(value: int | None) -> int:
    """For a setting that may be None, which is in bounds."""
    return 1 if value is None else value


def check_recall_target(recall_target: float) -> None:
    """Refuse what is no share of the true neighbours."""
    if not 0 < recall_target <= 1:
        raise ConfigError(f"graph.recall_target={recall_target:g} is no share: use more than 0 and at most 1")


def check_values(config: RunConfig) -> None:
    """Refuse values out of the bounds that need no data."""
    _check_kinds(config)
    _check_net(config.net)
    at_least = {
        "rounds": (config.rounds, 0 if config.full_supervision else 1),
        "batch_size": (config.batch_size, 1),
        "initial_size": (_or_1(config.initial_size), 1),
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
        "dataset.image_size": (_or_1(config.dataset.image_size), 1),
        "trainer.devices": (config.trainer.devices, 1),
        "net.input_size": (_or_1(config.net.input_size), 1),
        "representation.input_size": (_or_1(config.representation.input_size), 1),
        "net.hidden": (min(config.net.hidden, default=1), 1),
        "net.channels": (min(config.net.channels, default=0), 1),
        "net.kernels": (min(config.net.kernels, default=0), 1),
        "net.feature_dim": (config.net.feature_dim, 1),
    }
    for key, (value, least) in at_least.items():
        if value < least:
            raise ConfigError(f"{key}={value} is too small: use {least} or more")
    if config.full_supervision and config.rounds > 0:
        raise ConfigError(
            "initial_size=null labels the whole pool, and nothing is left to query: give a number, and "
            "full_supervision=true for a training on all labels"
        )
    check_recall_target(config.graph.recall_target)
    if config.restricted_size < config.batch_size:
        raise ConfigError(
            f"restricted_size={config.restricted_size} is below batch_size={config.batch_size}: "
            "a batch cannot be picked from fewer candidates; raise restricted_size"
        )
    _check_training(config.training)
    _check_representation(config.representation)


def _check_kinds(config: RunConfig) -> None:
    if not re.fullmatch(r"[\w.-]+", config.dataset.name) or set(config.dataset.name) == {"."}:
        raise ConfigError(
            f"dataset.name={config.dataset.name}: letters, digits, '_', '-' and '.' name a folder of results"
        )
    for key, choices in KINDS.items():
        kind: Any = reduce(getattr, key.split("."), config)
        if kind not in choices:
            raise ConfigError(f"unknown {key} '{kind}'{did_you_mean(str(kind), choices)}")


def _check_representation(representation: RepresentationConfig) -> None:
    for name in ("lr", "recon_weight"):
        value = getattr(representation, name)
        if not (isfinite(value) and value > 0):
            raise ConfigError(f"representation.{name}={value}: use a number above 0")
    if not 0 < representation.holdout <= 0.5:
        raise ConfigError(f"representation.holdout={representation.holdout}: use a share above 0 and up to 0.5")
    kinds = {"path": "npy", "test_path": "npy", "model": "timm", "checkpoint_path": "timm", "input_size": "timm"}
    for name, kind in kinds.items():
        if getattr(representation, name) is not None and representation.kind != kind:
            raise ConfigError(f"representation.{name} is for representation={kind}, this one is {representation.kind}")
    if representation.kind == "npy" and representation.path is None:
        raise ConfigError("representation=npy needs your embeddings: representation.path=FILE.npy, of shape (N, d)")
    if representation.kind == "timm":
        if representation.model is None:
            raise ConfigError("representation=timm needs the name of a network: representation.model=resnet18")
        check_backbone("representation.model", representation.model)
    seed = representation.seed
    if isinstance(seed, str) and seed != "cell":
        raise ConfigError(f"representation.seed={seed}: use a number, or 'cell' for one representation per seed")


def _check_training(training: TrainingConfig) -> None:
    for name in ("lr", "momentum", "weight_decay", "min_delta"):
        value = getattr(training, name)
        if not (isfinite(value) and value >= 0):
            raise ConfigError(f"training.{name}={value}: use a number of 0 or more")
    if training.optimizer == "adam" and training.momentum:
        raise ConfigError(f"training.momentum={training.momentum} is sgd's: set training.momentum=0 with adam")


def idle_restriction(config: RunConfig, n_points: int) -> str | None:
    """A warning where a restriction keeps all of a small pool, which its numbers would not show."""
    size = config.strategy.restrict.get("restricted_size")
    if not isinstance(size, int) or size < n_points - (config.initial_size or 0):
        return None
    return (
        f"{config.dataset.name}: restricted_size={size:,} restricts nothing of a pool of {n_points:,}: lower it, or "
        f"{config.strategy.name} does what its criterion does on the whole pool"
    )


def check_budget(config: RunConfig, n_points: int) -> None:
    """Refuse a run that needs more labels or neighbours than the data have."""
    n_labels = (config.initial_size or n_points) + config.rounds * config.batch_size
    if n_labels > n_points:
        raise ConfigError(
            f"{config.dataset.name}: initial_size={config.initial_size} + rounds={config.rounds} x "
            f"batch_size={config.batch_size} = {n_labels} labels, but the pool has {n_points} points: lower them"
        )
    if config.graph.graph_k >= n_points and not config.full_supervision:
        raise ConfigError(
            f"graph.graph_k={config.graph.graph_k}, but a point of {n_points} has only {n_points - 1} neighbours: "
            f"use {n_points - 1} or less"
        )
