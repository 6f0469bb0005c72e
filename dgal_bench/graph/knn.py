"""The K nearest neighbours of every point: by tiles or lists of our own, or by FAISS on a GPU that it and torch see."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgal_bench.arrays import Features, Index
from dgal_bench.checks import check_recall_target
from dgal_bench.errors import ConfigError
from dgal_bench.graph.backends import IVF_PROBES, Search, new_index, pick_backend, searches_on_gpu
from dgal_bench.graph.exact import all_exact, exact, search_again, with_doubts
from dgal_bench.graph.lists import Lists, search_lists
from dgal_bench.graph.planning import plan_lists
from dgal_bench.graph.rerank import nearest_others, wanted
from dgal_bench.threads import workers

# Numbers that are looked at or copied at once: 64 MB in float32.
_BLOCK = 16_000_000
# Queries of the sample on which the recall of an approximate search is measured.
_RECALL_SAMPLE = 500
# Two sums of the same distance may differ by some units of rounding: they come from different devices and products.
_ROUNDING = 1e-6
# |x| sqrt(d) from which on squared distances, and what bounds their rounding, could pass float32's largest number.
_TOO_LARGE = 1e18
# Of all pairs, from which on comparing all is the faster search: its tiles are larger.
DEAR = 0.7

_CPU = torch.device("cpu")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Each point's K nearest others: ``ids`` (N, K) int64, ``distances`` (N, K) float32, Euclidean and ascending.

    A point is never its own neighbour. ``method`` says what searched: ``tiles``, ``lists L/P`` (P of L lists probed),
    ``faiss`` or ``faiss-ivf``. ``recall`` is 1 for an exact search, otherwise measured against one on a sample.
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

    Which of several points that are equally far is the K-th is free where they are more than a search looks at, some
    beyond K. It is always the same one on the same device.

    Args:
        features: (N, d) finite floats.
        k: 1..N-1.
        backend: ``faiss``, ``torch``, or ``auto`` for the first that is there; it makes a difference on a GPU only.
        exact_limit: above this many points the search is approximate, where that is less work.
        device: where to search.
        recall_target: share of the true neighbours that an approximate search shall find; FAISS's does not ask.

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
        return with_warning(_by_faiss(_centred(features), k, exact_limit, device), recall_target)
    if size > exact_limit:
        plan = plan_lists(features, k, recall_target)
        if plan.pairs < DEAR * size**2:
            return with_warning(_by_lists(features, plan, k, device), recall_target)
    with workers() as each:
        ids, distances = all_exact(_centred(features).to(device), k, each)
    return Neighbors(ids, distances, "tiles", 1.0)


def check_finite(features: Features) -> None:
    rows = max(1, _BLOCK // features.shape[1])
    largest = features.new_empty(len(features))  # made first: small answers between blocks would keep each of them
    for block, answer in zip(features.split(rows), largest.split(rows), strict=True):
        torch.amax(block.abs(), dim=1, out=answer)
    if bad := int((~torch.isfinite(largest)).sum()):
        raise ConfigError(
            f"{bad} of {len(features)} feature rows hold NaN or infinity: the search would lose them silently"
        )
    if float(largest.max()) > (limit := _TOO_LARGE / features.shape[1] ** 0.5):
        raise ConfigError(
            f"features up to {float(largest.max()):.3g}: squared distances would overflow; scale them below {limit:.1g}"
        )


def with_warning(neighbors: Neighbors, recall_target: float) -> Neighbors:
    """As they are; a recall below the target is said."""
    if neighbors.recall < recall_target:
        fixed = f"; FAISS's index always probes {IVF_PROBES} lists" if neighbors.method == "faiss-ivf" else ""
        log.warning(
            "the neighbours' measured recall is %.4f, below graph.recall_target=%g (%s%s): raise that or "
            "graph.exact_limit", neighbors.recall, recall_target, neighbors.method, fixed,
        )  # fmt: skip
    return neighbors


def _centred(features: Features) -> Features:
    """Centred, the products of the expansion are as small as they can be."""
    return (features - features.mean(dim=0)).float().contiguous()


def _by_lists(features: Features, plan: Lists, k: int, device: torch.device) -> Neighbors:
    """With one copy of the features, in the lists' order, and the recall measured on every n-th of its rows."""
    size, n_features = features.shape
    centre = features.mean(dim=0)
    in_order = torch.empty(size, n_features, device=device)
    for rows in torch.arange(size).split(max(1, _BLOCK // n_features)):
        in_order[rows] = (features[plan.order[rows]] - centre).float().to(device)
    ids, distances = torch.empty(size, k, dtype=torch.int64), torch.empty(size, k)
    positions, found, lengths = search_lists(plan, in_order, 0, plan.n_lists, k)
    ids[positions], distances[positions] = found, lengths
    return Neighbors(ids, distances, f"lists {plan.n_lists}/{plan.n_probes}", measured_recall(in_order, lengths))


def measured_recall(features: Features, distances: Tensor) -> float:
    """Share of the found neighbours (N, K) that are as near as the true ones, on an evenly spaced sample of queries."""
    sample = torch.linspace(0, len(features) - 1, _RECALL_SAMPLE).long().unique()
    with workers() as each:
        truth = exact(features, sample, distances.shape[1], each)[1]
    return float((distances[sample] <= truth[:, -1:] * (1 + _ROUNDING)).double().mean())


def _by_faiss(features: Features, k: int, exact_limit: int, device: torch.device) -> Neighbors:
    """On a GPU, of centred features."""
    size = len(features)
    search = new_index(features, "faiss", exact_limit, device)
    if size <= exact_limit:
        return Neighbors(*_all_found(features, search, k), "faiss", 1.0)
    ids, distances = _without_self(features, search, k)
    return Neighbors(ids, distances, "faiss-ivf", measured_recall(features.to(device), distances))


def _all_found(features: Features, search: Search, k: int) -> tuple[Tensor, Tensor]:
    """Ids and distances (N, k) of every point's nearest others, by a search that is exact but for its products."""
    size = len(features)
    norms = features.norm(dim=1)

    def nearest(points: Index) -> tuple[Tensor, Tensor, Tensor]:
        queries = features[points]
        found = search(queries, wanted(k, size))
        return with_doubts(features, queries, points, found, norms[points] + norms.max(), k)

    ids, distances, doubt = (torch.cat(part) for part in zip(*map(nearest, _blocks(features)), strict=True))
    search_again(features, features, torch.arange(size), (ids, distances), doubt, map)
    return ids, distances


def _without_self(features: Features, search: Search, k: int) -> tuple[Tensor, Tensor]:
    """The same as an approximate search finds them."""
    size = len(features)

    def nearest(points: Index) -> tuple[Tensor, Tensor]:
        return nearest_others(features, points, search(features[points], wanted(k, size)), k)

    ids, distances = (torch.cat(part) for part in zip(*map(nearest, _blocks(features)), strict=True))
    if torch.isinf(distances).any():
        raise ConfigError(
            f"the approximate search found fewer than {k} neighbours: raise graph.exact_limit above {size}"
        )
    return ids, distances


def _blocks(features: Features) -> Sequence[Index]:
    """The rows of ``features``, as many at a time as may be looked at."""
    blocks: Sequence[Index] = torch.arange(len(features)).split(max(1, _BLOCK // features.shape[1]))
    return blocks
