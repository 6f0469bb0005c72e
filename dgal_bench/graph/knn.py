"""The K nearest neighbours of every point, and a search index: by tiles or lists of our own, or by FAISS on a GPU."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench.config.schema import check_recall_target
from dgal_bench.core.errors import ConfigError, choose
from dgal_bench.core.system import workers
from dgal_bench.core.types import Features, Index
from dgal_bench.graph.exact_knn import (
    all_exact,
    candidates,
    distance_table,
    exact,
    nearest_others,
    rank_and_check,
    rank_exactly,
    search_again,
    search_width,
    widened_k,
)
from dgal_bench.graph.ivf import InvertedLists, plan_lists, search_lists

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)

# Lists that FAISS's inverted file compares a query with, whatever the recall target.
IVF_PROBES = 16
# FAISS's own limit on k on a GPU.
_GPU_MAX_K = 2048

SearchIndex = Callable[[Features, int], Tensor]
"""(queries (m, d), k) -> (m, k) int64 positions in what was indexed, nearest first, -1 for none."""


def build_index(
    base: Features, backend: str = "auto", exact_limit: int = 200_000, device: torch.device = _CPU
) -> SearchIndex:
    """An index over ``base`` (N, d), by Euclidean distance: exact up to ``exact_limit`` points.

    FAISS searches on the GPU where it and torch see one. A point of the base is among its own neighbours, except where
    exact duplicates take its place. Errors as in ``pick_backend``.
    """
    name = pick_backend(backend)
    approximate = name == "faiss" and len(base) > exact_limit
    make = _index_faiss_ivf if approximate else BACKENDS[name]
    return make(base.float().contiguous(), device)


def pick_backend(backend: str) -> str:
    """``auto`` resolved: FAISS where installed and not on macOS (two OpenMP runtimes can crash there), else torch.

    Raises:
        ConfigError: an unknown backend, ``faiss`` where it is missing, or two packages that own its module.
    """
    if backend == "auto" and sys.platform == "darwin":
        return "torch"
    if backend == "auto" and importlib.util.find_spec("faiss") is None:
        _warn_faiss_missing()
        return "torch"
    name = "faiss" if backend == "auto" else backend
    choose(BACKENDS, name, "graph.backend")
    if name == "faiss":
        _check_faiss()
    return name


@cache
def _warn_faiss_missing() -> None:
    log.warning(
        "faiss is not installed: the torch backend builds the graph (as fast on a CPU; SEALS is slower); "
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
    """The installed distributions that own the module ``faiss``; more than one is a broken installation."""
    return tuple(sorted(set(packages_distributions().get("faiss", ()))))


def _index_torch(base: Features, device: torch.device) -> SearchIndex:
    base = base.to(device)
    centre = base.mean(0)
    columns = distance_table(base - centre)

    def search(queries: Features, k: int) -> Tensor:
        queries, w = queries.to(device), widened_k(k, len(base))
        return rank_exactly(base, queries, candidates(queries - centre, columns, w), k)[0].cpu()

    return search


def searches_on_gpu(device: torch.device) -> bool:
    """Asks torch first: without a driver any FAISS GPU call aborts the process."""
    import faiss

    return device.type == "cuda" and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def _index_faiss(base: Features, device: torch.device) -> SearchIndex:
    import faiss

    return _faiss_search(faiss.IndexFlatL2(base.shape[1]), base, device)


def _index_faiss_ivf(base: Features, device: torch.device) -> SearchIndex:
    """Inverted file with about 4 sqrt(N) lists, of which IVF_PROBES are probed."""
    import faiss

    n_lists = max(1, int(4 * len(base) ** 0.5))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(base.shape[1]), base.shape[1], n_lists)
    index.nprobe = min(IVF_PROBES, n_lists)
    return _faiss_search(index, base, device)


def _faiss_search(index: Any, base: Features, device: torch.device) -> SearchIndex:
    """The filled index as a function; above the GPU's limit on k a copy on the CPU answers."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    on_gpu = searches_on_gpu(device)
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
        searched = faiss.index_gpu_to_cpu(index) if on_gpu and k > _GPU_MAX_K else index
        ids: np.ndarray = searched.search(queries.numpy(), k)[1]
        return torch.from_numpy(ids.astype(np.int64))

    return search


BACKENDS: dict[str, Callable[[Features, torch.device], SearchIndex]] = {"faiss": _index_faiss, "torch": _index_torch}


# Numbers that are checked or copied at once: 64 MB in float32.
_BLOCK = 16_000_000
# Queries of the sample on which the recall of an approximate search is measured.
_RECALL_SAMPLE = 500
# Relative difference of two sums of the same distance by rounding: they come from different devices and products.
_ROUNDING = 1e-6
# |x| sqrt(d) from which squared distances, and the bound of their rounding error, could exceed float32's range.
_TOO_LARGE = 1e18
# Share of all pairs from which comparing all points is faster: its tiles are larger.
EXPENSIVE = 0.7


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Each point's K nearest others: ``ids`` (N, K) int64, ``distances`` (N, K) float32, Euclidean and ascending.

    A point is never its own neighbour. ``method`` is ``tiles``, ``lists L/P`` (P of L lists probed), ``faiss`` or
    ``faiss-ivf``. ``recall`` is 1 for an exact search, otherwise measured against an exact search of a sample.
    """

    ids: Tensor
    distances: Tensor
    method: str
    recall: float

    @property
    def k(self) -> int:
        return self.ids.shape[1]


def knn(
    features: Features,
    k: int,
    backend: str = "auto",
    exact_limit: int = 200_000,
    device: torch.device = _CPU,
    recall_target: float = 0.99,
) -> Neighbors:
    """The K nearest neighbours of every point by Euclidean distance; equal distances in order of position.

    Where more points are at the K-th distance than a search compares (some beyond K), any of them may be the K-th;
    on the same device it is always the same one.

    Args:
        features: (N, d) finite floats.
        k: 1..N-1.
        backend: ``faiss``, ``torch``, or ``auto`` for the first that is installed; it matters on a GPU only.
        exact_limit: above this many points the search is approximate, where that is less work.
        device: where to search.
        recall_target: share of the true neighbours that an approximate search must find; ignored by FAISS.

    Raises:
        ConfigError: k or the target out of range, NaN, infinity or too large numbers in the features, an unknown or
            missing backend.
    """
    size = len(features)
    if not 1 <= k < size:
        raise ConfigError(f"graph.graph_k={k}, but {size} points have 1 to {size - 1} neighbours each")
    check_recall_target(recall_target)
    check_finite(features)
    if pick_backend(backend) == "faiss" and searches_on_gpu(device):
        return warn_low_recall(_by_faiss(_centre(features), k, exact_limit, device), recall_target)
    if size > exact_limit:
        plan = plan_lists(features, k, recall_target)
        if plan.pairs < EXPENSIVE * size**2:
            return warn_low_recall(_by_lists(features, plan, k, device), recall_target)
    with workers() as each:
        ids, distances = all_exact(_centre(features).to(device), k, each)
    return Neighbors(ids, distances, "tiles", 1.0)


def check_finite(features: Features) -> None:
    rows = max(1, _BLOCK // features.shape[1])
    largest = features.new_empty(len(features))  # allocated first: results between blocks would keep their memory
    for block, out in zip(features.split(rows), largest.split(rows), strict=True):
        torch.amax(block.abs(), dim=1, out=out)
    if bad := int((~torch.isfinite(largest)).sum()):
        raise ConfigError(
            f"{bad} of {len(features)} feature rows hold NaN or infinity: the search would lose them silently"
        )
    if float(largest.max()) > (limit := _TOO_LARGE / features.shape[1] ** 0.5):
        raise ConfigError(
            f"features up to {float(largest.max()):.3g}: squared distances would overflow; scale them below {limit:.1g}"
        )


def warn_low_recall(neighbors: Neighbors, recall_target: float) -> Neighbors:
    """The same neighbours, after a warning where their recall is below the target."""
    if neighbors.recall < recall_target:
        fixed = f"; FAISS's index always probes {IVF_PROBES} lists" if neighbors.method == "faiss-ivf" else ""
        log.warning(
            "the neighbours' measured recall is %.4f, below graph.recall_target=%g (%s%s): raise that or "
            "graph.exact_limit", neighbors.recall, recall_target, neighbors.method, fixed,
        )  # fmt: skip
    return neighbors


def _centre(features: Features) -> Features:
    """Centred, so that the products of the expansion are as small as possible."""
    return (features - features.mean(dim=0)).float().contiguous()


def _by_lists(features: Features, plan: InvertedLists, k: int, device: torch.device) -> Neighbors:
    """With one copy of the features, in the lists' order, and the recall measured on evenly spaced rows of it."""
    size, n_features = features.shape
    centre = features.mean(dim=0)
    in_order = torch.empty(size, n_features, device=device)
    for rows in torch.arange(size).split(max(1, _BLOCK // n_features)):
        in_order[rows] = (features[plan.order[rows]] - centre).float().to(device)
    ids, distances = torch.empty(size, k, dtype=torch.int64), torch.empty(size, k)
    positions, sorted_ids, sorted_distances = search_lists(plan, in_order, 0, plan.n_lists, k)
    ids[positions], distances[positions] = sorted_ids, sorted_distances
    recall = measure_recall(in_order, sorted_distances)
    return Neighbors(ids, distances, f"lists {plan.n_lists}/{plan.n_probes}", recall)


def measure_recall(features: Features, distances: Tensor) -> float:
    """Share of ``distances`` (N, K) that are at most the true K-th distance, on an evenly spaced sample of queries."""
    sample = torch.linspace(0, len(features) - 1, _RECALL_SAMPLE).long().unique()
    with workers() as each:
        truth = exact(features, sample, distances.shape[1], each)[1]
    return float((distances[sample] <= truth[:, -1:] * (1 + _ROUNDING)).double().mean())


def _by_faiss(features: Features, k: int, exact_limit: int, device: torch.device) -> Neighbors:
    """On a GPU; ``features`` are centred."""
    size = len(features)
    search = build_index(features, "faiss", exact_limit, device)
    if size <= exact_limit:
        return Neighbors(*_all_exact_faiss(features, search, k), "faiss", 1.0)
    ids, distances = _all_approximate(features, search, k)
    return Neighbors(ids, distances, "faiss-ivf", measure_recall(features.to(device), distances))


def _all_exact_faiss(features: Features, search: SearchIndex, k: int) -> tuple[Tensor, Tensor]:
    """Ids and distances (N, k) of every point's nearest others, by a search that is exact but for rounding."""
    size = len(features)
    norms = features.norm(dim=1)

    def nearest(points: Index) -> tuple[Tensor, Tensor, Tensor]:
        queries = features[points]
        ids = search(queries, search_width(k, size))
        return rank_and_check(features, queries, points, ids, norms[points] + norms.max(), k)

    ids, distances, reach = (torch.cat(part) for part in zip(*map(nearest, _blocks(features)), strict=True))
    search_again(features, features, torch.arange(size), (ids, distances), reach, map)
    return ids, distances


def _all_approximate(features: Features, search: SearchIndex, k: int) -> tuple[Tensor, Tensor]:
    """Ids and distances (N, k) of every point's nearest others, by an approximate search."""
    size = len(features)

    def nearest(points: Index) -> tuple[Tensor, Tensor]:
        return nearest_others(features, points, search(features[points], search_width(k, size)), k)

    ids, distances = (torch.cat(part) for part in zip(*map(nearest, _blocks(features)), strict=True))
    if torch.isinf(distances).any():
        raise ConfigError(
            f"the approximate search found fewer than {k} neighbours: raise graph.exact_limit above {size}"
        )
    return ids, distances


def _blocks(features: Features) -> Sequence[Index]:
    """The rows of ``features``, in blocks of at most ``_BLOCK`` numbers."""
    blocks: Sequence[Index] = torch.arange(len(features)).split(max(1, _BLOCK // features.shape[1]))
    return blocks
