"""Nearest neighbours: FAISS where it is installed (on the GPU where FAISS and torch both see one), else torch."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench.arrays import Features, Index
from dgal_bench.errors import ConfigError, choose

# Searched beyond K and ranked again by exact distances: |x|^2 + |y|^2 - 2xy loses digits between near points.
_SLACK = 8
# Elements of one block of a distance matrix: 64 MB in float32.
_BLOCK = 16_000_000
# Queries of the sample on which the recall of an approximate search is measured.
_RECALL_SAMPLE = 1000

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)

Search = Callable[[Features, int], Tensor]
"""(queries (m, d), k) -> (m, k) int64 positions in what was indexed, nearest first, -1 for none."""


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Each point's K nearest others: ``ids`` (N, K) int64, ``distances`` (N, K) float32, Euclidean and ascending.

    A point is never its own neighbour. ``method`` says what searched; ``recall`` is 1 for an exact search, otherwise
    measured against one on a sample.
    """

    ids: Tensor
    distances: Tensor
    method: str
    recall: float

    @property
    def k(self) -> int:
        return self.ids.shape[1]


def knn(
    features: Features, k: int, backend: str = "auto", exact_limit: int = 200_000, device: torch.device = _CPU
) -> Neighbors:
    """The K nearest neighbours of every point by Euclidean distance; equal distances in order of position.

    Args:
        features: (N, d) finite floats.
        k: 1..N-1.
        backend: ``faiss``, ``torch``, or ``auto`` for the first that is there.
        exact_limit: above this many points FAISS searches an inverted file, approximately.
        device: where to search; FAISS does on a GPU if it can too, else on the CPU.

    Raises:
        ConfigError: k out of range, NaN or infinity in the features, an unknown or missing backend.
    """
    size = len(features)
    if not 1 <= k < size:
        raise ConfigError(f"graph.graph_k={k}, but {size} points have 1 to {size - 1} neighbours each")
    if bad := int((~torch.isfinite(features)).any(dim=1).sum()):
        raise ConfigError(f"{bad} of {size} feature rows hold NaN or infinity: the search would lose them silently")
    # Centred, the products of the expansion are as small as they can be.
    centred = (features - features.mean(dim=0)).float().contiguous()
    name = pick_backend(backend)
    approximate = _is_approximate(name, size, exact_limit)
    ids, distances = _without_self(centred, new_index(centred, backend, exact_limit, device), k)
    recall = _recall(centred, ids, device) if approximate else 1.0
    return Neighbors(ids, distances, f"{name}-ivf" if approximate else name, recall)


def new_index(base: Features, backend: str = "auto", exact_limit: int = 200_000, device: torch.device = _CPU) -> Search:
    """An index over ``base`` (N, d), by Euclidean distance: exact up to ``exact_limit`` points; errors as in ``knn``.

    A point of the base is found among its own neighbours, except where exact duplicates stand in for it.
    """
    name = pick_backend(backend)
    make = _index_faiss_ivf if _is_approximate(name, len(base), exact_limit) else BACKENDS[name]
    return make(base.float().contiguous(), device)


def _is_approximate(name: str, size: int, exact_limit: int) -> bool:
    return name == "faiss" and size > exact_limit


def pick_backend(backend: str) -> str:
    """``auto`` resolved: FAISS where installed and not on macOS (two OpenMP runtimes can crash there), else torch.

    Raises:
        ConfigError: an unknown backend, FAISS asked for and missing, or two packages that both own its module.
    """
    if backend == "auto" and sys.platform == "darwin":
        return "torch"
    if backend == "auto" and importlib.util.find_spec("faiss") is None:
        _say_that_faiss_is_missing()
        return "torch"
    name = "faiss" if backend == "auto" else backend
    choose(BACKENDS, name, "graph.backend")
    if name == "faiss":
        _check_faiss()
    return name


@cache
def _say_that_faiss_is_missing() -> None:
    log.warning(
        "faiss is not installed: the torch backend builds the graph (exact, slower); "
        "pip install faiss-cpu, or set graph.backend=torch"
    )


def _check_faiss() -> None:
    if importlib.util.find_spec("faiss") is None:
        raise ConfigError(
            "graph.backend=faiss, but faiss is not installed: pip install faiss-cpu, or set graph.backend=torch"
        )
    if len(owners := faiss_packages()) > 1:
        raise ConfigError(
            f"{' and '.join(owners)} are both installed and own the same module: pip uninstall -y {' '.join(owners)}, "
            "then install one of them, or set graph.backend=torch"
        )


@cache
def faiss_packages() -> tuple[str, ...]:
    """The installed distributions that own the module ``faiss``: one, or something is wrong."""
    return tuple(sorted(set(packages_distributions().get("faiss", ()))))


def nearest(base: Features, queries: Features, k: int, backend: str = "auto") -> Tensor:
    """Exact (m, k) positions in ``base`` nearest to each query, by the chosen backend's own ranking."""
    return new_index(base, backend, exact_limit=len(base))(queries.float().contiguous(), k)


def _without_self(features: Features, search: Search, k: int) -> tuple[Tensor, Tensor]:
    """Ids and distances (N, k) of every point's nearest others, in blocks."""
    size = len(features)
    ids = torch.empty(size, k, dtype=torch.int64)
    distances = torch.empty(size, k)
    found = search(features, wanted(k, size))
    for rows in torch.arange(size).split(max(1, _BLOCK // (found.shape[1] * features.shape[1]))):
        ids[rows], distances[rows] = nearest_others(features, rows, found[rows], k)
    if torch.isinf(distances).any():
        raise ConfigError(
            f"the approximate search found fewer than {k} neighbours: raise graph.exact_limit above {size}"
        )
    return ids, distances


def wanted(k: int, size: int) -> int:
    """How many to search among ``size`` points for the k nearest others of each: itself, and some to rank again."""
    return min(size, k + 1 + _SLACK)


def nearest_others(features: Features, points: Index, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the positions (m, w) that a search found for ``points`` (m,), w > k, the k nearest others, as in ``ranked``.

    By id and not by column: among exact duplicates the point itself need not come first, or at all. Ids and distances
    are (m, k), a distance infinite where nothing was found; ``features`` (N, d) are best centred.
    """
    return ranked(features, features[points], found.masked_fill(found == points[:, None], -1), k)


def ranked(base: Features, queries: Features, found: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the positions (m, w) found for queries, -1 for none, the k nearest by exact distance and id, both (m, k)."""
    near = found.sort(dim=1).values  # by id: a stable sort by distance then breaks ties by position
    exact = (base[near.clamp(min=0)] - queries[:, None]).square_().sum(-1).sqrt_()
    exact[near < 0] = torch.inf
    order = exact.argsort(dim=1, stable=True)[:, :k]
    return near.gather(1, order), exact.gather(1, order)


def _recall(features: Features, ids: Tensor, device: torch.device) -> float:
    """Share of the true neighbours found, on an evenly spaced sample of queries."""
    sample = torch.linspace(0, len(features) - 1, _RECALL_SAMPLE).long().unique()
    k = ids.shape[1]
    truth = _index_torch(features, device)(features[sample], k + 1)
    hits = sum(
        len(set(t) - {i} & set(f))
        for t, f, i in zip(truth.tolist(), ids[sample].tolist(), sample.tolist(), strict=True)
    )
    return hits / (len(sample) * k)


def _index_torch(base: Features, device: torch.device) -> Search:
    base = base.to(device)
    norms = base.square().sum(1)

    def search(queries: Features, k: int) -> Tensor:
        blocks = queries.split(max(1, _BLOCK // len(base)))
        distances = (norms - 2 * (block.to(device) @ base.T) for block in blocks)
        return torch.cat([torch.topk(part, k, dim=1, largest=False).indices for part in distances]).cpu()

    return search


def _index_faiss(base: Features, device: torch.device) -> Search:
    import faiss

    return _faiss_search(faiss.IndexFlatL2(base.shape[1]), base, device)


def _index_faiss_ivf(base: Features, device: torch.device) -> Search:
    """Inverted file with about 4 sqrt(N) lists, of which 16 are probed."""
    import faiss

    n_lists = max(1, int(4 * len(base) ** 0.5))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(base.shape[1]), base.shape[1], n_lists)
    index.nprobe = min(16, n_lists)
    return _faiss_search(index, base, device)


def _faiss_search(index: Any, base: Features, device: torch.device) -> Search:
    """The filled index as a function; where the GPU's limit on k is passed, the CPU's copy answers."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    # Without a driver any FAISS GPU call aborts the process, and its GPU k is at most 2048.
    on_gpu = device.type == "cuda" and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    if on_gpu:
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(256 << 20)
        index = faiss.index_cpu_to_gpu(resources, 0, index)
    points = base.numpy()
    if not index.is_trained:
        index.train(points)
    index.add(points)

    def search(queries: Features, k: int) -> Tensor:
        faiss.omp_set_num_threads(torch.get_num_threads())
        able = faiss.index_gpu_to_cpu(index) if on_gpu and k > 2048 else index
        found: np.ndarray = able.search(queries.numpy(), k)[1]
        return torch.from_numpy(found.astype(np.int64))

    return search


BACKENDS: dict[str, Callable[[Features, torch.device], Search]] = {"faiss": _index_faiss, "torch": _index_torch}
