"""Who answers queries against a base: FAISS where it is installed (on the GPU where it and torch see one), or torch."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import packages_distributions
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench.arrays import Features
from dgal_bench.errors import ConfigError, choose
from dgal_bench.graph.rerank import beyond, ranked
from dgal_bench.graph.tiles import candidates, table

# Lists that FAISS's inverted file compares a query with, whatever recall is asked for.
IVF_PROBES = 16
# FAISS's own limit on k on a GPU.
_GPU_MOST = 2048

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)

Search = Callable[[Features, int], Tensor]
"""(queries (m, d), k) -> (m, k) int64 positions in what was indexed, nearest first, -1 for none."""


def new_index(base: Features, backend: str = "auto", exact_limit: int = 200_000, device: torch.device = _CPU) -> Search:
    """An index over ``base`` (N, d), by Euclidean distance: exact up to ``exact_limit`` points.

    A point of the base is found among its own neighbours, except where exact duplicates stand in for it. Errors as in
    ``pick_backend``.
    """
    name = pick_backend(backend)
    approximate = name == "faiss" and len(base) > exact_limit
    make = _index_faiss_ivf if approximate else BACKENDS[name]
    return make(base.float().contiguous(), device)


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
    """The installed distributions that own the module ``faiss``: one, or something is wrong."""
    return tuple(sorted(set(packages_distributions().get("faiss", ()))))


def _index_torch(base: Features, device: torch.device) -> Search:
    base = base.to(device)
    centre = base.mean(0)
    columns = table(base - centre)

    def search(queries: Features, k: int) -> Tensor:
        queries, w = queries.to(device), beyond(k, len(base))
        return ranked(base, queries, candidates(queries - centre, columns, w), k)[0].cpu()

    return search


def searches_on_gpu(device: torch.device) -> bool:
    """Without a driver any FAISS GPU call aborts the process."""
    import faiss

    return device.type == "cuda" and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def _index_faiss(base: Features, device: torch.device) -> Search:
    import faiss

    return _faiss_search(faiss.IndexFlatL2(base.shape[1]), base, device)


def _index_faiss_ivf(base: Features, device: torch.device) -> Search:
    """Inverted file with about 4 sqrt(N) lists, of which IVF_PROBES are probed."""
    import faiss

    n_lists = max(1, int(4 * len(base) ** 0.5))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(base.shape[1]), base.shape[1], n_lists)
    index.nprobe = min(IVF_PROBES, n_lists)
    return _faiss_search(index, base, device)


def _faiss_search(index: Any, base: Features, device: torch.device) -> Search:
    """The filled index as a function; where the GPU's limit on k is passed, the CPU's copy answers."""
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
        able = faiss.index_gpu_to_cpu(index) if on_gpu and k > _GPU_MOST else index
        found: np.ndarray = able.search(queries.numpy(), k)[1]
        return torch.from_numpy(found.astype(np.int64))

    return search


BACKENDS: dict[str, Callable[[Features, torch.device], Search]] = {"faiss": _index_faiss, "torch": _index_torch}
