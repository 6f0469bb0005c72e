"""Lab: what the cells of a data set share. Cell: one (data set, strategy, seed) and all that is derived from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dgal_bench.arrays import Progress
from dgal_bench.cache import key_of
from dgal_bench.checks import check_budget
from dgal_bench.clock import Stopwatch
from dgal_bench.config import RunConfig
from dgal_bench.data.datamodule import PoolDataModule, Standardise
from dgal_bench.data.datasets import load
from dgal_bench.data.images import ImageData, Request
from dgal_bench.data.pool import Pool
from dgal_bench.errors import ConfigError
from dgal_bench.features import content_key
from dgal_bench.graph import backends
from dgal_bench.graph.blocks import Spread, one_by_one
from dgal_bench.graph.transition import Graph
from dgal_bench.identity import outline
from dgal_bench.models.nets import build_net, cost, initial_weights
from dgal_bench.models.predict import Predictor
from dgal_bench.models.task import TaskModule
from dgal_bench.models.weights import Weights
from dgal_bench.provenance import revision
from dgal_bench.representation import Setup, prepare, without_graph
from dgal_bench.seeding import TieBreak, isolated, rng_for, seed_for, torch_rng_for
from dgal_bench.strategies import Query, Resources, Strategy, build


@dataclass(frozen=True, eq=False)
class Lab:
    """What the cells of one data set share: images, transform, graph and ledger, pre-trained weights, the device."""

    data: ImageData
    transform: Standardise
    setup: Setup
    device: torch.device
    weights: Weights | None = None


def own_content(config: RunConfig, data: ImageData, weights: Weights | None) -> dict[str, str | None]:
    """Hashes of what a result rests on and nobody here has made: part of every fingerprint."""
    files = {} if config.full_supervision else content_key(data, config.representation)
    return {
        "data": data.sha256,
        "weights": None if weights is None else weights.sha256,
        "files": key_of(files) if files else None,
    }


def open_lab(
    config: RunConfig, data_root: Path, cache_root: Path, progress: Progress, spread: Spread = one_by_one
) -> Lab:
    """Load the data and prepare (or find) its representation and graph; ``spread``: who else works on a large one.

    Raises:
        UserError: data missing, the configuration does not fit it, or the representation collapsed.
    """
    data = load(Request(config.dataset, data_root, cache_root, progress))
    check_budget(config, data.size)
    device = resolve_device(config.device)
    if config.net.pretrained:
        progress(f"weights of {config.net.kind}", 0, 1)
    weights = initial_weights(data.image_shape, config.net)
    transform = Standardise.of_pool(data, config.net.channels_last)
    with_graph = not config.full_supervision
    setup = prepare(config, data, cache_root, device, progress, spread) if with_graph else without_graph(data.size)
    return Lab(data, transform, setup, device, weights)


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where torch sees it; asking for a missing one is an error, never a silent fallback."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU: use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, eq=False)
class Cell:
    """One (data set, strategy, seed): its configuration and everything derived from it once."""

    config: RunConfig
    lab: Lab
    strategy: Strategy
    graph: Graph

    @classmethod
    def of(cls, config: RunConfig, lab: Lab) -> "Cell":
        graph = lab.setup.graph.to(lab.device)
        spec = config.graph
        new_index = partial(backends.new_index, backend=spec.backend, exact_limit=spec.exact_limit, device=lab.device)
        return cls(config, lab, build(config.strategy, Resources(graph, lab.setup.latents, new_index)), graph)

    def datamodule(self, pool: Pool, round_: int) -> PoolDataModule:
        """The loaders of a round; the order of the labeled points is the same draw for every strategy of the seed."""
        training = self.config.training
        order = torch_rng_for(self.config.seed, "order", round_)
        return PoolDataModule(
            self.lab.data, pool, self.lab.transform, training.train_batch_size, self.config.predict_batch_size, order
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
        seed, data = self.config.seed, self.lab.data
        ties, rng = TieBreak(seed_for(seed, "ties", round_)), rng_for(seed, "query", round_)
        return Query(pool, predict, data.images, rng, ties, clock, data.maximum, self.lab.device, memory, rehearsal)

    def new_module(self, round_: int) -> TaskModule:
        """The network of a round before training: the same weights for every strategy of the seed."""
        with isolated(self.config.seed, "weights", round_):
            net = build_net(self.lab.data.image_shape, self.lab.data.n_classes, self.config.net, self.lab.weights)
        return TaskModule(net, self.lab.data.n_classes, self.config.training, self.config.net.amp)

    def header(self, name: str) -> dict[str, Any]:
        """Line 1 of the results file of the cell ``name``, less the initial set: what ran, from what, on what."""
        config, lab = self.config, self.lab
        known = outline(config, name)
        where = known["provenance"]
        return {
            **known,
            "fingerprint": {
                **known["fingerprint"],
                **own_content(config, lab.data, lab.weights),
                "latents": lab.setup.latents_sha256,
                "graph": lab.setup.graph_sha256,
                "git": revision(where["git"]),
                "torch": where["versions"]["torch"],
                "cpu": where["machine"]["cpu"],
                "vectors": where["machine"]["vectors"],
                "device": where["machine"]["gpu"] if lab.device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
            },
            "data": {
                "pool": lab.data.size,
                "test": len(lab.data.test_images),
                "shape": list(lab.data.image_shape),
                "n_classes": lab.data.n_classes,
                **lab.data.facts,
            },
            "network": cost(self.new_module(0).net, lab.data.image_shape),
            "setup": lab.setup.ledger,
        }
