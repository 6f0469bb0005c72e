"""What benchmarks/diffusion.py times: products with the transition matrix, and restrictions, ours and theirs."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from benchmarks.repetitions import Keep, Maker
from dgal_bench.core.clock import Stopwatch
from dgal_bench.core.seeding import TieBreak, rng_for
from dgal_bench.data.pool import Pool
from dgal_bench.graph.diffusion import product, step
from dgal_bench.graph.graph import Graph
from dgal_bench.strategies.base import Query
from dgal_bench.strategies.restrict import Diffusion

OURS, BAGS, TORCH, TORCH_OURS, SCIPY = (
    "ours", "bags, natural order", "torch CSR, natural order", "torch CSR, our order", "scipy CSR, natural order",
)  # fmt: skip
FULL, INCREMENTAL, PEER = "full", "incremental", "scipy CSR and argpartition"
SEED = 0
_ROUNDING = 1e-5  # of float32 sums over some hundred terms, relative to the sum

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Natural:
    """The same matrix in the order of positions."""

    graph: Graph

    @cached_property
    def matrix(self) -> sparse.csr_array:
        graph, shape = self.graph, (self.graph.size, self.graph.size)
        parts = (graph.weights.numpy(), graph.indices.numpy(), graph.indptr.numpy())
        moved = sparse.csr_array(parts, shape=shape)[graph.nodes.numpy()]
        found = sparse.csr_array((moved.data, graph.points.numpy()[moved.indices], moved.indptr), shape=shape)
        found.sort_indices()
        return found

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        matrix = self.matrix
        return (
            torch.from_numpy(matrix.indptr.astype(np.int32)), torch.from_numpy(matrix.indices.astype(np.int32)),
            torch.from_numpy(matrix.data),
        )  # fmt: skip

    @cached_property
    def unordered(self) -> Graph:
        """The graph as if its nodes were the positions."""
        indptr, indices, weights = self.parts
        points = torch.arange(self.graph.size)
        return replace(self.graph, indptr=indptr, indices=indices, weights=weights, points=points)


def _torch_csr(indptr: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    size = len(indptr) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls them a beta
        return torch.sparse_csr_tensor(indptr, indices, weights, (size, size), check_invariants=False)


def products(natural: Natural, values: Tensor) -> dict[str, Maker]:
    """By name: what makes one M X with (N, C) values by position; ours and TORCH_OURS answer (N, C) by node.

    Each has an output of its own that was used before, as from step to step of a diffusion; scipy cannot be given one.
    """
    graph = natural.graph
    by_node, theirs = values[graph.points], values.numpy()
    ours_csr, natural_csr = _torch_csr(graph.indptr, graph.indices, graph.weights), _torch_csr(*natural.parts)
    calls: dict[str, Callable[[Tensor], Any]] = {
        OURS: lambda out: step(graph, by_node, out),
        BAGS: lambda out: step(natural.unordered, values, out),
        TORCH: lambda out: torch.mm(natural_csr, values, out=out),
        TORCH_OURS: lambda out: torch.mm(ours_csr, by_node, out=out),
    }
    makers = {name: _maker(partial(call, torch.zeros_like(values))) for name, call in calls.items()}
    return makers | {SCIPY: _maker(lambda: natural.matrix @ theirs)}


def some_values(size: int, n_classes: int) -> Tensor:
    """(N, C) from 0 to 1."""
    return torch.rand(size, n_classes, generator=torch.Generator().manual_seed(SEED))


def _maker(call: Callable[[], Any]) -> Maker:
    return lambda: call


def right_products(natural: Natural, values: Tensor) -> Keep:
    """Whether an answer of ``products`` is M X: bags to the bit in any order, the others up to float rounding."""
    truth = product(*natural.parts, values)

    def right(name: str, answer: Any) -> bool:
        found = torch.as_tensor(answer)
        found = found[natural.graph.nodes] if name in (OURS, TORCH_OURS) else found
        # sums of positive terms: each is right relative to itself
        return torch.equal(found, truth) if name in (OURS, BAGS) else torch.allclose(found, truth, 1e-5, 1e-30)

    return right


@dataclass(frozen=True, eq=False)
class Restricted:
    """Candidates (m,), the seconds of each phase, and the share of the edges that were multiplied."""

    candidates: Tensor
    seconds: Mapping[str, float]
    touched: float


def pool_of(size: int, n_classes: int, n_labeled: int) -> Pool:
    order = torch.from_numpy(rng_for(SEED, "benchmark labels", size).permutation(size)[:n_labeled])
    return Pool(size, n_classes, order, order % n_classes)


def restrict(strategy: Diffusion, pool: Pool, memory: Mapping[str, Any]) -> tuple[Restricted, Mapping[str, Any]]:
    """A restriction as a query makes it, on the query's clock; and what it leaves for the next."""
    clock = Stopwatch()
    query = Query(pool, None, None, None, TieBreak(SEED, pool.size), clock, memory=memory)  # type: ignore[arg-type]
    with clock.running(), clock.phase("select"):
        candidates = strategy(query)
    return Restricted(candidates, dict(clock.seconds), query.notes["touched"]()), query.remembered


def restrictions(natural: Natural, first: Pool, pool: Pool, size: int) -> dict[str, Maker]:
    """By name: what makes one restriction of ``pool`` to ``size`` candidates, ``first`` being the last round's pool."""
    graph = natural.graph
    goes_on, anew = Diffusion(graph, size), Diffusion(graph, size, memory_limit=0)

    def incremental() -> Callable[[], Restricted]:
        _, memory = restrict(goes_on, first, {})
        return lambda: restrict(goes_on, pool, memory)[0]

    return {
        FULL: _maker(lambda: restrict(anew, pool, {})[0]),
        INCREMENTAL: incremental,
        PEER: _maker(lambda: _by_scipy(natural.matrix, pool, size, graph.default_steps)),
    }


def _by_scipy(matrix: sparse.csr_array, pool: Pool, size: int, steps: int) -> Restricted:
    """As anybody writes it; where scores are equal it takes whichever come."""
    labeled, unlabeled = pool.labeled.numpy(), pool.unlabeled.numpy()
    clock = Stopwatch()
    with clock.phase("diffuse"):
        heat = np.zeros((pool.size, pool.n_classes), dtype=np.float32)
        heat[labeled, pool.labels.numpy()] = 1
        seeds = heat[labeled]
        for _ in range(steps):
            heat = matrix @ heat
            heat[labeled] = seeds
    with clock.phase("select"):
        scores = np.abs(2 * heat - heat.sum(axis=1, keepdims=True)).min(axis=1)[unlabeled]
        places = np.argpartition(scores, size)[:size]
        candidates = unlabeled[places[np.argsort(scores[places])]]
    return Restricted(torch.from_numpy(candidates), dict(clock.seconds), 1.0)


def right_candidates(natural: Natural, pool: Pool, size: int) -> Callable[[str, Restricted], bool]:
    """Whether a restriction is right: ours to the id, in order; anybody's up to what float sums leave open.

    The truth is scipy's product in float64. A score is a difference of parts of the mass h, so it is known up to
    rounding relative to h: a point may be picked that may be among the ``size`` lowest, and must be that surely is.
    """
    scores, mass = precise(natural, pool)
    open_N = _ROUNDING * mass
    unlabeled = pool.unlabeled.numpy()
    low_N, high_N = scores - open_N, scores + open_N
    least, most = (np.partition(one[unlabeled], size - 1)[size - 1] for one in (low_N, high_N))
    sure = unlabeled[high_N[unlabeled] < least]
    ours = restrict(Diffusion(natural.graph, size, memory_limit=0), pool, {})[0].candidates

    def right(name: str, answer: Restricted) -> bool:
        picks = answer.candidates.numpy()
        fit = len(np.unique(picks)) == len(picks) == size and bool(np.isin(picks, unlabeled).all())
        low = fit and bool((low_N[picks] <= most).all()) and bool(np.isin(sure, picks).all())
        return low and (name == PEER or torch.equal(answer.candidates, ours))

    return right


def precise(natural: Natural, pool: Pool) -> tuple[Floats, Floats]:
    """(N,) scores and (N,) mass by position, in float64 from start to end."""
    matrix, labeled = natural.matrix.astype(np.float64), pool.labeled.numpy()
    heat = np.zeros((pool.size, pool.n_classes))
    heat[labeled, pool.labels.numpy()] = 1
    seeds = heat[labeled]
    for _ in range(natural.graph.default_steps):
        heat = matrix @ heat
        heat[labeled] = seeds
    mass = heat.sum(axis=1)
    return np.abs(2 * heat - mass[:, None]).min(axis=1), mass
