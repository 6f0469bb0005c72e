"""Set-up, once per data set: features, the graph on the pool's and the test images tied to it, cached.

The seconds of what a query rests on are kept in a ledger; what only the evaluation needs is counted apart from them.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench.config.schema import RepresentationConfig, RunConfig, to_dict, without_paths
from dgal_bench.core import cache
from dgal_bench.core.cache import file_sha256, free_memory
from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.core.seeding import isolated, rng_for, seed_for
from dgal_bench.core.system import on_threads, provenance
from dgal_bench.core.types import Features, Progress
from dgal_bench.data.image_data import ImageData, Subset
from dgal_bench.models.backbones import Backbone, BackboneSpec, load_weights
from dgal_bench.models.vae import encode, posterior_means, train_vae

# Representations by name: what turns the images of a pool into points that a graph can be built on.


Made = tuple[Features, Callable[[], Features | None], dict[str, float]]
"""Features of the pool (N, d), how to make those of the test images (n, d), which is timed apart, and facts.

A maker of None: there is no way to put the test images into this space.
"""

# Floats of a block of images on its way through: 64 MB.
_BLOCK = 16 * 2**20
# Values a point up to which components come from the whole covariance matrix (a second at 1,000 values); above, from
# subspace iteration with so many steps and directions to spare.
_EXACT_WIDTH = 1024
_STEPS, _SPARE = 8, 10
_AT_A_TIME = 128


def _vae(data: ImageData, config: RunConfig, device: torch.device, progress: Progress) -> Made:
    seed = config.representation_seed
    with isolated(seed, "vae"):
        module, facts = train_vae(
            data, config.representation, seed_for(seed, "vae order"), device, progress, config.trainer.devices
        )
    latents, quality = encode(module, data)
    return latents, lambda: posterior_means(module, data.test_images, data.maximum), {**facts, **quality}


def _pixels(data: ImageData, config: RunConfig, device: torch.device, progress: Progress) -> Made:
    return flat_pixels(data.images, data.maximum), lambda: flat_pixels(data.test_images, data.maximum), {}


def _pca(data: ImageData, config: RunConfig, device: torch.device, progress: Progress) -> Made:
    project = principal_components(data.images, config.representation.latent_dim, data.maximum)
    return project(data.images), lambda: project(data.test_images), {}


def _npy(data: ImageData, config: RunConfig, device: torch.device, progress: Progress) -> Made:
    path, test_path = config.representation.path, config.representation.test_path
    assert path is not None
    latents = _embeddings("path", path, data.size, data.subset)

    def make_test() -> Features | None:
        if test_path is None and data.one_source:  # the same file holds them
            return _embeddings("path", path, len(data.test_images), data.test_subset)
        return _embeddings("test_path", test_path, len(data.test_images), data.test_subset) if test_path else None

    return latents, make_test, {}


def _embeddings(key: str, path: str, size: int, kept: Subset | None) -> Features:
    """(size, d) float32 out of a .npy file with a row for each image, or for each of the whole set of a subset.

    Memory-mapped where the file is float32, wanted whole, and larger than half of the free memory.
    """
    try:
        # copy-on-write: torch takes only arrays that could be written to
        found = np.load(Path(path).expanduser(), mmap_mode="c", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"representation.{key}={path} is not there: name a .npy file of shape (N, d)") from error
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"representation.{key}={path} is no .npy file of numbers ({error})") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f":
        what = f"{found.shape} {found.dtype}" if isinstance(found, np.ndarray) else "several arrays"
        raise ConfigError(f"representation.{key}={path} holds {what}, not (N, d) floats")
    if len(found) != size:
        if kept is None or len(found) != kept.of:
            raise ConfigError(
                f"representation.{key}={path} has {len(found):,} rows where the data set has {size:,} images"
                + (f" ({kept.of:,} before they were split or cut)" if kept else "")
                + ": a row for each, in order"
            )
        found = found[kept.positions.numpy()]
    stays = isinstance(found, np.memmap) and found.dtype == np.float32 and found.flags.c_contiguous
    stays = stays and found.nbytes > free_memory() / 2
    features = torch.from_numpy(found if stays else np.array(found, dtype=np.float32))
    if bad := sum(int((~torch.isfinite(block).all(dim=1)).sum()) for block in blocks(features)):
        raise ConfigError(f"representation.{key}={path}: {bad:,} of {size:,} rows hold NaN or infinity")
    return features


def _timm(data: ImageData, config: RunConfig, device: torch.device, progress: Progress) -> Made:
    from timm.data.config import resolve_data_config

    spec = _backbone(data, config.representation)
    with isolated(config.representation_seed, "backbone"):
        backbone = Backbone(spec, load_weights(spec)).eval().to(device)
    about = resolve_data_config(pretrained_cfg=backbone.net.pretrained_cfg)
    mean, deviation = (torch.tensor(about[name]).view(1, 3, 1, 1).to(device) for name in ("mean", "std"))

    @torch.inference_mode()
    def features(images: Tensor) -> Features:
        parts: list[Tensor] = []
        for block in images.split(_AT_A_TIME):
            progress(f"features of {spec.model}", _AT_A_TIME * len(parts), len(images))
            pixels = block.to(device).float() / data.maximum
            parts.append(backbone((pixels - mean) / deviation).float().flatten(1).cpu())
        return torch.cat(parts)

    return features(data.images), lambda: features(data.test_images), {}


def _backbone(data: ImageData, config: RepresentationConfig) -> BackboneSpec:
    assert config.model is not None
    weights = config.pretrained and config.checkpoint_path is None
    return BackboneSpec(config.model, data.image_shape, config.input_size, "auto", weights, config.checkpoint_path)


REPRESENTATIONS: dict[str, Callable[[ImageData, RunConfig, torch.device, Progress], Made]] = {
    "vae": _vae,
    "pixels": _pixels,
    "pca": _pca,
    "npy": _npy,
    "timm": _timm,
}


def content_key(data: ImageData, config: RepresentationConfig) -> dict[str, Any]:
    """Hashes of the files beside the images that a representation is made from."""
    if config.kind == "npy":
        return {name: _sha256(name, path) for name in ("path", "test_path") if (path := getattr(config, name))}
    if config.kind == "timm":
        weights = load_weights(_backbone(data, config))
        return {"weights": weights and weights.sha256}
    return {}


def _sha256(key: str, path: str) -> str:
    try:
        return file_sha256(Path(path).expanduser())
    except OSError as error:
        raise DataError(
            f"representation.{key}={path} cannot be read ({error.strerror}): name a .npy file of shape (N, d)"
        ) from error


def flat_pixels(images: Tensor, maximum: float = 1) -> Features:
    """(n, pixels) float32 in [0, 1]."""
    return images.flatten(1).float() / maximum


def blocks(images: Tensor, row: int | None = None) -> Iterator[Tensor]:
    """Slices of so few images that their floats take little memory, in order; ``row``: floats needed for each."""
    return iter(images.split(max(1, _BLOCK // max(1, row or images[0].numel()))))


def principal_components(images: Tensor, n_components: int, maximum: float = 1) -> Callable[[Tensor], Features]:
    """The projection of images or points (n, d) -> (n, min(n_components, d)), on the pool's leading directions.

    Less the mean, on the covariance's leading eigenvectors; mean and covariance are those of ``images``, whatever is
    projected. Above 1,024 values a point the eigenvectors come from subspace iteration (Halko et al., 2011). No more
    than a block of floats is in memory beside the result.
    """
    mean = _mean(images, maximum)
    find = _eigenvectors if len(mean) <= _EXACT_WIDTH else _leading_subspace
    leading = find(images, mean, n_components, maximum)

    def project(points: Tensor) -> Features:
        return torch.cat(
            [((flat_pixels(block, maximum) - mean).double() @ leading).float() for block in blocks(points)]
        )

    return project


def _mean(images: Tensor, maximum: float) -> Tensor:
    total = sum(flat_pixels(block, maximum).double().sum(0) for block in blocks(images))
    assert isinstance(total, Tensor)
    return (total / len(images)).float()


def _eigenvectors(images: Tensor, mean: Tensor, n_components: int, maximum: float) -> Tensor:
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for block in blocks(images):
        centred = (flat_pixels(block, maximum) - mean).double()
        covariance += centred.T @ centred
    leading: Tensor = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :n_components]
    return leading


def _leading_subspace(images: Tensor, mean: Tensor, n_components: int, maximum: float) -> Tensor:
    """(d, n_components) float64: orthonormal, the leading directions last found in descending order of variance."""
    start = rng_for(0, "components").standard_normal((len(mean), min(n_components + _SPARE, len(mean))))
    basis = torch.linalg.qr(torch.from_numpy(start).float()).Q
    for _ in range(_STEPS):
        basis = torch.linalg.qr(_scatter_times(images, mean, basis, maximum)).Q
    small = basis.T @ _scatter_times(images, mean, basis, maximum)
    order: Tensor = torch.linalg.eigh((small + small.T).double() / 2).eigenvectors.flip(1)
    leading: Tensor = basis.double() @ order
    return leading[:, :n_components]


def _scatter_times(images: Tensor, mean: Tensor, basis: Tensor, maximum: float) -> Tensor:
    """X^T X basis for the centred points X, a block at a time."""
    product = torch.zeros_like(basis)
    for block in blocks(images):
        centred = flat_pixels(block, maximum) - mean
        product += centred.T @ (centred @ basis)
    return product


RECIPE_VERSION = 4
"""Raised with any change of the numbers that set-up makes; tests/test_golden.py fails otherwise."""

# Points whose 20 nearest neighbours are looked up to judge a space, and how many neighbours.
_QUALITY_SAMPLE = 2000
_QUALITY_NEIGHBORS = 20


def label_shares_key(config: RunConfig, data: ImageData, features_sha256: str) -> str:
    """The one thing that labels are looked at for in set-up, and so in the key of no other."""
    labels = hashlib.sha256(data.labels.numpy().tobytes()).hexdigest()
    parts = {"latents": features_sha256, "pixels": data.pool_sha256, "labels": labels, "recipe": RECIPE_VERSION}
    return cache.key_of(parts | {"n_components": config.representation.latent_dim})


def make_label_shares(
    config: RunConfig, data: ImageData, latents: Features, progress: Progress
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    progress("looking at neighbours' labels", 0, 1)
    with on_threads(config.setup_threads):
        return {}, {"label_share": label_shares(data, latents, config.representation.latent_dim)}


def features_key(config: RunConfig, data: ImageData, device: torch.device) -> str:
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


def make_features(
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
