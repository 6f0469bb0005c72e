"""Task networks as plain modules: ``forward`` returns logits and features, the output of the 50-unit layer."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dgal_bench.config.schema import NetConfig
from dgal_bench.core.errors import ConfigError
from dgal_bench.core.types import ImageShape
from dgal_bench.models.backbones import Backbone, BackboneSpec, Resize, Weights, load_weights


class Classifier(nn.Module):
    """A body, a linear layer of ``feature_dim`` units with ReLU, and the output layer (paper, App. A).

    ``forward``: (b, channels, height, width) -> logits (b, C), features (b, feature_dim) after their ReLU, which are
    "the features" of BADGE, CoreSet and SEALS.
    """

    def __init__(self, body: nn.Module, width: int, feature_dim: int, n_classes: int) -> None:
        super().__init__()
        self.body = body
        self.features = nn.Sequential(nn.Linear(width, feature_dim), nn.ReLU())
        self.classify = nn.Linear(feature_dim, n_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.body(images))
        return self.classify(features), features


class MaxPool(nn.MaxPool2d):
    """2x2 max-pooling of (b, c, h, w), without a last odd row or column; the same bits with and without gradients.

    Without gradients on a CPU it is two maxima of slices: torch's own also finds where each maximum was, and takes 1.4
    to 6 times as long in channels-last layout and 4 to 11 in the default one (6 to 32 channels, one thread).
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled() or images.device.type != "cpu":
            return super().forward(images)  # type: ignore[no-any-return]
        height, width = images.shape[2] // 2 * 2, images.shape[3] // 2 * 2
        rows = torch.maximum(images[:, :, 0:height:2, :width], images[:, :, 1:height:2, :width])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


def cnn(image_shape: ImageShape, config: NetConfig) -> tuple[nn.Module, int]:
    """LeNet (paper, App. A): convolutions with ReLU and optional 2x2 max-pooling; the body and its output's width.

    The ReLU comes after the pooling, on a quarter of the values: both are monotone, so that values and gradients are
    the same bits as in the other order.
    """
    channels, height, width = image_shape
    layers: list[nn.Module] = []
    for out, kernel, pool in zip(config.channels, config.kernels, config.pools, strict=True):
        layers.append(nn.Conv2d(channels, out, kernel))
        height, width, channels = height - kernel + 1, width - kernel + 1, out
        if pool:
            layers.append(MaxPool())
            height, width = height // 2, width // 2
        layers.append(nn.ReLU())
    if min(height, width) < 1:
        raise ConfigError(
            f"net.kernels={list(config.kernels)} with net.pools={list(config.pools)} leave nothing of a "
            f"{image_shape[1]}x{image_shape[2]} image: use smaller kernels or fewer pools, or net.kind=mlp for "
            "embeddings"
        )
    return nn.Sequential(*layers, nn.Flatten()), channels * height * width


def mlp(image_shape: ImageShape, config: NetConfig) -> tuple[nn.Module, int]:
    """Linear layers with ReLU on the flattened input, for embeddings."""
    widths = [math.prod(image_shape), *config.hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for narrow, wide in pairwise(widths):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers), widths[-1]


OWN_NETS: dict[str, Callable[[ImageShape, NetConfig], tuple[nn.Module, int]]] = {"cnn": cnn, "mlp": mlp}
"""Any other ``net.kind`` is one of timm's networks."""


def build_net(image_shape: ImageShape, n_classes: int, config: NetConfig, weights: Weights | None = None) -> nn.Module:
    """The network named by ``net.kind``; initial weights from ``weights``, all others from the global torch RNG."""
    body: nn.Module
    if config.kind in OWN_NETS:
        body, width = _build_own(image_shape, config)
    else:
        body = Backbone(backbone_spec(image_shape, config), weights)
        width = body.width
    net = Classifier(body, width, config.feature_dim, n_classes)
    return net.to(memory_format=torch.channels_last) if config.channels_last else net


def _build_own(image_shape: ImageShape, config: NetConfig) -> tuple[nn.Module, int]:
    """One of OWN_NETS, after a resize to ``input_size`` if that is set."""
    if config.input_size is None:
        return OWN_NETS[config.kind](image_shape, config)
    if image_shape[1:] == (1, 1):
        raise ConfigError(f"net.input_size={config.input_size} is for images, and these are embeddings: leave it out")
    size = config.input_size, config.input_size
    body, width = OWN_NETS[config.kind]((image_shape[0], *size), config)
    return nn.Sequential(Resize(size), body), width


def backbone_spec(image_shape: ImageShape, config: NetConfig) -> BackboneSpec:
    return BackboneSpec(
        config.kind, image_shape, config.input_size, config.stem, config.pretrained, config.checkpoint_path
    )


def initial_weights(image_shape: ImageShape, config: NetConfig) -> Weights | None:
    """The pre-trained weights of every round, read once; None: from scratch. Errors as in ``load_weights``."""
    if config.kind not in OWN_NETS:
        return load_weights(backbone_spec(image_shape, config))
    if config.pretrained or config.checkpoint_path is not None:
        raise ConfigError(
            f"net.kind={config.kind} has no published weights: set net.pretrained=false and no net.checkpoint_path"
        )
    return None


def check_fits(net: nn.Module, image_shape: ImageShape, config: NetConfig) -> None:
    """Pass one image through; raises ConfigError if the network cannot take it."""
    try:
        cost(net, image_shape)
    except RuntimeError as error:
        height, width = image_shape[1:] if config.input_size is None else (config.input_size, config.input_size)
        raise ConfigError(
            f"{config.kind} cannot take images of {height}x{width} pixels ({' '.join(str(error).split())[:160]}): "
            "raise net.input_size"
        ) from error


def cost(net: nn.Module, image_shape: ImageShape) -> dict[str, int]:
    """Parameters, and floating-point operations (2 per multiply-add) of one image's forward pass."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net.eval()(torch.zeros(1, *image_shape))  # in training mode BatchNorm would refuse a single image
    return {"parameters": sum(p.numel() for p in net.parameters()), "flops_per_image": counter.get_total_flops()}
