"""One independent random stream per (seed, role, ...), and isolation for code that insists on a global RNG.

Roles that must agree between strategies (initial set, weights, data order) do not mention the strategy.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from dgal_bench.core.types import Index

# splitmix64's increment and multipliers
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


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


_n_gpus = cache(torch.cuda.device_count)
"""Asked once: torch opens the driver's library each time."""


@contextmanager
def isolated(seed: int, *role: str | int) -> Iterator[None]:
    """Seed the global RNGs for code that insists on them (weight init, Lightning) and put their states back after."""
    # some libraries draw from NumPy's legacy global state
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(_n_gpus()))
    with torch.random.fork_rng(devices=devices):
        derived = seed_for(seed, *role)
        random.seed(derived)
        np.random.seed(derived % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(derived)
        if devices:  # without one, torch would keep every seed and where it was set, for when there is one
            torch.cuda.manual_seed_all(derived)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


_ROUNDS = 6  # with four, some pairs of first picks among 30 points are clearly more frequent than others


@dataclass(frozen=True)
class TieBreak:
    """A seeded permutation of the positions 0..N-1: equal scores of one round are ordered by their ranks in it.

    It is computed both ways without a table, by a Feistel network: a position is a place in a grid of about sqrt(N)
    rows, and each round shifts the rows by a hash of the column, the next one the columns by a hash of the row. The
    grid may have some more places than N; a walk that leads to one of them goes on until it is back below N.
    """

    seed: int
    size: int

    def __call__(self, ids: Index) -> Tensor:
        """(m,) int64 positions -> (m,) int64 ranks."""
        return self._walk(ids, back=True)

    def at(self, ranks: Tensor) -> Index:
        """(m,) int64 ranks -> (m,) int64 positions."""
        return self._walk(ranks, back=False)

    def _walk(self, values: Tensor, back: bool) -> Tensor:
        places = self._permute(values.numpy().astype(np.uint64), back)
        while len(beyond := np.flatnonzero(places >= self.size)):
            places[beyond] = self._permute(places[beyond], back)
        return torch.from_numpy(places.view(np.int64))

    def _permute(self, places: np.ndarray, back: bool) -> np.ndarray:
        n_rows = math.isqrt(self.size - 1) + 1
        sizes = (n_rows, -(-self.size // n_rows))
        halves = np.divmod(places, sizes[1])
        for n in reversed(range(_ROUNDS)) if back else range(_ROUNDS):
            half, other, below = halves[n % 2], halves[1 - n % 2], sizes[n % 2]
            # Multiply, add, shift: strongly universal for halves below 2^32 (Dietzfelbinger 1996). NumPy's uint64 wraps
            # without a word and takes half the time of torch's int64; a query is timed.
            shift = other * self._keys[n, 0]
            shift += self._keys[n, 1]
            shift >>= 32
            shift *= below
            shift >>= 32
            half += below - shift if back else shift
            np.subtract(half, below, out=half, where=half >= below)
        places = halves[0] * sizes[1]
        places += halves[1]
        return places

    @cached_property
    def _keys(self) -> np.ndarray:
        """(rounds, 2) random factors and offsets."""
        steps = torch.arange(1, 2 * _ROUNDS + 1) * _signed(_GOLDEN) + _signed(self.seed)
        keys: np.ndarray = _splitmix64(steps).numpy().view(np.uint64).reshape(_ROUNDS, 2)
        return keys


def normals(seed: int, ids: Index, size: int) -> Tensor:
    """(m,) ids -> (m, size) float32 standard normals, each a pure function of (seed, id, column).

    So an id's noise does not depend on batch, process or order. A hash of the id is the state of its own splitmix64
    stream; each number of the stream is two 32-bit uniforms, which Box-Muller makes two normals. Computed on the device
    of ``ids``, in float64 up to the last step, so that vector units and devices that round the logarithm or the cosine
    differently almost always agree in float32.
    """
    streams = _splitmix64(ids * _signed(_GOLDEN) + _signed(seed))
    steps = torch.arange(1, size // 2 + size % 2 + 1, device=ids.device) * _signed(_GOLDEN)
    bits = _splitmix64(streams[:, None] + steps)
    # (k + 1/2) / 2^32 is never 0; the largest normal is sqrt(66 ln 2) = 6.8
    radius = _high(bits, 32).double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (bits & 0xFFFFFFFF).double().mul_(2 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)[:, :size].float()


def _splitmix64(x: Tensor) -> Tensor:
    """The output function of splitmix64, a bijection of 64-bit integers: int64 -> int64, wrapping as uint64 does."""
    x = (x ^ _high(x, 30)).mul_(_signed(_MIX[0]))
    x = x.bitwise_xor_(_high(x, 27)).mul_(_signed(_MIX[1]))
    return x.bitwise_xor_(_high(x, 31))


def _high(x: Tensor, shift: int) -> Tensor:
    """x >> shift of unsigned integers: that of int64 drags the sign along."""
    return (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63
