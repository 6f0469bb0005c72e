"""Values that no type can rule out: each miss says the value and the knob to turn."""

import re
from collections.abc import Sequence
from functools import reduce
from math import inf, isfinite, nan
from typing import Any

from dgal_bench.config import NetConfig, RepresentationConfig, RunConfig, TrainingConfig
from dgal_bench.errors import ConfigError, did_you_mean

# The names of the literal registries, known here so that a misspelt kind fails before anything is imported or run;
# a test holds them against the registries.
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


def above_zero(key: str, text: str, use: str) -> float:
    """The number that a text is, if it is above 0 and finite; ``use``: what a user should write, for the error."""
    try:
        number = float(text)
    except ValueError:
        number = nan
    if not 0 < number < inf:
        raise ConfigError(f"{key}={text}: use {use}")
    return number


OWN_KINDS = ("cnn", "mlp")
"""Networks of ``net.kind`` that are ours; a test holds them against the registry."""

_OF_THE_PAPER = ("resnet18", "resnet50", "vit_small")  # these need no look into timm's list, which takes a second


def check_backbone(key: str, name: str, own: Sequence[str] = ()) -> None:
    """Refuse a name that timm does not have, with the nearest; ``own``: other choices, to be suggested too."""
    if name in (*_OF_THE_PAPER, *own):
        return
    import timm

    architecture, dot, _ = name.partition(".")
    if not timm.is_model(architecture):
        near = did_you_mean(name, {*own, *_OF_THE_PAPER, *timm.list_models()}, n=3)
        raise ConfigError(f"unknown {key} '{name}'{near or ': it is no network of timm'}")
    if dot and name not in (tags := timm.list_pretrained(f"{architecture}.*")):
        raise ConfigError(f"{key}={name}: timm has no such weights of {architecture}{did_you_mean(name, tags)}")


def _check_net(net: NetConfig) -> None:
    check_backbone("net.kind", net.kind, OWN_KINDS)
    lengths = {len(net.channels), len(net.kernels), len(net.pools)}
    if len(lengths) > 1:
        raise ConfigError("net.channels, net.kernels and net.pools must have the same length")


def _or_1(value: int | None) -> int:
    """Of a setting that may be left open: 1 then."""
    return 1 if value is None else value


def check_recall_target(recall_target: float) -> None:
    """Raises ConfigError for what is no share of the true neighbours."""
    if not 0 < recall_target <= 1:
        raise ConfigError(f"graph.recall_target={recall_target:g} is no share: use more than 0 and at most 1")


def check_values(config: RunConfig) -> None:
    """Bounds that need no data: each miss says the value and the knob."""
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
    belong = {"path": "npy", "test_path": "npy", "model": "timm", "checkpoint_path": "timm", "input_size": "timm"}
    for name, kind in belong.items():
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
    """What to warn of where a restriction leaves all of a small pool, which its numbers would not show."""
    size = config.strategy.restrict.get("restricted_size")
    if not isinstance(size, int) or size < n_points - (config.initial_size or 0):
        return None
    return (
        f"{config.dataset.name}: restricted_size={size:,} restricts nothing of a pool of {n_points:,}: lower it, or "
        f"{config.strategy.name} does what its criterion does on the whole pool"
    )


def check_budget(config: RunConfig, n_points: int) -> None:
    """Refuse a cell that asks more of the data than there is."""
    wanted = (config.initial_size or n_points) + config.rounds * config.batch_size
    if wanted > n_points:
        raise ConfigError(
            f"{config.dataset.name}: initial_size={config.initial_size} + rounds={config.rounds} x "
            f"batch_size={config.batch_size} = {wanted} labels, but the pool has {n_points} points: lower them"
        )
    if config.graph.graph_k >= n_points and not config.full_supervision:
        raise ConfigError(
            f"graph.graph_k={config.graph.graph_k}, but a point of {n_points} has only {n_points - 1} neighbours: "
            f"use {n_points - 1} or less"
        )
