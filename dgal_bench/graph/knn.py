"""The K nearest neighbours of every point, exact or by lists of FAISS's, and an index that is searched by others."""

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
from dgal_bench.core.types import Features, Index, Progress
from dgal_bench.graph import ivf
from dgal_bench.graph.exact_knn import (
    all_exact,
    candidates,
    distance_table,
    nearest_others,
    rank_and_check,
    rank_exactly,
    search_again,
    search_width,
    widened_k,
)

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)

# Lists that an index over many points compares a query with: a graph's recall target is no matter of SEALS.
IVF_PROBES = 16
# FAISS's own limit on k and on probes on a GPU.
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
        warn_faiss_missing()
        return "torch"
    name = "faiss" if backend == "auto" else backend
    choose(BACKENDS, name, "graph.backend")
    if name == "faiss":
        _check_faiss()
    return name


@cache
def warn_faiss_missing() -> None:
    """Once a process."""
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


@cache
def _gpu_resources() -> Any:
    """One for all indexes of the process: first needed in set-up or in the rehearsal of a query, so off the clock."""
    import faiss

    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 << 20)  # by default 1.5 GB
    return resources


def _faiss_search(index: Any, base: Features, device: torch.device) -> SearchIndex:
    """The filled index as a function; above the GPU's limit on k a copy on the CPU answers."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    on_gpu = searches_on_gpu(device)
    if on_gpu:
        index = faiss.index_cpu_to_gpu(_gpu_resources(), 0, index)
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
# |x| sqrt(d) from which squared distances, and the bound of their rounding error, could exceed float32's range.
_TOO_LARGE = 1e18
# Share of all pairs from which comparing all points is faster: its tiles are larger.
_EXPENSIVE = 0.6
# Operations a second of an exact search on one thread: 60,000 x 50 takes 6.3 s on two (AMD Zen 5).
_EXACT_SPEED = 3e10


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Each point's K nearest others: ``ids`` (N, K) int64, ``distances`` (N, K) float32, Euclidean and ascending.

    A point is never its own neighbour. ``method`` is ``tiles``, ``lists L/P`` (P of L lists probed), ``faiss`` or
    ``faiss-ivf L/P``. ``recall`` is 1 for an exact search, otherwise measured against an exact search of a sample.
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
    progress: Progress = lambda what, done, of: None,
) -> Neighbors:
    """The K nearest neighbours of every point by Euclidean distance; equal distances in order of position.

    Where more points are at the K-th distance than a search compares (some beyond K), any of them may be the K-th;
    on the same device it is always the same one.

    Args:
        features: (N, d) finite floats; above ``exact_limit`` they may be memory-mapped.
        k: 1..N-1.
        backend: ``faiss``, ``torch``, or ``auto`` for the first that is installed.
        exact_limit: above this many points the search is approximate, by FAISS, where that is less work.
        device: where to search. Without a GPU that FAISS sees, an approximate search is on the CPU.
        recall_target: share of the true neighbours that an approximate search must find.
        progress: is told of blocks of the approximate search.

    Raises:
        ConfigError: k or the target out of range or not reached, NaN, infinity or too large numbers in the features,
            an unknown backend, or one that is missing and needed.
    """
    size = len(features)
    if not 1 <= k < size:
        raise ConfigError(f"graph.graph_k={k}, but {size} points have 1 to {size - 1} neighbours each")
    check_recall_target(recall_target)
    check_finite(features)
    has_faiss = pick_backend(backend) == "faiss"
    on_gpu = has_faiss and searches_on_gpu(device)
    if size > exact_limit:
        if not has_faiss:
            seconds = 2 * size**2 * features.shape[1] / _EXACT_SPEED / torch.get_num_threads()
            raise ConfigError(
                f"{size:,} points are more than graph.exact_limit={exact_limit:,}, and the approximate search is "
                "FAISS's: pip install faiss-cpu and use graph.backend=faiss, or raise graph.exact_limit for an exact "
                f"search (about {seconds:,.0f} s)"
            )
        lists = ivf.plan(features, k, recall_target)
        if lists.n_compared < _EXPENSIVE * size and not (on_gpu and lists.n_probes > _GPU_MAX_K):
            return _approximate(features, k, lists, device if on_gpu else _CPU, recall_target, progress)
    centred = _centre(features)
    if on_gpu:
        return Neighbors(*_all_exact_faiss(centred, _index_faiss(centred, device), k), "faiss", 1.0)
    with workers() as each:
        ids, distances = all_exact(centred.to(device), k, each)
    return Neighbors(ids, distances, "tiles", 1.0)


def _approximate(
    features: Features, k: int, lists: ivf.InvertedFile, device: torch.device, recall_target: float, progress: Progress
) -> Neighbors:
    if device.type == "cuda":
        method, (ids, distances) = "faiss-ivf", _approximate_on_gpu(features, k, lists, device)
    else:
        method, (ids, distances) = "lists", ivf.search(features, lists, k, progress)
    method, recall = f"{method} {lists.n_lists}/{lists.n_probes}", lists.recall(distances)
    if recall < recall_target:
        raise ConfigError(
            f"the neighbours' measured recall is {recall:.4f}, below graph.recall_target={recall_target:g} ({method}): "
            f"lower that, or raise graph.exact_limit above {len(features):,} for an exact search"
        )
    return Neighbors(ids, distances, method, recall)


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


def _centre(features: Features) -> Features:
    """Centred, so that the products of the expansion are as small as possible."""
    return (features - features.mean(dim=0)).float().contiguous()


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


def _approximate_on_gpu(
    features: Features, k: int, lists: ivf.InvertedFile, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and distances (N, k) by FAISS's own inverted file with the same lists; a point with fewer is an error."""
    import faiss

    size, n_features = features.shape
    quantizer = faiss.IndexFlatL2(n_features)
    quantizer.add(lists.centroids)
    index = faiss.IndexIVFFlat(quantizer, n_features, lists.n_lists)
    index.nprobe = lists.n_probes
    centred = lists.centred_rows(features, slice(None))
    search = _faiss_search(index, centred, device)

    def nearest(points: Index) -> tuple[Tensor, Tensor]:
        return nearest_others(centred, points, search(centred[points], search_width(k, size)), k)

    ids, distances = (torch.cat(part) for part in zip(*map(nearest, _blocks(centred)), strict=True))
    if bool(torch.isinf(distances).any()):
        raise ConfigError(
            f"the approximate search found fewer than {k} neighbours: raise graph.exact_limit above {size}"
        )
    return ids, distances


def _blocks(features: Features) -> Sequence[Index]:
    """The rows of ``features``, in blocks of at most ``_BLOCK`` numbers."""
    blocks: Sequence[Index] = torch.arange(len(features)).split(max(1, _BLOCK // features.shape[1]))
    return blocks
