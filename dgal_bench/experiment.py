"""What the runs of a data set share (``Experiment``), and one (data set, strategy, seed) with its parts (``Run``).

The ledger holds the seconds of what a query rests on, and apart from them the seconds that only the evaluation needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from dgal_bench.config.schema import GraphConfig, RunConfig, check_budget, to_dict
from dgal_bench.core import cache
from dgal_bench.core.cache import key_of
from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.errors import ConfigError
from dgal_bench.core.seeding import TieBreak, isolated, rng_for, seed_for, torch_rng_for
from dgal_bench.core.system import on_threads, provenance, revision
from dgal_bench.core.types import Features, Progress
from dgal_bench.data.datamodule import PoolDataModule, Standardise
from dgal_bench.data.datasets import load
from dgal_bench.data.image_data import DatasetRequest, ImageData
from dgal_bench.data.pool import Pool
from dgal_bench.graph.graph import GRAPH_ARRAYS, Attachment, Graph
from dgal_bench.graph.knn import build_index, knn, pick_backend
from dgal_bench.graph.transition import attach, diagnostics, transition
from dgal_bench.models.backbones import Weights
from dgal_bench.models.nets import build_net, cost, initial_weights
from dgal_bench.models.predict import Predictor
from dgal_bench.models.task import TaskModule
from dgal_bench.representation import (
    RECIPE_VERSION,
    blocks,
    content_key,
    features_key,
    label_shares_key,
    make_features,
    make_label_shares,
)
from dgal_bench.results.resume import header_outline
from dgal_bench.strategies import Resources, build
from dgal_bench.strategies.base import Query, Strategy


@dataclass(frozen=True, eq=False)
class Prepared:
    """Set-up, shared by all runs of a data set: features of the pool (N, d), the graph, the test images attached to it.

    ``attachment`` is None where the test images have no features in that space. The hashes are those of the arrays.
    """

    features: Features
    graph: Graph
    attachment: Attachment | None
    features_sha256: str
    graph_sha256: str
    ledger: dict[str, Any]


def without_graph(size: int) -> Prepared:
    """For full supervision: no features, and a graph of ``size`` points without an edge."""
    empty = torch.zeros(0)
    pointers = torch.zeros(size + 1, dtype=torch.int64)
    graph = Graph(pointers, empty.int(), empty, torch.zeros(size).double(), torch.arange(size), 1, symmetric=True)
    return Prepared(torch.zeros(size, 0), graph, None, "none", "none", {})


def prepare_features_and_graph(
    config: RunConfig, data: ImageData, root: Path, device: torch.device, progress: Progress
) -> Prepared:
    """The features and the graph of a data set from the cache under ``root``, or made and put there.

    Made on ``representation.threads`` threads, whatever the process uses otherwise: a VAE's bits depend on them.

    Raises:
        UserError: the representation has collapsed, or graph_k does not fit the pool.
    """
    entry = cache.get_or_make(
        root, features_key(config, data, device), lambda folder: make_features(config, data, device, progress)
    )
    features = torch.from_numpy(entry.arrays["latents"])
    test_features = torch.from_numpy(entry.arrays["test_latents"]) if "test_latents" in entry.arrays else None
    shares = cache.get_or_make(
        root,
        label_shares_key(config, data, entry.sha256),
        lambda folder: make_label_shares(config, data, features, progress),
    )
    graph = cache.get_or_make(
        root,
        _graph_key(config.graph, entry.sha256, len(features), device),
        lambda folder: _make_graph(config, features, test_features, device, progress),
    )
    arrays = {name: torch.from_numpy(array) for name, array in graph.arrays.items()}
    parts = {name: arrays[name] for name in GRAPH_ARRAYS}
    return Prepared(
        features,
        Graph(**parts, graph_k=config.graph.graph_k, symmetric=graph.facts["symmetric"]),
        Attachment(arrays["attached_ids"], arrays["attached_weights"]) if test_features is not None else None,
        features_sha256=entry.sha256,
        graph_sha256=graph.sha256,
        ledger={"representation": entry.facts | shares.facts, "graph": graph.facts},
    )


def _graph_key(config: GraphConfig, features_sha256: str, size: int, device: torch.device) -> str:
    parts: dict[str, Any] = {"latents": features_sha256, "recipe": RECIPE_VERSION, "device": device.type}
    if size > config.exact_limit:  # entries of an earlier approximate search are not read; exact ones stay valid
        parts["search"] = "faiss ivf"
    return cache.key_of({**parts, **to_dict(config), "backend": pick_backend(config.backend)})


def _make_graph(
    config: RunConfig,
    features: Features,
    test_features: Features | None,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    if all(bool((block == features[0]).all()) for block in blocks(features)):
        raise ConfigError(
            f"all {len(features):,} images have the same representation: there is no graph to build on it; "
            "choose another representation="
        )
    progress("graph", 0, 1)
    start = perf_counter()
    spec = config.graph
    with on_threads(config.setup_threads):
        neighbors = knn(features, spec.graph_k, spec.backend, spec.exact_limit, device, spec.recall_target, progress)
        graph = transition(neighbors, spec.kernel, spec.symmetrize)
        seconds = perf_counter() - start
        arrays = {name: getattr(graph, name) for name in GRAPH_ARRAYS}
        if test_features is not None:
            attachment = attach(neighbors, features, test_features, spec.kernel, spec.backend)
            arrays |= {"attached_ids": attachment.ids, "attached_weights": attachment.weights}
        test_seconds = perf_counter() - start - seconds
    facts = {
        "seconds": seconds,
        "test_seconds": test_seconds,
        **diagnostics(neighbors, graph),
        "made_by": provenance(),
    }
    return {name: tensor.numpy() for name, tensor in arrays.items()}, facts


@dataclass(frozen=True, eq=False)
class Experiment:
    """What the runs of one data set share: images, transform, graph and ledger, pre-trained weights, the device."""

    data: ImageData
    transform: Standardise
    prepared: Prepared
    device: torch.device
    weights: Weights | None = None


def content_hashes(config: RunConfig, data: ImageData, weights: Weights | None) -> dict[str, str | None]:
    """Hashes of the inputs from outside that a result rests on: part of every fingerprint."""
    files = {} if config.full_supervision else content_key(data, config.representation)
    return {
        "data": data.sha256,
        "weights": None if weights is None else weights.sha256,
        "files": key_of(files) if files else None,
    }


def open_experiment(config: RunConfig, data_root: Path, cache_root: Path, progress: Progress) -> Experiment:
    """Load the data; make its features and graph or read them from the cache.

    Raises:
        UserError: data missing, the configuration does not fit it, or the representation collapsed.
    """
    data = load(DatasetRequest(config.dataset, data_root, cache_root, progress))
    check_budget(config, data.size)
    device = resolve_device(config.device)
    if config.net.pretrained:
        progress(f"weights of {config.net.kind}", 0, 1)
    weights = initial_weights(data.image_shape, config.net)
    transform = Standardise.of_pool(data, config.net.channels_last)
    if config.full_supervision:
        prepared = without_graph(data.size)
    else:
        prepared = prepare_features_and_graph(config, data, cache_root, device, progress)
    return Experiment(data, transform, prepared, device, weights)


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where torch sees it; ``cuda`` without a GPU is an error, never a silent fallback."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU: use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, eq=False)
class Run:
    """One (data set, strategy, seed): its configuration and what is derived from that once."""

    config: RunConfig
    experiment: Experiment
    strategy: Strategy
    graph: Graph

    @classmethod
    def of(cls, config: RunConfig, experiment: Experiment) -> "Run":
        graph = experiment.prepared.graph.to(experiment.device)
        spec = config.graph
        new_index = partial(build_index, backend=spec.backend, exact_limit=spec.exact_limit, device=experiment.device)
        return cls(
            config, experiment, build(config.strategy, Resources(graph, experiment.prepared.features, new_index)), graph
        )

    def datamodule(self, pool: Pool, round_: int) -> PoolDataModule:
        """The loaders of a round; the order of the labeled points is the same draw for every strategy of the seed."""
        training = self.config.training
        order = torch_rng_for(self.config.seed, "order", round_)
        return PoolDataModule(
            self.experiment.data,
            pool,
            self.experiment.transform,
            training.train_batch_size,
            self.config.predict_batch_size,
            order,
        )

    def query(
        self,
        pool: Pool,
        predict: Predictor,
        clock: Stopwatch,
        round_: int,
        memory: Mapping[str, Any] = MappingProxyType({}),
        rehearsal: bool = False,
    ) -> Query:
        seed, data = self.config.seed, self.experiment.data
        ties, rng = TieBreak(seed_for(seed, "ties", round_), pool.size), rng_for(seed, "query", round_)
        return Query(
            pool, predict, data.images, rng, ties, clock, data.maximum, self.experiment.device, memory, rehearsal
        )

    def new_module(self, round_: int) -> TaskModule:
        """The network of a round before training: the same weights for every strategy of the seed."""
        with isolated(self.config.seed, "weights", round_):
            net = build_net(
                self.experiment.data.image_shape,
                self.experiment.data.n_classes,
                self.config.net,
                self.experiment.weights,
            )
        return TaskModule(net, self.experiment.data.n_classes, self.config.training, self.config.net.amp)

    def header(self, name: str) -> dict[str, Any]:
        """Line 1 of the results file of the run ``name``, less the initial set: settings, inputs, machine."""
        config, experiment = self.config, self.experiment
        outline = header_outline(config, name)
        where = outline["provenance"]
        return {
            **outline,
            "fingerprint": {
                **outline["fingerprint"],
                **content_hashes(config, experiment.data, experiment.weights),
                "latents": experiment.prepared.features_sha256,
                "graph": experiment.prepared.graph_sha256,
                "git": revision(where["git"]),
                "torch": where["versions"]["torch"],
                "cpu": where["machine"]["cpu"],
                "vectors": where["machine"]["vectors"],
                "device": where["machine"]["gpu"] if experiment.device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
            },
            "data": {
                "pool": experiment.data.size,
                "test": len(experiment.data.test_images),
                "shape": list(experiment.data.image_shape),
                "n_classes": experiment.data.n_classes,
                **experiment.data.facts,
            },
            "network": cost(self.new_module(0).net, experiment.data.image_shape),
            "setup": experiment.prepared.ledger,
        }
