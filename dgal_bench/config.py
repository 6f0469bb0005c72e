"""The configuration as a typed schema. What changes a result is in here, and in its hash; where to run is not.

Light on purpose: importing it imports no torch, since a worker's thread counts must be set before torch is.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dgal_bench.errors import ResultsError


def available_cores() -> int:
    """The cores that this process may use, where the system can tell; else all."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@dataclass(frozen=True)
class DatasetConfig:
    """``kind`` says how it is read, ``name`` what results are filed under; ``n_classes`` None: as many as there are."""

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
    """``kind``: cnn, mlp, vit_small or any model of timm's; the rest belongs to one or another of them."""

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
    """How many devices train the representation; the networks of the rounds always have one."""

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
    """``restrict`` and ``acquire``: a ``kind`` out of the registries, and that part's own settings."""

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
        """Steps of a round with that many unlabeled points."""
        wanted = self.epochs * math.ceil(n_unlabeled / self.train_batch_size)
        return wanted if self.max_steps is None else min(wanted, self.max_steps)


@dataclass(frozen=True)
class RunConfig:
    """Everything that a cell's result depends on. Its hash is part of the cell's fingerprint.

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
        """sha256 of the canonical JSON, less WHEREABOUTS, whose content is in the fingerprint, and less ALLOWANCES.

        Of full supervision, which asks neither strategy nor graph, TRAINING_SETTINGS alone.
        """
        return hash_of(to_dict(self))

    @property
    def full_supervision(self) -> bool:
        """Whether this is one training on the whole labeled pool, the reference line, and no active learning."""
        return self.initial_size is None

    @property
    def own_files(self) -> list[str]:
        """The paths of a user's own files that a result rests on."""
        sections = (to_dict(getattr(self, name)) for name in SECTIONS)
        return [
            path for section in sections for key, path in section.items() if key in WHEREABOUTS and path is not None
        ]

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


TRAINING_SETTINGS = (
    "seed", "profile", "dataset", "net", "training", "threads", "deterministic", "device", "predict_batch_size",
)  # fmt: skip
"""What a training on a given set of labels depends on."""

WHEREABOUTS = frozenset({"path", "test_path", "checkpoint_path"})
"""Settings that name a user's own files. What those hold is in the fingerprint; where they lie changes no result."""

SECTIONS = ("dataset", "net", "representation")
"""Of the configuration, those that have such settings."""


def without_paths(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of the configuration with WHEREABOUTS reduced to whether they are given at all."""
    return {key: value is not None if key in WHEREABOUTS else value for key, value in section.items()}


ALLOWANCES: Mapping[str, frozenset[str]] = {"diffusion": frozenset({"memory_limit"})}
"""By a part's kind its settings that allow it to be faster, and change no pick."""


def without_allowances(strategy: Mapping[str, Any]) -> dict[str, Any]:
    """A strategy's configuration with its parts less ALLOWANCES."""
    return {role: _less_allowances(part) if isinstance(part, Mapping) else part for role, part in strategy.items()}


def _less_allowances(part: Mapping[str, Any]) -> dict[str, Any]:
    allowances = ALLOWANCES.get(str(part.get("kind")), frozenset())
    return {key: value for key, value in part.items() if key not in allowances}


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration changes a result: less where a user's files lie, and less ALLOWANCES."""
    reduce = dict.fromkeys(SECTIONS, without_paths) | {"strategy": without_allowances}
    return {name: reduce[name](value) if name in reduce else value for name, value in config.items()}


def hash_of(config: Mapping[str, Any]) -> str:
    """``RunConfig.hash``, of a configuration as it stands in a header, be it of an older version."""
    parts = comparable(config)
    if config["initial_size"] is None:
        parts = {name: parts.get(name) for name in TRAINING_SETTINGS}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain Python types."""
    return dataclasses.asdict(config)


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


_PARTS: Mapping[str, Callable[..., Any]] = {
    "dataset": DatasetConfig, "net": NetConfig, "training": TrainingConfig, "representation": RepresentationConfig,
    "trainer": TrainerConfig, "graph": GraphConfig, "strategy": StrategyConfig,
}  # fmt: skip


def restored(values: Mapping[str, Any]) -> RunConfig:
    """The inverse of ``to_dict``, for values that were checked when they were composed: in 0.1 ms, not 14."""
    return RunConfig(**{**values, **{name: part(**values[name]) for name, part in _PARTS.items()}})


def dataset_of(values: Mapping[str, Any]) -> DatasetConfig:
    """The data set of a header's configuration, whose other sections may be of an older version.

    Raises:
        ResultsError: so is this one.
    """
    try:
        return DatasetConfig(**values["dataset"])
    except TypeError:
        raise ResultsError("the data set is configured as by another version of dgal-bench") from None


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(RunConfig)  # type: ignore[no-any-return]


def from_dict(values: Any) -> RunConfig:
    """The configuration of a nested mapping, every key and type checked; raises OmegaConf's errors."""
    checked = OmegaConf.merge(_schema(), values)
    return OmegaConf.to_object(checked)  # type: ignore[return-value]
