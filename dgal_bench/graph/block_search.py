"""The approximate search in blocks of lists: for more points than memory holds, and resumed after a kill.

The lists, the features in their order and the answer of every block are entries of a separate cache. So each is written
whole, checked when it is read, and not made again after a kill. A block's answer depends on no other block.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench.config.schema import GraphConfig
from dgal_bench.core import cache
from dgal_bench.core.types import Features, Index, Progress
from dgal_bench.graph.ivf import InvertedLists, plan_lists, search_lists
from dgal_bench.graph.knn import EXPENSIVE, Neighbors, check_finite, knn, measure_recall, pick_backend, warn_low_recall

# Bytes of neighbours in a block, about: a block of 64-bit ids and distances is in memory twice.
_BLOCK_BYTES = 64 * 2**20
# Fewest blocks, so that a small search too shows progress.
_FEWEST = 16
# Most lists where all points are compared, and points of each up to then.
_MOST_LISTS = 1024
_LIST_POINTS = 1024
# Floats of features that are reordered at once: 32 MB.
_ROW_FLOATS = 8 * 2**20

Block = tuple[int, int]
"""Lists first..last - 1."""


def find_neighbors(
    features: Features, spec: GraphConfig, device: torch.device, root: Path, progress: Progress
) -> tuple[Neighbors, Mapping[str, Any]]:
    """The answer of ``knn``, and facts of a search of lists; on the CPU, such a search is done in blocks.

    Arguments as for ``search_in_blocks``; errors also as for ``knn``.
    """
    pick_backend(spec.backend)  # an unknown or missing one is an error, also where this search does not need it
    if device.type == "cpu" and len(features) > max(spec.exact_limit, spec.graph_k):
        return search_in_blocks(features, spec.graph_k, spec.recall_target, root, progress)
    return knn(features, spec.graph_k, spec.backend, spec.exact_limit, device, spec.recall_target), {}


def search_in_blocks(
    features: Features, k: int, recall_target: float, root: Path, progress: Progress
) -> tuple[Neighbors, Mapping[str, Any]]:
    """The answer of ``knn`` above its exact limit, and facts of the search.

    The bits of ``knn`` where it searches lists. Where ``knn`` compares all points, every list is probed here
    (``lists L/L``), and only ties may differ. Beside the answer, only some blocks of features and of answers are in
    memory; ``features`` (N, d) may be memory-mapped.

    Args:
        root: a folder for these features only; a search that was killed is resumed from it.

    Raises:
        CacheError: the folder cannot be written.
        ConfigError: ``recall_target`` is outside (0, 1], or NaN or infinity in the features.
    """
    start = perf_counter()
    name = f"lists-{k}-{recall_target:g}"
    entry = cache.get_or_make(root, name, lambda folder: _make_lists(folder, features, k, recall_target), True)
    plan, ordered = read_lists(entry)
    blocks = cut_blocks(plan, math.ceil(12 * k * len(plan.order) / _BLOCK_BYTES))
    keys = {block: cache.key_of({"lists": entry.sha256, "k": k, "block": block}) for block in blocks}

    def answer(block: Block) -> cache.Arrays:
        return cache.get_or_make(root, keys[block], lambda folder: (search_block(plan, ordered, block, k), {})).arrays

    missing = [block for block in blocks if not cache.contains(root, keys[block])]
    done = len(blocks) - len(missing)
    progress("neighbours", done, len(blocks))
    for n, block in enumerate(missing, start=done + 1):
        answer(block)
        progress("neighbours", n, len(blocks))
    ids, distances = _merge_answers(plan, k, ((block, answer(block)) for block in blocks))
    recall = measure_recall(ordered, distances[plan.order])
    facts = {"lists": plan.n_lists, "probes": plan.n_probes, "blocks": len(blocks), "expected_recall": plan.recall}
    facts["search_seconds"] = perf_counter() - start
    neighbors = Neighbors(ids, distances, f"lists {plan.n_lists}/{plan.n_probes}", recall)
    return warn_low_recall(neighbors, recall_target), facts


def read_lists(entry: cache.Entry) -> tuple[InvertedLists, Features]:
    """The lists, and the features (N, d) in their order."""
    arrays = {name: torch.from_numpy(array) for name, array in entry.arrays.items()}
    features = arrays.pop("features")
    return InvertedLists(**arrays, recall=entry.facts["recall"]), features


def cut_blocks(plan: InvertedLists, n_blocks: int) -> list[Block]:
    """About ``n_blocks`` blocks of about equal work, none with more than twice its share of the points.

    Only a larger list makes a larger block. There are at least ``_FEWEST`` blocks, if there are as many lists.
    """
    n_blocks = max(n_blocks, _FEWEST)
    compared = plan.sizes[plan.probed].sum(1)
    work = (plan.sizes * compared).double()
    share = (work / work.sum() + plan.sizes / plan.sizes.sum()).cumsum(0) / 2
    ends = (share * n_blocks).ceil().clamp(1, n_blocks).long()  # the block of each list
    inner = (torch.nonzero(ends.diff()).flatten() + 1).tolist()
    return list(zip([0, *inner], [*inner, plan.n_lists], strict=True))


def _make_lists(folder: Path, features: Features, k: int, recall_target: float) -> tuple[cache.Arrays, dict[str, Any]]:
    """The lists and the features in their order; where lists save little, some that compare all points."""
    check_finite(features)
    plan = plan_lists(features, k, recall_target)
    if plan.pairs >= EXPENSIVE * len(features) ** 2:
        plan = _all_pairs(*features.shape)
    arrays = {name: getattr(plan, name).numpy() for name in ("order", "offsets", "probed", "centroids")}
    with cache.cache_errors(folder.parent):
        arrays["features"] = _write_features(folder / "features.npy", features, plan.order)
    return arrays, {"recall": plan.recall}


def _all_pairs(size: int, width: int) -> InvertedLists:
    """Lists of consecutive points, each compared with all; the centroids are not used.

    A third slower than tiles; but in blocks, so without a copy in memory, and resumable.
    """
    n_lists = min(size, max(_FEWEST, min(_MOST_LISTS, size // _LIST_POINTS)))
    numbers = torch.arange(n_lists)
    offsets = torch.arange(n_lists + 1) * size // n_lists
    probed = (numbers[:, None] + numbers) % n_lists
    return InvertedLists(torch.arange(size), offsets, probed, torch.zeros(n_lists, width), 1.0)


def _write_features(path: Path, features: Features, order: Index) -> np.ndarray:
    """By ordinary writes: on a full disk, a write to a memory-mapped file would kill the process."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(features.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in _in_order(features, order):
            block.tofile(file)
        cache.sync(file)
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _in_order(features: Features, order: Index) -> Iterator[np.ndarray]:
    """Centred, as in ``knn``."""
    centre = features.mean(dim=0)
    for rows in order.split(max(1, _ROW_FLOATS // features.shape[1])):
        ascending = rows.sort()  # reads the disk in order
        block = torch.empty(len(rows), features.shape[1])
        block[ascending.indices] = (features[ascending.values] - centre).float()
        yield block.numpy()


def search_block(plan: InvertedLists, features: Features, block: Block, k: int) -> cache.Arrays:
    """``ids`` (m, k) int32 and ``distances`` (m, k) float32, for the points of the block in the lists' order."""
    _, ids, distances = search_lists(plan, features, *block, k)
    return {"ids": ids.int().numpy(), "distances": distances.numpy()}


def _merge_answers(plan: InvertedLists, k: int, answers: Iterable[tuple[Block, cache.Arrays]]) -> tuple[Tensor, Tensor]:
    size = len(plan.order)
    ids, distances = torch.empty(size, k, dtype=torch.int64), torch.empty(size, k)
    for (first, last), answer in answers:
        positions = plan.order[int(plan.offsets[first]) : int(plan.offsets[last])]
        ids[positions] = torch.from_numpy(answer["ids"]).long()
        distances[positions] = torch.from_numpy(answer["distances"])
    return ids, distances
