"""Set-up, once per data set: features, the graph on the pool's and the test images tied to it, cached.

The seconds of what a query rests on are kept in a ledger; what only the evaluation needs is counted apart from them.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench import cache
from dgal_bench.arrays import Features, Progress
from dgal_bench.config import GraphConfig, RunConfig, to_dict, without_paths
from dgal_bench.data.images import ImageData
from dgal_bench.errors import ConfigError
from dgal_bench.features import REPRESENTATIONS, blocks, content_key, flat_pixels, principal_components
from dgal_bench.graph.backends import pick_backend
from dgal_bench.graph.blocks import Spread, neighbors_of, one_by_one
from dgal_bench.graph.transition import GRAPH_ARRAYS, Attachment, Graph, attach, diagnostics, transition
from dgal_bench.provenance import provenance
from dgal_bench.seeding import rng_for
from dgal_bench.threads import on_threads

RECIPE_VERSION = 4
"""Raised with any change of the numbers that set-up makes; tests/test_golden.py fails otherwise."""

# Points whose 20 nearest neighbours are looked up to judge a space, and how many neighbours.
_QUALITY_SAMPLE = 2000
_QUALITY_NEIGHBORS = 20


@dataclass(frozen=True, eq=False)
class Setup:
    """What every cell of a data set shares: features of the pool (N, d), the graph, and the test images tied to it.

    No attachment where nothing is known of the test images in that space. Besides, hashes of what they were made
    from, and the ledger.
    """

    latents: Features
    graph: Graph
    attachment: Attachment | None
    latents_sha256: str
    graph_sha256: str
    ledger: dict[str, Any]


def without_graph(size: int) -> Setup:
    """For full supervision: no features, and a graph of ``size`` points without an edge."""
    empty = torch.zeros(0)
    pointers = torch.zeros(size + 1, dtype=torch.int64)
    graph = Graph(pointers, empty.int(), empty, torch.zeros(size).double(), torch.arange(size), 1, symmetric=True)
    return Setup(torch.zeros(size, 0), graph, None, "none", "none", {})


def prepare(
    config: RunConfig,
    data: ImageData,
    root: Path,
    device: torch.device,
    progress: Progress,
    spread: Spread = one_by_one,
) -> Setup:
    """The features and the graph of a data set from the cache under ``root``, or made and put there.

    Made on ``representation.threads`` threads, whatever the process uses otherwise: a VAE's bits depend on them.
    ``spread`` says who else answers the blocks of a large graph's search.

    Raises:
        UserError: the representation has collapsed, or graph_k does not fit the pool.
    """
    latents = cache.get_or_make(
        root, latents_key(config, data, device), lambda folder: _make_latents(config, data, device, progress)
    )
    features = torch.from_numpy(latents.arrays["latents"])
    test_features = torch.from_numpy(latents.arrays["test_latents"]) if "test_latents" in latents.arrays else None
    shares = cache.get_or_make(
        root, shares_key(config, data, latents.sha256), lambda folder: _make_shares(config, data, features, progress)
    )
    graph_key = cache.key_of(
        {"latents": latents.sha256, "recipe": RECIPE_VERSION, "device": device.type, **_graph_key(config.graph)}
    )
    graph = cache.get_or_make(
        root,
        graph_key,
        lambda folder: _make_graph(config, features, test_features, device, progress, cache.workshop(folder), spread),
    )
    arrays = {name: torch.from_numpy(array) for name, array in graph.arrays.items()}
    parts = {name: arrays[name] for name in GRAPH_ARRAYS}
    return Setup(
        features,
        Graph(**parts, graph_k=config.graph.graph_k, symmetric=graph.facts["symmetric"]),
        Attachment(arrays["attached_ids"], arrays["attached_weights"]) if test_features is not None else None,
        latents_sha256=latents.sha256,
        graph_sha256=graph.sha256,
        ledger={"representation": latents.facts | shares.facts, "graph": graph.facts},
    )


def shares_key(config: RunConfig, data: ImageData, latents_sha256: str) -> str:
    """The one thing that labels are looked at for in set-up, and so in the key of no other."""
    labels = hashlib.sha256(data.labels.numpy().tobytes()).hexdigest()
    parts = {"latents": latents_sha256, "pixels": data.pool_sha256, "labels": labels, "recipe": RECIPE_VERSION}
    return cache.key_of(parts | {"n_components": config.representation.latent_dim})


def _make_shares(
    config: RunConfig, data: ImageData, latents: Features, progress: Progress
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    progress("looking at neighbours' labels", 0, 1)
    with on_threads(config.setup_threads):
        return {}, {"label_share": label_shares(data, latents, config.representation.latent_dim)}


def _graph_key(config: GraphConfig) -> dict[str, Any]:
    return {**to_dict(config), "backend": pick_backend(config.backend)}


def latents_key(config: RunConfig, data: ImageData, device: torch.device) -> str:
    """The cache key of a representation: whatever its numbers depend on."""
    settings = without_paths(to_dict(config.representation)) | {
        "seed": config.representation_seed,
        "threads": config.setup_threads,
        "devices": config.trainer.devices,
        "files": content_key(data, config.representation),
    }
    parts = {
        "pixels": data.pool_sha256,
        "test_pixels": data.test_pixels_sha256,
        "maximum": data.maximum,
        "recipe": RECIPE_VERSION,
        "device": device.type,
    }
    return cache.key_of(parts | settings)


def _make_latents(
    config: RunConfig, data: ImageData, device: torch.device, progress: Progress
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    if all(bool((block == data.images[0]).all()) for block in blocks(data.images)):
        raise ConfigError(
            f"all {data.size:,} images of the pool of {data.name} are identical: no representation can tell them "
            "apart; look at the data set's files"
        )
    start = perf_counter()
    kind = config.representation.kind
    with on_threads(config.setup_threads):
        latents, make_test, facts = REPRESENTATIONS[kind](data, config, device, progress)
        seconds = perf_counter() - start
        test_latents = make_test()
        test_seconds = perf_counter() - start - seconds
    ledger = {
        "kind": kind,
        "seconds": seconds,
        "test_seconds": test_seconds,
        **facts,
        "threads": config.setup_threads,
        "made_by": provenance(),
    }
    arrays = {"latents": latents.numpy()}
    return arrays | ({} if test_latents is None else {"test_latents": test_latents.numpy()}), ledger


def _make_graph(
    config: RunConfig,
    features: Features,
    test_features: Features | None,
    device: torch.device,
    progress: Progress,
    workshop: Path,
    spread: Spread,
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
        neighbors, search_facts = neighbors_of(features, spec, device, workshop, progress, spread)
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
        **search_facts,
        "made_by": provenance(),
    }
    return {name: tensor.numpy() for name, tensor in arrays.items()}, facts


def label_shares(data: ImageData, latents: Features, n_components: int) -> dict[str, float]:
    """Share of a point's 20 nearest neighbours with its label, for the latents, PCA and pixels; on a sample.

    For judging a representation only: nothing that a strategy sees depends on it.
    """
    sample = torch.from_numpy(rng_for(0, "label share").permutation(data.size)[:_QUALITY_SAMPLE].astype(np.int64))
    project = principal_components(data.images, n_components, data.maximum)
    spaces: dict[str, tuple[Tensor, Callable[[Tensor], Features]]] = {
        "latents": (latents, flat_pixels),
        "pca": (data.images, project),
        "pixels": (data.images, partial(flat_pixels, maximum=data.maximum)),
    }
    return {
        name: label_share(points, as_features, data.labels, sample) for name, (points, as_features) in spaces.items()
    }


def label_share(points: Tensor, as_features: Callable[[Tensor], Features], labels: Tensor, sample: Tensor) -> float:
    """Mean over the sample of the share of the 20 nearest other points that have the point's label.

    A block of ``as_features(points)`` (N, d) at a time: neither the floats of a whole pool's pixels nor all distances
    to it are ever in memory.
    """
    k = min(_QUALITY_NEIGHBORS, len(points) - 1)
    queries = as_features(points[sample])
    middle = queries.mean(0)
    queries = queries - middle
    best, ids = torch.full((len(sample), 0), torch.inf), torch.zeros(len(sample), 0, dtype=torch.int64)
    start = 0
    for block in blocks(points, row=max(len(sample), points[0].numel())):
        features = as_features(block) - middle
        # of |q - x|^2 = |q|^2 - 2 q.x + |x|^2 the first term is the same for all of a row
        distances = torch.addmm(features.square().sum(1)[None, :], queries, features.T, alpha=-2)
        here = torch.nonzero((sample >= start) & (sample < start + len(block))).flatten()
        distances[here, sample[here] - start] = torch.inf  # a point is not its own neighbour
        nearest = distances.topk(min(k, len(block)), dim=1, largest=False)
        best, ids = torch.cat([best, nearest.values], dim=1), torch.cat([ids, nearest.indices + start], dim=1)
        smallest = best.topk(min(k, best.shape[1]), dim=1, largest=False)
        best, ids = smallest.values, ids.gather(1, smallest.indices)
        start += len(block)
    return float((labels[ids] == labels[sample, None]).float().mean())
