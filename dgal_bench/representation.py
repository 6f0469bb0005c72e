"""Set-up, once per data set: features of the pool and the graph on them, cached, their seconds kept in a ledger."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench import cache
from dgal_bench.arrays import Features, Progress
from dgal_bench.config import GraphConfig, RepresentationConfig, RunConfig, to_dict
from dgal_bench.data.datasets import ImageData
from dgal_bench.errors import ConfigError
from dgal_bench.graph.knn import knn, nearest, pick_backend
from dgal_bench.graph.transition import Graph, diagnostics, transition
from dgal_bench.models.vae import encode, train_vae
from dgal_bench.provenance import provenance
from dgal_bench.seeding import isolated, rng_for, seed_for
from dgal_bench.threads import on_threads

RECIPE_VERSION = 1
"""Raised with any change of the numbers that set-up makes; tests/test_golden.py fails otherwise."""

# Points whose 20 nearest neighbours are looked up to judge a space, and how many neighbours.
_QUALITY_SAMPLE = 2000
_QUALITY_NEIGHBORS = 20

Made = tuple[Features, dict[str, float]]


@dataclass(frozen=True, eq=False)
class Setup:
    """What every cell of a data set shares: the graph, hashes of what it was made from, and the ledger."""

    graph: Graph
    latents_sha256: str
    graph_sha256: str
    ledger: dict[str, Any]


def _vae(data: ImageData, config: RepresentationConfig, seed: int, device: torch.device, progress: Progress) -> Made:
    with isolated(seed, "vae"):
        module, facts = train_vae(data, config, seed_for(seed, "vae order"), device, progress)
    latents, quality = encode(module, data)
    return latents, {**facts, **quality}


def flat_pixels(data: ImageData) -> Features:
    """(N, pixels) float32 in [0, 1]."""
    return data.images.flatten(1).float() / data.maximum


def principal_components(features: Features, n_components: int) -> Features:
    """(N, d) -> (N, min(n_components, d)): centred and projected on the leading eigenvectors of the covariance."""
    centred = (features - features.mean(0)).double()
    vectors: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors
    return (centred @ vectors.flip(1)[:, :n_components]).float()


REPRESENTATIONS: dict[str, Callable[[ImageData, RepresentationConfig, int, torch.device, Progress], Made]] = {
    "vae": _vae,
    "pixels": lambda data, config, seed, device, progress: (flat_pixels(data), {}),
    "pca": lambda data, config, seed, device, progress: (
        principal_components(flat_pixels(data), config.latent_dim),
        {},
    ),
}


def prepare(config: RunConfig, data: ImageData, root: Path, device: torch.device, progress: Progress) -> Setup:
    """The features and the graph of a data set from the cache under ``root``, or made and put there.

    Made on ``representation.threads`` threads, whatever the process uses otherwise: a VAE's bits depend on them.

    Raises:
        UserError: the representation has collapsed, or graph_k does not fit the pool.
    """
    latents = cache.get_or_make(
        root, latents_key(config, data, device), lambda: _make_latents(config, data, device, progress)
    )
    features = torch.from_numpy(latents.arrays["latents"])
    graph_key = cache.key_of(
        {"latents": latents.sha256, "recipe": RECIPE_VERSION, "device": device.type, **_graph_key(config.graph)}
    )
    graph = cache.get_or_make(root, graph_key, lambda: _make_graph(config, features, device, progress))
    arrays = {name: torch.from_numpy(array) for name, array in graph.arrays.items()}
    return Setup(
        Graph(arrays["indptr"], arrays["indices"], arrays["weights"], config.graph.graph_k),
        latents_sha256=latents.sha256,
        graph_sha256=graph.sha256,
        ledger={"representation": latents.facts, "graph": graph.facts},
    )


def _graph_key(config: GraphConfig) -> dict[str, Any]:
    return {**to_dict(config), "backend": pick_backend(config.backend)}


def latents_key(config: RunConfig, data: ImageData, device: torch.device) -> str:
    """The cache key of a representation: whatever its numbers depend on."""
    settings = to_dict(config.representation) | {
        "seed": config.representation_seed,
        "threads": config.setup_threads,
    }
    parts = {"pixels": data.pool_sha256, "maximum": data.maximum, "recipe": RECIPE_VERSION, "device": device.type}
    return cache.key_of(parts | settings)


def _make_latents(
    config: RunConfig, data: ImageData, device: torch.device, progress: Progress
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    if bool((data.images == data.images[0]).all()):
        raise ConfigError(
            f"all {data.size:,} images of the pool of {data.name} are identical: no representation can tell them "
            "apart; look at the data set's files"
        )
    start = perf_counter()
    kind, seed = config.representation.kind, config.representation_seed
    with on_threads(config.setup_threads):
        latents, facts = REPRESENTATIONS[kind](data, config.representation, seed, device, progress)
        seconds = perf_counter() - start
        progress("looking at neighbours' labels", 0, 1)
        shares = label_shares(data, latents, config.representation.latent_dim, config.graph.backend)
    ledger = {
        "kind": kind,
        "seconds": seconds,
        **facts,
        "label_share": shares,
        "threads": config.setup_threads,
        "made_by": provenance(),
    }
    return {"latents": latents.numpy()}, ledger


def _make_graph(
    config: RunConfig, features: Features, device: torch.device, progress: Progress
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    if bool((features == features[0]).all()):
        raise ConfigError(
            f"all {len(features):,} images have the same representation: there is no graph to build on it; "
            "choose another representation="
        )
    progress("graph", 0, 1)
    start = perf_counter()
    spec = config.graph
    with on_threads(config.setup_threads):
        neighbors = knn(features, spec.graph_k, spec.backend, spec.exact_limit, device)
        graph = transition(neighbors, spec.kernel, spec.symmetrize)
    seconds = perf_counter() - start
    arrays = {"indptr": graph.indptr, "indices": graph.indices, "weights": graph.weights}
    facts = {"seconds": seconds, **diagnostics(neighbors, graph), "made_by": provenance()}
    return {name: tensor.numpy() for name, tensor in arrays.items()}, facts


def label_shares(data: ImageData, latents: Features, n_components: int, backend: str) -> dict[str, float]:
    """Share of a point's 20 nearest neighbours with its label, for the latents, PCA and pixels; on a sample.

    For judging a representation only: nothing that a strategy sees depends on it.
    """
    sample = torch.from_numpy(rng_for(0, "label share").permutation(data.size)[:_QUALITY_SAMPLE].astype(np.int64))
    pixels = flat_pixels(data)
    spaces = {"latents": latents, "pca": principal_components(pixels, n_components), "pixels": pixels}
    return {name: label_share(space, data.labels, sample, backend) for name, space in spaces.items()}


def label_share(features: Features, labels: Tensor, sample: Tensor, backend: str = "auto") -> float:
    """Mean over the sample of the share of the 20 nearest other points that have the point's label."""
    k = min(_QUALITY_NEIGHBORS, len(features) - 1)
    centred = features - features.mean(0)
    found = nearest(centred, centred[sample], k + 1, backend)
    # The point itself is among its k + 1 nearest, but for exact duplicates, which then stand in for it.
    own = found == sample[:, None]
    same = (labels[found] == labels[sample, None]) & ~own
    return float((same.sum(1) / (found.shape[1] - own.sum(1))).mean())
