"""Weights of a network on disk and in memory: state dicts without pickle, known by their content."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from dgal_bench.errors import ConfigError, DataError, innermost


@dataclass(frozen=True, eq=False)
class Weights:
    """A backbone's weights as they fit the network that is built, and the sha256 of them all: a cell rests on both."""

    state: Mapping[str, Tensor]
    sha256: str

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Weights":
        return cls(state, _sha256(state))


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict out of a .safetensors file or one that torch reads with weights_only; empty ones are refused."""
    from safetensors import SafetensorError
    from timm.models import load_state_dict

    if not path.is_file():
        raise DataError(f"checkpoint_path={path} is no file: name a .safetensors or .pth with a state dict")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (UnpicklingError, RuntimeError, SafetensorError, EOFError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"checkpoint_path={path} cannot be read as weights alone ({innermost(error)[:160]}): save a state dict, "
            "with safetensors or torch.save(model.state_dict(), FILE)"
        ) from error
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ConfigError(f"checkpoint_path={path} is no state dict: it must map names to tensors")
    return dict(state)


def _sha256(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
