"""One independent random stream per (seed, role, ...), and code that must use a global RNG kept from touching it.

Roles that must agree between strategies (initial set, weights, data order) do not mention the strategy.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgal_bench.arrays import Index


def seed_for(seed: int, *role: str | int) -> int:
    """A 63-bit seed that depends on every word of the role and on nothing else."""
    digest = hashlib.sha256(json.dumps([seed, *role]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def rng_for(seed: int, *role: str | int) -> np.random.Generator:
    """An independent generator: ``rng_for(seed, "query", round)``."""
    return np.random.default_rng(seed_for(seed, *role))


def torch_rng_for(seed: int, *role: str | int) -> torch.Generator:
    """The same for code that takes a torch generator (CPU)."""
    return torch.Generator().manual_seed(seed_for(seed, *role))


@contextmanager
def isolated(seed: int, *role: str | int) -> Iterator[None]:
    """Seed the global RNGs for code that insists on them (weight init, Lightning) and put their states back after."""
    # the legacy global state is NumPy's to keep, and some library's to draw from
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        derived = seed_for(seed, *role)
        random.seed(derived)
        np.random.seed(derived % 2**32)  # noqa: NPY002
        torch.manual_seed(derived)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@dataclass(frozen=True)
class TieBreak:
    """A seeded hash of positions: the order of equal scores in one round, whatever order the points arrive in."""

    seed: int

    def __call__(self, ids: Index) -> Tensor:
        """(m,) int64 positions -> (m,) int64 keys; distinct positions get distinct keys (splitmix64 is a bijection)."""
        with np.errstate(over="ignore"):
            x = ids.numpy().astype(np.uint64) + np.uint64(self.seed) * np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
        return torch.from_numpy(x.view(np.int64))
