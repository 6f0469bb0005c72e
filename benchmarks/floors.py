"""What the machine can do at best, measured in the run whose figures are held against it."""

from collections.abc import Callable
from time import perf_counter

import torch

_SIDE = 2048  # of the matrices: 16 MB each, as large as the tiles of a search
_BYTES = 1 << 28  # copied: eight times any cache


def best_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of some runs: a floor is what nothing else disturbed."""
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return min(seconds)


def sgemm_rate(n_features: int) -> float:
    """Floating-point operations per second of float32 products with ``n_features`` terms a sum, torch's."""
    left, right = torch.randn(_SIDE, n_features), torch.randn(n_features, _SIDE)
    out = torch.empty(_SIDE, _SIDE)
    seconds = best_seconds(lambda: torch.mm(left, right, out=out), repeats=20)
    return 2 * _SIDE * _SIDE * n_features / seconds


def bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(_BYTES // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * _BYTES / best_seconds(lambda: target.copy_(source))


def step_bytes(n_points: int, n_edges: int, n_classes: int) -> int:
    """Bytes that one product M X must move if every row of X is read once: ids, weights, pointers, X and M X."""
    return n_edges * 8 + n_points * 4 + 2 * n_points * n_classes * 4


def search_operations(n_points: int, n_features: int) -> float:
    """Floating-point operations of all distances by expansion."""
    return 2.0 * n_points * n_points * n_features
