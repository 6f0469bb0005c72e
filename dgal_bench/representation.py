"""Set-up, once per data set: features, the graph on the pool's and the test images tied to it, cached.

The seconds of what a query rests on are kept in a ledger; what only the evaluation needs is counted apart from them.
"""

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
from dgal_bench.graph.transition import Attachment, Graph, attach, diagnostics, transition
from dgal_bench.models.vae import encode, posterior_means, train_vae
from dgal_bench.provenance import provenance
from dgal_bench.seeding import isolated, rng_for, seed_for
from dgal_bench.threads import on_threads

RECIPE_VERSION = 2
"""Raised with any change of the numbers that set-up makes; tests/test_golden.py fails otherwise."""

# Points whose 20 nearest neighbours are looked up to judge a space, and how many neighbours.
_QUALITY_SAMPLE = 2000
_QUALITY_NEIGHBORS = 20
_GRAPH_ARRAYS = ("indptr", "indices", "weights", "degrees")

Made = tuple[Features, Callable[[], Features], dict[str, float]]
"""Features of the pool (N, d), how to make those of the test images (n, d), which is timed apart, and facts."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What every cell of a data set shares: features of the pool (N, d), the graph, and the test images tied to it.

    Besides, hashes of what they were made from, and the ledger.
    """

    latents: Features
    graph: Graph
    attachment: Attachment
    latents_sha256: str
    graph_sha256: str
    ledger: dict[str, Any]


def _vae(data: ImageData, config: RepresentationConfig, seed: int, device: torch.device, progress: Progress) -> Made:
    with isolated(seed, "vae"):
        module, facts = train_vae(data, config, seed_for(seed, "vae order"), device, progress)
    latents, quality = encode(module, data)
    return latents, lambda: posterior_means(module, data.test_images, data.maximum), {**facts, **quality}


def _pixels(data: ImageData, config: RepresentationConfig, seed: int, device: torch.device, progress: Progress) -> Made:
    return flat_pixels(data.images, data.maximum), lambda: flat_pixels(data.test_images, data.maximum), {}


def _pca(data: ImageData, config: RepresentationConfig, seed: int, device: torch.device, progress: Progress) -> Made:
    pixels = flat_pixels(data.images, data.maximum)
    project = principal_components(pixels, config.latent_dim)
    return project(pixels), lambda: project(flat_pixels(data.test_images, data.maximum)), {}


def flat_pixels(images: Tensor, maximum: int) -> Features:
    """(n, pixels) float32 in [0, 1]."""
    return images.flatten(1).float() / maximum


def principal_components(features: Features, n_components: int) -> Callable[[Features], Features]:
    """The projection (n, d) -> (n, min(n_components, d)): less the mean, on the covariance's leading eigenvectors.

    Mean and covariance are those of ``features`` (N, d), whatever is projected.
    """
    mean = features.mean(0)
    centred = (features - mean).double()
    leading = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :n_components]
    return lambda points: ((points - mean).double() @ leading).float()


REPRESENTATIONS: dict[str, Callable[[ImageData, RepresentationConfig, int, torch.device, Progress], Made]] = {
    "vae": _vae,
    "pixels": _pixels,
    "pca": _pca,
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
    features, test_features = (torch.from_numpy(latents.arrays[name]) for name in ("latents", "test_latents"))
    graph_key = cache.key_of(
        {"latents": latents.sha256, "recipe": RECIPE_VERSION, "device": device.type, **_graph_key(config.graph)}
    )
    graph = cache.get_or_make(root, graph_key, lambda: _make_graph(config, features, test_features, device, progress))
    arrays = {name: torch.from_numpy(array) for name, array in graph.arrays.items()}
    parts = {name: arrays[name] for name in _GRAPH_ARRAYS}
    return Setup(
        features,
        Graph(**parts, graph_k=config.graph.graph_k, symmetric=graph.facts["symmetric"]),
        Attachment(arrays["attached_ids"], arrays["attached_weights"]),
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
    if bool((data.images == data.images[0]).all()):
        raise ConfigError(
            f"all {data.size:,} images of the pool of {data.name} are identical: no representation can tell them "
            "apart; look at the data set's files"
        )
    start = perf_counter()
    kind, seed = config.representation.kind, config.representation_seed
    with on_threads(config.setup_threads):
        latents, make_test, facts = REPRESENTATIONS[kind](data, config.representation, seed, device, progress)
        seconds = perf_counter() - start
        test_latents = make_test()
        test_seconds = perf_counter() - start - seconds
        progress("looking at neighbours' labels", 0, 1)
        shares = label_shares(data, latents, config.representation.latent_dim, config.graph.backend)
    ledger = {
        "kind": kind,
        "seconds": seconds,
        "test_seconds": test_seconds,
        **facts,
        "label_share": shares,
        "threads": config.setup_threads,
        "made_by": provenance(),
    }
    return {"latents": latents.numpy(), "test_latents": test_latents.numpy()}, ledger


def _make_graph(
    config: RunConfig, features: Features, test_features: Features, device: torch.device, progress: Progress
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
        attachment = attach(neighbors, features, test_features, spec.kernel, spec.backend)
        test_seconds = perf_counter() - start - seconds
    arrays = {name: getattr(graph, name) for name in _GRAPH_ARRAYS}
    arrays |= {"attached_ids": attachment.ids, "attached_weights": attachment.weights}
    facts = {
        "seconds": seconds,
        "test_seconds": test_seconds,
        **diagnostics(neighbors, graph),
        "made_by": provenance(),
    }
    return {name: tensor.numpy() for name, tensor in arrays.items()}, facts


def label_shares(data: ImageData, latents: Features, n_components: int, backend: str) -> dict[str, float]:
    """Share of a point's 20 nearest neighbours with its label, for the latents, PCA and pixels; on a sample.

    For judging a representation only: nothing that a strategy sees depends on it.
    """
    sample = torch.from_numpy(rng_for(0, "label share").permutation(data.size)[:_QUALITY_SAMPLE].astype(np.int64))
    pixels = flat_pixels(data.images, data.maximum)
    spaces = {"latents": latents, "pca": principal_components(pixels, n_components)(pixels), "pixels": pixels}
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
