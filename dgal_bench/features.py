"""Representations by name: what turns the images of a pool into points that a graph can be built on."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench.arrays import Features, Progress
from dgal_bench.cache import file_sha256, free_memory
from dgal_bench.config import RepresentationConfig, RunConfig
from dgal_bench.data.images import ImageData, Subset
from dgal_bench.errors import ConfigError, DataError
from dgal_bench.models.backbones import Backbone, BackboneSpec, load_weights
from dgal_bench.models.vae import encode, posterior_means, train_vae
from dgal_bench.seeding import isolated, rng_for, seed_for

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
    latents = _embeddings("path", path, data.size, data.kept)

    def make_test() -> Features | None:
        if test_path is None and data.one_source:  # the same file holds them
            return _embeddings("path", path, len(data.test_images), data.test_kept)
        return _embeddings("test_path", test_path, len(data.test_images), data.test_kept) if test_path else None

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
