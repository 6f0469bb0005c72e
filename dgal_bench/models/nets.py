"""Task networks as plain modules: ``forward`` returns (logits, features), the features being the 50-unit layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dgal_bench.config import NetConfig
from dgal_bench.errors import ConfigError, choose


class CNN(nn.Module):
    """LeNet (paper, App. A): convolutions with ReLU and optional 2x2 max-pooling, then 50 units, then the classes.

    ``forward``: (b, channels, height, width) -> logits (b, C), features (b, feature_dim) after their ReLU, which are
    "the features" of BADGE, CoreSet and SEALS.
    """

    def __init__(self, image_shape: tuple[int, int, int], n_classes: int, config: NetConfig) -> None:
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for out, kernel, pool in zip(config.channels, config.kernels, config.pools, strict=True):
            layers += [nn.Conv2d(channels, out, kernel), nn.ReLU()]
            height, width, channels = height - kernel + 1, width - kernel + 1, out
            if pool:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        if min(height, width) < 1:
            raise ConfigError(
                f"net.kernels={list(config.kernels)} with net.pools={list(config.pools)} leave nothing of a "
                f"{image_shape[1]}x{image_shape[2]} image: use smaller kernels or fewer pools"
            )
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.features = nn.Sequential(nn.Linear(channels * height * width, config.feature_dim), nn.ReLU())
        self.classify = nn.Linear(config.feature_dim, n_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.body(images))
        return self.classify(features), features


NETS: dict[str, Callable[[tuple[int, int, int], int, NetConfig], nn.Module]] = {"cnn": CNN}


def build_net(image_shape: tuple[int, int, int], n_classes: int, config: NetConfig) -> nn.Module:
    """The network named by ``net.kind``, its initial weights drawn from the global torch RNG."""
    net = choose(NETS, config.kind, "net.kind")(image_shape, n_classes, config)
    return net.to(memory_format=torch.channels_last)


def cost(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """Parameters, and floating-point operations (2 per multiply-add) of one image's forward pass."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net(torch.zeros(1, *image_shape))
    return {"parameters": sum(p.numel() for p in net.parameters()), "flops_per_image": counter.get_total_flops()}
