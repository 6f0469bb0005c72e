"""One contender of graph_build.py in a process of its own: ``python -m benchmarks.graph_build_worker REQUEST``."""

import json
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.floors import search_operations, sgemm_rate
from benchmarks.machine import cores_of_others, peak_beyond, reset_peak, return_free_memory
from benchmarks.points import Floats, points
from dgal_bench.core.system import workers
from dgal_bench.graph.exact_knn import exact
from dgal_bench.graph.knn import Neighbors, knn

_WARM = 2000
_SAMPLE = 1000  # queries whose true neighbours are looked up
_PATIENCE = 40.0  # seconds of a contender after which it is not asked again

Answer = tuple[Any, float, str]
"""Ids (m, K or K + 1) of every point or of the sample asked, seconds, and a remark."""


def ours(features: Floats, request: Mapping[str, Any], exact_limit: int) -> Answer:
    start = perf_counter()
    found: Neighbors = knn(
        torch.from_numpy(features), request["k"], exact_limit=exact_limit, recall_target=request["recall_target"]
    )
    return found.ids.numpy(), perf_counter() - start, found.method


def tiles(features: Floats, request: Mapping[str, Any]) -> Answer:
    return ours(features, request, len(features))


def lists(features: Floats, request: Mapping[str, Any]) -> Answer:
    return ours(features, request, 1)


def flat(features: Floats, request: Mapping[str, Any]) -> Answer:
    import faiss

    return _faiss(faiss.IndexFlatL2(features.shape[1]), features, request, "")


def ivf(features: Floats, request: Mapping[str, Any]) -> Answer:
    """As many lists and probes as ours, searched query by query; a sample of the queries where one is asked for."""
    import faiss

    n_lists, n_probes = request["lists"]
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(features.shape[1]), features.shape[1], n_lists)
    index.nprobe = n_probes
    return _faiss(index, features, request, f"{n_lists}/{n_probes}")


def hnsw(features: Floats, request: Mapping[str, Any]) -> Answer:
    import faiss

    index = faiss.IndexHNSWFlat(features.shape[1], 16)
    index.hnsw.efSearch = 64
    return _faiss(index, features, request, "M 16, ef 64")


def _faiss(index: Any, features: Floats, request: Mapping[str, Any], remark: str) -> Answer:
    import faiss

    faiss.omp_set_num_threads(request["threads"])
    start = perf_counter()
    index.train(features)
    index.add(features)
    built = perf_counter() - start
    rows = sampled(len(features), request["sample"])
    start = perf_counter()
    found = index.search(features[rows], request["k"] + 1)[1]
    share = len(rows) / len(features)
    note = f"{remark}, extrapolated from {len(rows):,} queries" if share < 1 else remark
    return found, built + (perf_counter() - start) / share, note


def hnswlib(features: Floats, request: Mapping[str, Any]) -> Answer:
    import hnswlib as peer

    start = perf_counter()
    index = peer.Index("l2", features.shape[1])
    index.init_index(len(features), M=16, ef_construction=100)
    index.set_num_threads(request["threads"])
    index.add_items(features)
    index.set_ef(64)
    return index.knn_query(features, request["k"] + 1)[0], perf_counter() - start, "M 16, ef 64"


def pynndescent(features: Floats, request: Mapping[str, Any]) -> Answer:
    """Compiled by the call that comes before: that takes tens of seconds."""
    import pynndescent as peer

    start = perf_counter()
    made = peer.NNDescent(features, n_neighbors=request["k"] + 1, random_state=0, n_jobs=request["threads"])
    return made.neighbor_graph[0], perf_counter() - start, "compiled before"


def graphlearning(features: Floats, request: Mapping[str, Any]) -> Answer:
    """By its default, annoy, where that is installed, else by the other way it has; on one thread."""
    import graphlearning as peer

    method = "annoy" if find_spec("annoy") else "kdtree"
    start = perf_counter()
    found, _ = peer.weightmatrix.knnsearch(features, request["k"] + 1, method=method)
    return found, perf_counter() - start, f"{method}, on one thread"


CONTENDERS: Mapping[str, Callable[[Floats, Mapping[str, Any]], Answer]] = {
    "tiles": tiles, "lists": lists, "flat": flat, "ivf": ivf, "hnsw": hnsw,
    "hnswlib": hnswlib, "pynndescent": pynndescent, "graphlearning": graphlearning,
}  # fmt: skip
PACKAGES = dict.fromkeys(("flat", "ivf", "hnsw"), "faiss")


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    name = request["contender"]
    if name not in ("tiles", "lists") and find_spec(PACKAGES.get(name, name)) is None:
        return {"status": "left_out", "error": "not installed", "peak_mb": None}
    torch.set_num_threads(request["threads"])
    features = points(request["kind"], request["points"], request["features"])
    # What a process pays once, such as imports, is no part of a search.
    CONTENDERS[name](features[:_WARM], {**request, "sample": None, "lists": (1, 1)})
    floor = search_operations(*features.shape) / sgemm_rate(features.shape[1])
    return_free_memory()
    before, others = reset_peak(), cores_of_others()
    all_seconds: list[float] = []
    while len(all_seconds) < request["repeats"] and sum(all_seconds) < _PATIENCE:
        found = None  # the last answer is no part of this one's peak
        found, seconds, remark = CONTENDERS[name](features, request)
        all_seconds.append(seconds)
    busy, peak = others(), peak_beyond(before)
    ids = np.asarray(found).astype(np.int64)
    share = recall(features, ids, request["k"], request["sample"] if len(ids) < len(features) else None)
    is_list = remark.startswith("lists ")
    return {
        "status": "measured", "seconds": median(all_seconds), "all_seconds": all_seconds, "remark": remark,
        "recall": share, "peak_mb": peak, "floor_seconds": floor, "cores_of_others": busy,
        "wrong": name in ("tiles", "flat") and share < 0.999,
        "lists": [int(word) for word in remark.split()[1].split("/")] if is_list else None,
    }  # fmt: skip


def sampled(size: int, sample: int | None) -> np.ndarray:
    """Evenly spaced rows: all where no sample is asked for."""
    return np.unique(np.linspace(0, size - 1, min(sample or size, size)).astype(np.int64))


def recall(features: Floats, ids: np.ndarray, k: int, sample: int | None) -> float:
    """Share of the true neighbours of some points among their ``ids``, a row for each point or for each sampled one."""
    asked = sampled(len(features), sample)
    rows = sampled(len(asked), _SAMPLE)
    return share_found(true_neighbors(features, asked[rows], k), ids[rows])


def true_neighbors(features: Floats, some: np.ndarray, k: int) -> np.ndarray:
    with workers() as each:
        truth: np.ndarray = exact(torch.from_numpy(features), torch.from_numpy(some), k, each)[0].numpy()
    return truth


def share_found(truth: np.ndarray, ids: np.ndarray) -> float:
    return float((ids[:, None] == truth[:, :, None]).any(2).mean())


def main() -> None:
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    main()
