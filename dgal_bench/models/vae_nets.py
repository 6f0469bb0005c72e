"""The VAE's networks by name: an encoder of images, mu and log variance, and a mirrored decoder (paper 3.2, App. A)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dgal_bench.core.errors import ConfigError, choose
from dgal_bench.core.types import ImageShape
from dgal_bench.models.backbones import SMALL, use_small_stem

_HIDDEN = 256
_SMALLEST = 4


class Vae(nn.Module):
    """``encoder``: images (b, channels, height, width), floats in [0, 1] -> (b, width); ``up``: (b, *bottom) -> images.

    Means, log variances and losses are float32 under every autocast.
    """

    def __init__(self, encoder: nn.Module, width: int, bottom: tuple[int, ...], up: nn.Module, latent_dim: int) -> None:
        super().__init__()
        flat = math.prod(bottom)
        self.encoder = encoder
        self.mu = nn.Linear(width, latent_dim)
        self.log_variance = nn.Linear(width, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, flat),
            nn.ReLU(),
            nn.Unflatten(1, bottom),
            up,
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance, each (b, latent_dim)."""
        hidden = self.encoder(images)
        return self.mu(hidden).float(), self.log_variance(hidden).float()

    def decode(self, latents: Tensor) -> Tensor:
        """(b, latent_dim) -> images in [0, 1]."""
        images: Tensor = self.decoder(latents)
        return images

    def losses(self, images: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error summed over pixels and KL summed over latents, (b,) each; posterior means (b, latent_dim)."""
        mu, log_variance = self.encode(images)
        decoded = self.decode(mu + noise * (log_variance / 2).exp()).float()
        error = (decoded - images).square().flatten(1).sum(1)
        kl = 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return error, kl, mu


@dataclass(frozen=True)
class _Stage:
    """A stride-2 convolution down, and its transpose; ``size``: height and width above it."""

    narrow: int
    wide: int
    size: tuple[int, int]

    def down(self) -> nn.Module:
        return nn.Conv2d(self.narrow, self.wide, 4, stride=2, padding=1)

    def up(self) -> nn.Module:
        odd = (self.size[0] % 2, self.size[1] % 2)
        return nn.ConvTranspose2d(self.wide, self.narrow, 4, stride=2, padding=1, output_padding=odd)


def _stages(shape: ImageShape) -> list[_Stage]:
    """32 and 64 channels, from 32 pixels a side 128 too; then more stages of 128 until the smaller side is below 16."""
    channels, height, width = shape
    widths = [channels, 32, 64] + ([128] if min(height, width) >= 32 else [])
    while min(height, width) >> (len(widths) - 1) >= 16:
        widths.append(128)
    return [_Stage(narrow, wide, (height >> i, width >> i)) for i, (narrow, wide) in enumerate(pairwise(widths))]


def _bottom(stages: list[_Stage]) -> tuple[int, int, int]:
    last = stages[-1]
    return last.wide, last.size[0] // 2, last.size[1] // 2


def _decoder(ups: list[nn.Module]) -> nn.Module:
    """The stages upwards; ``ups`` is in order from the top down."""
    layers = [layer for up in reversed(ups) for layer in (up, nn.ReLU())]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


def _cnn(shape: ImageShape, latent_dim: int) -> Vae:
    """The stages' convolutions and a linear layer of 256. No BatchNorm."""
    stages = _stages(shape)
    # Down and up in turn: initial weights are drawn in the order in which the layers are made.
    pairs = [(stage.down(), stage.up()) for stage in stages]
    bottom = _bottom(stages)
    downward = [layer for down, _ in pairs for layer in (down, nn.ReLU())]
    encoder = nn.Sequential(*downward, nn.Flatten(), nn.Linear(math.prod(bottom), _HIDDEN), nn.ReLU())
    return Vae(encoder, _HIDDEN, bottom, _decoder([up for _, up in pairs]), latent_dim)


def _resnet18(shape: ImageShape, latent_dim: int) -> Vae:
    """timm's ResNet18 from scratch as the encoder (paper, App. A: CIFAR100 and Mini-ImageNet), the CNN's decoder.

    Deviations from He et al. (2016): GroupNorm of 32 groups instead of BatchNorm, so that an image's latents and
    gradient depend neither on its batch nor on how many processes share it; up to 64 pixels a side a 3x3 stride-1
    stem without max-pool.
    """
    import timm  # takes a second; only this encoder needs it
    from timm.layers.norm import GroupNorm

    stages = _stages(shape)
    net: Any = timm.create_model("resnet18", pretrained=False, in_chans=shape[0], num_classes=0, norm_layer=GroupNorm)
    if max(shape[1:]) <= SMALL:
        use_small_stem(net)
    return Vae(net, net.num_features, _bottom(stages), _decoder([stage.up() for stage in stages]), latent_dim)


ENCODERS: dict[str, Callable[[ImageShape, int], Vae]] = {"cnn": _cnn, "resnet18": _resnet18}


def build_vae(image_shape: ImageShape, latent_dim: int, encoder: str) -> Vae:
    """The VAE for images of (channels, height, width), its initial weights drawn from the global torch RNG.

    Raises:
        ConfigError: no such encoder, or images of fewer than 4 pixels a side.
    """
    height, width = image_shape[1:]
    build = choose(ENCODERS, encoder, "encoder")
    if min(height, width) < _SMALLEST:
        raise ConfigError(
            f"a VAE needs images of at least {_SMALLEST} pixels a side, these have {height}x{width}: set "
            "dataset.image_size, or representation=pixels or pca"
        )
    return build(image_shape, latent_dim).to(memory_format=torch.channels_last)


def refuse_embeddings(images: Tensor, instead: str) -> None:
    """Raises ConfigError for vectors: floats, or images of one pixel. ``instead``: what to do, for the message."""
    if images.is_floating_point() or images.shape[2:] == (1, 1):
        raise ConfigError(f"a VAE is for images, and these are embeddings: {instead}")
