"""timm's networks by name, adapted to small and grey images, with weights from its hub, a local file, or none.

Weights on disk are state dicts without pickle, and are identified by their content.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgal_bench.core.errors import ConfigError, DataError, innermost_error
from dgal_bench.core.types import ImageShape

ALIASES = {"vit_small": "vit_small_patch16_224"}
"""Names of the paper (Table 1) that timm spells otherwise."""

SMALL = 64  # pixels a side: up to here, a network from scratch gets a stem for small images
_PATCHES = 8  # a side, at least, of a ViT from scratch on small images
_NATIVE_PATCH = 16


@dataclass(frozen=True)
class BackboneSpec:
    """Which of timm's networks; ``input_size`` None: the images' own from scratch, the native one with weights."""

    model: str
    image_shape: ImageShape
    input_size: int | None = None
    stem: str = "auto"
    pretrained: bool = False
    checkpoint_path: str | None = None

    @property
    def with_weights(self) -> bool:
        return self.pretrained or self.checkpoint_path is not None

    @property
    def name(self) -> str:
        return ALIASES.get(self.model, self.model)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        if self.input_size is not None:
            return self.input_size, self.input_size
        return self._native if self.with_weights else self.image_shape[1:]

    @property
    def _native(self) -> tuple[int, int]:
        import timm

        config = timm.get_pretrained_cfg(self.name)
        return (224, 224) if config is None else (config.input_size[1], config.input_size[2])

    @property
    def small(self) -> bool:
        """Whether the stem is the one for small images: by ``stem``, or for small images from scratch."""
        return self.stem == "small" or (self.stem == "auto" and not self.with_weights and max(self.size) <= SMALL)

    @property
    def small_patches(self) -> bool:
        """Whether a ViT's patches are small; they must also tile the image: patches of 16 pixels do not tile 84."""
        not_tiled = any(side % _NATIVE_PATCH for side in self.size)
        return self.small or (self.stem == "auto" and not self.with_weights and not_tiled)


@dataclass(frozen=True, eq=False)
class Weights:
    """A backbone's weights, fitted to the network that is built, and their sha256 for a run's fingerprint."""

    state: Mapping[str, Tensor]

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Resize(nn.Module):
    """Images (b, c, h, w) of another size to (height, width), bilinear and antialiased."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode="bilinear", antialias=True)


class Backbone(nn.Module):
    """A timm network without its classifier: images (b, 1 or 3, h, w) -> features (b, width).

    Grey images are repeated to three channels, and images of another size are resized.
    """

    def __init__(self, spec: BackboneSpec, weights: Weights | None = None) -> None:
        super().__init__()
        self.resize = Resize(spec.size)
        self.net = _create(spec, {"pretrained": False})
        if weights is not None:
            self.net.load_state_dict(weights.state)
        self.width: int = self.net.head_hidden_size

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        features: Tensor = self.net(self.resize(images))
        return features


def _create(spec: BackboneSpec, settings: Mapping[str, Any]) -> Any:
    """timm's module; settings that do not fit raise a ConfigError."""
    import timm

    if spec.stem == "small" and spec.with_weights:
        raise ConfigError(
            f"net.stem=small gives {spec.model} another first layer, for which there are no weights: use "
            "net.stem=auto, or train it from scratch"
        )
    if spec.image_shape[0] not in (1, 3):
        raise ConfigError(
            f"{spec.model} takes images of 1 or 3 channels, not {spec.image_shape[0]}: use net.kind=mlp for embeddings"
        )
    settings = dict(settings)
    config = timm.get_pretrained_cfg(spec.name)
    if config is not None and config.fixed_input_size:
        settings["img_size"] = spec.size
    if spec.small_patches and spec.name.partition(".")[0] in timm.list_models(module="vision_transformer"):
        settings["patch_size"] = patch_size(spec.size)
    try:
        net = timm.create_model(spec.name, num_classes=0, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{spec.model} cannot be built for {spec.size[0]}x{spec.size[1]} pixels ({innermost_error(error)}): set "
            "net.input_size, to 224 for most of timm's networks"
        ) from error
    if isinstance(net, timm.models.VisionTransformer):
        _check_tiled(net, spec)
    elif spec.small and not use_small_stem(net) and spec.stem == "small":
        raise ConfigError(f"net.stem=small is for ResNets and ViTs, not for {spec.model}: use net.stem=standard")
    return net


def _check_tiled(net: Any, spec: BackboneSpec) -> None:
    """timm would ignore the pixels of the last, incomplete patches."""
    patch, size = net.patch_embed.patch_size, spec.size
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ConfigError(
            f"{spec.model}: patches of {patch[0]}x{patch[1]} do not tile {size[0]}x{size[1]} pixels: set "
            "net.input_size to a multiple, or net.stem=small"
        )


def patch_size(size: tuple[int, int]) -> int:
    """The largest patch that tiles a small image with at least eight a side, or else a single pixel."""
    fitting = [p for p in range(1, min(size) // _PATCHES + 1) if size[0] % p == 0 and size[1] % p == 0]
    return max(fitting, default=1)


def use_small_stem(net: Any) -> bool:
    """Give a ResNet a 3x3 stem of stride 1 without max-pool: its own leaves 8x8 of a 32x32 image.

    Returns:
        Whether it is a ResNet.
    """
    import timm

    if not isinstance(net, timm.models.ResNet) or not isinstance(net.conv1, nn.Conv2d):
        return False
    first = nn.Conv2d(net.conv1.in_channels, net.conv1.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
    net.set_submodule("conv1", first)
    net.set_submodule("maxpool", nn.Identity())
    return True


def load_weights(spec: BackboneSpec) -> Weights | None:
    """The weights that ``spec`` names, fitted to its input (position embeddings resampled by timm); None from scratch.

    Raises:
        ConfigError: the file is no state dict, or that of another network.
        DataError: no such file, or the hub cannot be reached.
    """
    if not spec.with_weights:
        return None
    source: dict[str, Any] = {"pretrained": True}
    if spec.checkpoint_path is not None:
        state = _without_classifier(spec.name, _read_state(Path(spec.checkpoint_path).expanduser()))
        # If a classifier were named, timm would ignore every tensor that is missing or of another network.
        source |= {"pretrained_cfg_overlay": {"state_dict": state, "custom_load": False, "classifier": None}}
    try:
        net = _create(spec, source)
    except ConfigError:
        raise
    except Exception as error:  # without a network the hub's client raises many types
        if spec.checkpoint_path is not None:
            raise _misfit(spec, error) from error
        raise DataError(
            f"the weights of {spec.model} cannot be had from timm's hub here ({type(error).__name__}: "
            f"{' '.join(str(error).split()).partition('. ')[0][:160]}): set checkpoint_path=FILE to a local copy, or "
            "pretrained=false (both net. or representation.)"
        ) from error
    return Weights({name: tensor.detach().clone() for name, tensor in net.state_dict().items()})


def _read_state(path: Path) -> dict[str, Tensor]:
    """A state dict, not empty, from a .safetensors file or one that torch reads with weights_only."""
    from safetensors import SafetensorError
    from timm.models import load_state_dict

    if not path.is_file():
        raise DataError(f"checkpoint_path={path} is no file: name a .safetensors or .pth with a state dict")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (UnpicklingError, RuntimeError, SafetensorError, EOFError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"checkpoint_path={path} cannot be read as weights alone ({innermost_error(error)[:160]}): save a state "
            "dict, with safetensors or torch.save(model.state_dict(), FILE)"
        ) from error
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ConfigError(f"checkpoint_path={path} is no state dict: it must map names to tensors")
    return dict(state)


def _without_classifier(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the output layer, whose classes are those of another data set."""
    import timm

    config = timm.get_pretrained_cfg(name)
    layers = config.classifier if config is not None and config.classifier else ()
    prefixes = tuple(f"{layer}." for layer in ((layers,) if isinstance(layers, str) else layers))
    return {key: tensor for key, tensor in state.items() if not prefixes or not key.startswith(prefixes)}


def _misfit(spec: BackboneSpec, error: Exception) -> ConfigError:
    """torch's report of missing, unexpected and misshapen tensors, cut to one line."""
    text = _key_counts(str(error)) or " ".join(str(error).split())
    return ConfigError(
        f"checkpoint_path={spec.checkpoint_path} does not fit {spec.model}: {text[:200]}"
        f"{'...' if len(text) > 200 else ''}; name the network that it is of"
    )


def _key_counts(text: str) -> str:
    """``60 tensors are missing, as conv1.weight; 60 unexpected, as net.conv1.weight``; empty for other errors."""
    counts = []
    for what in ("Missing", "Unexpected"):
        _, _, listed = text.partition(f"{what} key(s) in state_dict: ")
        if names := re.findall(r'"([^"]+)"', listed.partition("\n")[0]):
            counts.append(f"{len(names)} tensors are {what.lower()}, as {names[0]}")
    return "; ".join(counts)
