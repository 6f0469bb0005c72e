"""Representations by name: they turn the images of a pool into features (N, d), on which the graph is built.

Once per data set, with the cache key of the result and its ledger; and, to judge a representation, the share of nearest
neighbours with the same label.
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

RECIPE_VERSION = 4
"""Raised with any change of the numbers that set-up makes; tests/test_golden.py fails otherwise."""

RepresentationOutput = tuple[Features, Callable[[], Features | None], dict[str, float]]
"""Features of the pool (N, d), a function that makes those of the test images (n, d), timed separately, and facts.

The function returns None where the test images cannot be put into this space.
"""


def features_key(config: RunConfig, data: ImageData, device: torch.device) -> str:
    """The cache key of a representation: everything that its numbers depend on."""
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


def content_key(data: ImageData, config: RepresentationConfig) -> dict[str, Any]:
    """Hashes of the files, other than the images, that a representation is made from."""
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
        features, make_test, facts = REPRESENTATIONS[kind](data, config, device, progress)
        seconds = perf_counter() - start
        test_features = make_test()
        test_seconds = perf_counter() - start - seconds
    ledger = {
        "kind": kind,
        "seconds": seconds,
        "test_seconds": test_seconds,
        **facts,
        "threads": config.setup_threads,
        "made_by": provenance(),
    }
    arrays = {"latents": features.numpy()}
    return arrays | ({} if test_features is None else {"test_latents": test_features.numpy()}), ledger


def _vae(data: ImageData, config: RunConfig, device: torch.device, progress: Progress) -> RepresentationOutput:
    seed = config.representation_seed
    with isolated(seed, "vae"):
        module, facts = train_vae(
            data, config.representation, seed_for(seed, "vae order"), device, progress, config.trainer.devices
        )
    latents, quality = encode(module, data)
    return latents, lambda: posterior_means(module, data.test_images, data.maximum), {**facts, **quality}


def _pixels(data: ImageData, config: RunConfig, device: torch.device, progress: Progress) -> RepresentationOutput:
    return flat_pixels(data.images, data.maximum), lambda: flat_pixels(data.test_images, data.maximum), {}


def _pca(data: ImageData, config: RunConfig, device: torch.device, progress: Progress) -> RepresentationOutput:
    project = principal_components(data.images, config.representation.latent_dim, data.maximum)
    return project(data.images), lambda: project(data.test_images), {}


def _npy(data: ImageData, config: RunConfig, device: torch.device, progress: Progress) -> RepresentationOutput:
    path, test_path = config.representation.path, config.representation.test_path
    assert path is not None
    features = _embeddings("path", path, data.size, data.subset)

    def make_test() -> Features | None:
        if test_path is None and data.one_source:  # the same file holds them
            return _embeddings("path", path, len(data.test_images), data.test_subset)
        return _embeddings("test_path", test_path, len(data.test_images), data.test_subset) if test_path else None

    return features, make_test, {}


def _embeddings(key: str, path: str, size: int, subset: Subset | None) -> Features:
    """(size, d) float32 from a .npy file with a row for each image, or for each image of the set that was cut.

    Memory-mapped where the file is float32, needed whole, and larger than half of the free memory.
    """
    try:
        # copy-on-write: torch accepts writable arrays only
        array = np.load(Path(path).expanduser(), mmap_mode="c", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"representation.{key}={path} is not there: name a .npy file of shape (N, d)") from error
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"representation.{key}={path} is no .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        content = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else "several arrays"
        raise ConfigError(f"representation.{key}={path} holds {content}, not (N, d) floats")
    if len(array) != size:
        if subset is None or len(array) != subset.of:
            raise ConfigError(
                f"representation.{key}={path} has {len(array):,} rows where the data set has {size:,} images"
                + (f" ({subset.of:,} before they were split or cut)" if subset else "")
                + ": a row for each, in order"
            )
        array = array[subset.positions.numpy()]
    mapped = isinstance(array, np.memmap) and array.dtype == np.float32 and array.flags.c_contiguous
    mapped = mapped and array.nbytes > free_memory() / 2
    features = torch.from_numpy(array if mapped else np.array(array, dtype=np.float32))
    if bad := sum(int((~torch.isfinite(block).all(dim=1)).sum()) for block in blocks(features)):
        raise ConfigError(f"representation.{key}={path}: {bad:,} of {size:,} rows hold NaN or infinity")
    return features


# Images that pass through the backbone at a time.
_BATCH = 128


def _timm(data: ImageData, config: RunConfig, device: torch.device, progress: Progress) -> RepresentationOutput:
    from timm.data.config import resolve_data_config

    spec = _backbone(data, config.representation)
    with isolated(config.representation_seed, "backbone"):
        backbone = Backbone(spec, load_weights(spec)).eval().to(device)
    settings = resolve_data_config(pretrained_cfg=backbone.net.pretrained_cfg)
    mean, deviation = (torch.tensor(settings[name]).view(1, 3, 1, 1).to(device) for name in ("mean", "std"))

    @torch.inference_mode()
    def features(images: Tensor) -> Features:
        parts: list[Tensor] = []
        for block in images.split(_BATCH):
            progress(f"features of {spec.model}", _BATCH * len(parts), len(images))
            pixels = block.to(device).float() / data.maximum
            parts.append(backbone((pixels - mean) / deviation).float().flatten(1).cpu())
        return torch.cat(parts)

    return features(data.images), lambda: features(data.test_images), {}


def _backbone(data: ImageData, config: RepresentationConfig) -> BackboneSpec:
    assert config.model is not None
    weights = config.pretrained and config.checkpoint_path is None
    return BackboneSpec(config.model, data.image_shape, config.input_size, "auto", weights, config.checkpoint_path)


REPRESENTATIONS: dict[str, Callable[[ImageData, RunConfig, torch.device, Progress], RepresentationOutput]] = {
    "vae": _vae,
    "pixels": _pixels,
    "pca": _pca,
    "npy": _npy,
    "timm": _timm,
}


# Floats of a block of images in memory: 64 MB.
BLOCK = 16 * 2**20
# Up to this many values per point, components come from the whole covariance matrix (a second at 1,000 values); above,
# from subspace iteration with this many steps and spare directions.
_EXACT_WIDTH = 1024
_STEPS, SPARE = 8, 10


def flat_pixels(images: Tensor, maximum: float = 1) -> Features:
    """(n, pixels) float32 in [0, 1]."""
    return images.flatten(1).float() / maximum


def blocks(images: Tensor, row: int | None = None) -> Iterator[Tensor]:
    """Slices of ``images`` in order, so small that their floats take 64 MB; ``row``: floats needed for each image."""
    return iter(images.split(max(1, BLOCK // max(1, row or images[0].numel()))))


def principal_components(images: Tensor, n_components: int, maximum: float = 1) -> Callable[[Tensor], Features]:
    """The projection of images or points (n, d) -> (n, min(n_components, d)), on the pool's leading directions.

    Centred, on the covariance's leading eigenvectors; mean and covariance are always those of ``images``. Above 1,024
    values a point the eigenvectors come from subspace iteration (Halko et al., 2011). Beside the result only a block of
    floats is in memory.
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
    """(d, n_components) float64, orthonormal: the leading directions in descending order of variance."""
    start = rng_for(0, "components").standard_normal((len(mean), min(n_components + SPARE, len(mean))))
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


# Points in the sample that judges a space, and neighbours of each.
_QUALITY_SAMPLE = 2000
_QUALITY_NEIGHBORS = 20


def label_shares_key(config: RunConfig, data: ImageData, features_sha256: str) -> str:
    """Only the label shares use labels in set-up, so no other key covers the labels."""
    labels = hashlib.sha256(data.labels.numpy().tobytes()).hexdigest()
    parts = {"latents": features_sha256, "pixels": data.pool_sha256, "labels": labels, "recipe": RECIPE_VERSION}
    return cache.key_of(parts | {"n_components": config.representation.latent_dim})


def make_label_shares(
    config: RunConfig, data: ImageData, features: Features, progress: Progress
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    progress("looking at neighbours' labels", 0, 1)
    with on_threads(config.setup_threads):
        return {}, {"label_share": label_shares(data, features, config.representation.latent_dim)}


def label_shares(data: ImageData, features: Features, n_components: int) -> dict[str, float]:
    """Share of a point's 20 nearest neighbours with its label, for the features, PCA and pixels; on a sample.

    Only to judge a representation: nothing that a strategy sees depends on it.
    """
    sample = torch.from_numpy(rng_for(0, "label share").permutation(data.size)[:_QUALITY_SAMPLE].astype(np.int64))
    project = principal_components(data.images, n_components, data.maximum)
    spaces: dict[str, tuple[Tensor, Callable[[Tensor], Features]]] = {
        "latents": (features, flat_pixels),
        "pca": (data.images, project),
        "pixels": (data.images, partial(flat_pixels, maximum=data.maximum)),
    }
    return {
        name: label_share(points, as_features, data.labels, sample) for name, (points, as_features) in spaces.items()
    }


def label_share(points: Tensor, as_features: Callable[[Tensor], Features], labels: Tensor, sample: Tensor) -> float:
    """Mean over the sample of the share of the 20 nearest other points that have the point's label.

    ``as_features(points)`` (N, d) is computed in blocks: the floats of a whole pool's pixels, or all distances to it,
    would not fit into memory.
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
        own = torch.nonzero((sample >= start) & (sample < start + len(block))).flatten()
        distances[own, sample[own] - start] = torch.inf  # a point is not its own neighbour
        nearest = distances.topk(min(k, len(block)), dim=1, largest=False)
        best, ids = torch.cat([best, nearest.values], dim=1), torch.cat([ids, nearest.indices + start], dim=1)
        smallest = best.topk(min(k, best.shape[1]), dim=1, largest=False)
        best, ids = smallest.values, ids.gather(1, smallest.indices)
        start += len(block)
    return float((labels[ids] == labels[sample, None]).float().mean())
