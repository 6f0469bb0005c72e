"""The approximate search in blocks of lists: more points than memory holds, and what is done is done for good.

The lists, the features in their order and the answer of every block are entries of a cache of their own. So each is
written whole, checked when it is read, and not made again by a try that goes on after another was killed. A block's
answer depends not on the other blocks, nor, on CPUs of one kind, on who gives it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgal_bench.config.schema import GraphConfig
from dgal_bench.core import cache
from dgal_bench.core.errors import CacheError
from dgal_bench.core.types import Features, Index, Progress
from dgal_bench.graph.ivf import InvertedLists, plan_lists, search_lists
from dgal_bench.graph.knn import EXPENSIVE, Neighbors, check_finite, knn, measure_recall, pick_backend, warn_low_recall

# Bytes of neighbours that a block may have, about: a block of 64-bit ids and distances is in memory twice.
_BLOCK_BYTES = 64 * 2**20
# So that a small search shows how far it is, and can be shared.
_FEWEST = 16
# Lists where all points are compared, and the points of each before there are that many.
_MOST_LISTS = 1024
_LIST_POINTS = 1024
# Floats of features that are put in order at once: 32 MB.
_ROW_FLOATS = 8 * 2**20

Block = tuple[int, int]
"""Lists first..last - 1."""


@dataclass(frozen=True)
class BlockSearch:
    """What answers a block, on any machine that has the lists in the cache at ``root``.

    ``lists`` is the entry with them and the features in their order; ``sha256`` is its own: another machine's k-means
    may have other bits, and so other lists under that name.
    """

    root: Path
    lists: str
    sha256: str
    k: int

    @property
    def ready(self) -> bool:
        """Whether these lists are there."""
        with suppress(OSError, ValueError):
            return cache.open_entry(self.root / self.lists, mapped=True).sha256 == self.sha256
        return False

    def __call__(self, block: Block) -> cache.Arrays:
        """``ids`` (m, k) int32 and ``distances`` (m, k) float32, for the points of the block in the lists' order.

        Raises:
            CacheError: there are other lists.
        """
        entry = cache.open_entry(self.root / self.lists, mapped=True)
        if entry.sha256 != self.sha256:
            raise CacheError(f"{self.root / self.lists} has come to hold other lists: start the command again")
        plan, features = read_lists(entry)
        _, ids, distances = search_lists(plan, features, *block, self.k)
        return {"ids": ids.int().numpy(), "distances": distances.numpy()}


BlockExecutor = Callable[[BlockSearch, Sequence[Block]], Iterable[tuple[Block, cache.Arrays]]]
"""Answers blocks, here or in other processes; yields each block once, with its answer, in any order."""


def execute_serially(search: BlockSearch, blocks: Sequence[Block]) -> Iterator[tuple[Block, cache.Arrays]]:
    """In this process, one after the other."""
    return ((block, search(block)) for block in blocks)


def neighbors_of(
    features: Features,
    spec: GraphConfig,
    device: torch.device,
    root: Path,
    progress: Progress,
    executor: BlockExecutor = execute_serially,
) -> tuple[Neighbors, Mapping[str, Any]]:
    """What ``knn`` finds, and facts of a search of lists: in blocks, wherever that is done on the CPU.

    Arguments as for ``search_in_blocks``; errors also as for ``knn``.
    """
    pick_backend(spec.backend)  # an unknown or missing one is said, whether or not this search needs it
    if device.type == "cpu" and len(features) > max(spec.exact_limit, spec.graph_k):
        return search_in_blocks(features, spec.graph_k, spec.recall_target, root, progress, executor)
    return knn(features, spec.graph_k, spec.backend, spec.exact_limit, device, spec.recall_target), {}


def search_in_blocks(
    features: Features,
    k: int,
    recall_target: float,
    root: Path,
    progress: Progress,
    executor: BlockExecutor = execute_serially,
) -> tuple[Neighbors, Mapping[str, Any]]:
    """What ``knn`` finds above its exact limit, and facts of the search.

    The bits of ``knn`` where that searches lists. Where it compares all points so are they here, by lists of which all
    are probed (``lists L/L``): the same bits up to ties. Beside the answer, some blocks of features and of answers are
    in memory; ``features`` (N, d) may be mapped.

    Args:
        root: a folder for these features only, where a search that was killed has left what this one goes on from.
        executor: answers the blocks that are still to do.

    Raises:
        CacheError: the folder cannot be written.
        ConfigError: ``recall_target`` is no share, or NaN or infinity in the features.
    """
    start = perf_counter()
    with cache.record_keys():  # the entries are nobody's but ours
        name = f"lists-{k}-{recall_target:g}"
        entry = cache.get_or_make(root, name, lambda folder: _make_lists(folder, features, k, recall_target), True)
        plan, ordered = read_lists(entry)
        blocks = cut_blocks(plan, math.ceil(12 * k * len(plan.order) / _BLOCK_BYTES))
        keys = {block: cache.key_of({"lists": entry.sha256, "k": k, "block": block}) for block in blocks}
        search = BlockSearch(root, name, entry.sha256, k)
        left = [block for block in blocks if not cache.contains(root, keys[block])]
        done = len(blocks) - len(left)
        progress("neighbours", done, len(blocks))
        for n, (block, answer) in enumerate(executor(search, left), start=done + 1):
            _keep(root, keys[block], _check_answer(answer, plan, block, k))
            progress("neighbours", n, len(blocks))
        ids, distances = _merge_answers(plan, k, ((block, _answer(search, keys[block], block)) for block in blocks))
    recall = measure_recall(ordered, distances[plan.order])
    facts = {"lists": plan.n_lists, "probes": plan.n_probes, "blocks": len(blocks), "expected_recall": plan.recall}
    facts["search_seconds"] = perf_counter() - start
    found = Neighbors(ids, distances, f"lists {plan.n_lists}/{plan.n_probes}", recall)
    return warn_low_recall(found, recall_target), facts


def read_lists(entry: cache.Entry) -> tuple[InvertedLists, Features]:
    """The plan, and the features (N, d) in its order."""
    arrays = {name: torch.from_numpy(array) for name, array in entry.arrays.items()}
    features = arrays.pop("features")
    return InvertedLists(**arrays, recall=entry.facts["recall"]), features


def cut_blocks(plan: InvertedLists, n_blocks: int) -> list[Block]:
    """About so many blocks, of about equal shares of the work and none with over twice its share of the points.

    Only a list that is larger makes a larger block. Where few blocks are asked for there are more, and where lists are
    few there are fewer.
    """
    n_blocks = max(n_blocks, _FEWEST)
    compared = plan.sizes[plan.probed].sum(1)
    work = (plan.sizes * compared).double()
    share = (work / work.sum() + plan.sizes / plan.sizes.sum()).cumsum(0) / 2
    ends = (share * n_blocks).ceil().clamp(1, n_blocks).long()  # to which block each list belongs
    inner = (torch.nonzero(ends.diff()).flatten() + 1).tolist()
    return list(zip([0, *inner], [*inner, plan.n_lists], strict=True))


def _make_lists(folder: Path, features: Features, k: int, recall_target: float) -> tuple[cache.Arrays, dict[str, Any]]:
    """The plan, and the features in its order; where it saves little, one that compares all points."""
    check_finite(features)
    plan = plan_lists(features, k, recall_target)
    if plan.pairs >= EXPENSIVE * len(features) ** 2:
        plan = _all_pairs(*features.shape)
    arrays = {name: getattr(plan, name).numpy() for name in ("order", "offsets", "probed", "centroids")}
    with cache.cache_errors(folder.parent):
        arrays["features"] = _write_features(folder / "features.npy", features, plan.order)
    return arrays, {"recall": plan.recall}


def _all_pairs(size: int, width: int) -> InvertedLists:
    """Lists of points as they lie, each compared with all: nobody asks for their centroids.

    As fast as tiles but for a third; and in blocks, so without a copy in memory, and to go on from.
    """
    n_lists = min(size, max(_FEWEST, min(_MOST_LISTS, size // _LIST_POINTS)))
    numbers = torch.arange(n_lists)
    offsets = torch.arange(n_lists + 1) * size // n_lists
    probed = (numbers[:, None] + numbers) % n_lists
    return InvertedLists(torch.arange(size), offsets, probed, torch.zeros(n_lists, width), 1.0)


def _write_features(path: Path, features: Features, order: Index) -> np.ndarray:
    """By ordinary writes: where a disk is full, one to a memory-mapped file would end the process."""
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
        ascending = rows.sort()  # a disk is read from front to back
        block = torch.empty(len(rows), features.shape[1])
        block[ascending.indices] = (features[ascending.values] - centre).float()
        yield block.numpy()


def _check_answer(answer: cache.Arrays, plan: InvertedLists, block: Block, k: int) -> cache.Arrays:
    """An answer of the right shape; what is kept is kept for good."""
    first, last = block
    expected = (int(plan.offsets[last] - plan.offsets[first]), k)
    if any(answer[name].shape != expected for name in ("ids", "distances")):
        raise CacheError(f"a block of the neighbours came with another shape than {expected}: start the command again")
    return answer


def _keep(root: Path, key: str, answer: cache.Arrays) -> cache.Entry:
    return cache.get_or_make(root, key, lambda folder: (answer, {}))


def _answer(search: BlockSearch, key: str, block: Block) -> cache.Arrays:
    """As it was kept; one that is damaged is given again."""
    return cache.get_or_make(search.root, key, lambda folder: (search(block), {})).arrays


def _merge_answers(plan: InvertedLists, k: int, answers: Iterable[tuple[Block, cache.Arrays]]) -> tuple[Tensor, Tensor]:
    size = len(plan.order)
    ids, distances = torch.empty(size, k, dtype=torch.int64), torch.empty(size, k)
    for (first, last), answer in answers:
        positions = plan.order[int(plan.offsets[first]) : int(plan.offsets[last])]
        ids[positions] = torch.from_numpy(answer["ids"]).long()
        distances[positions] = torch.from_numpy(answer["distances"])
    return ids, distances
