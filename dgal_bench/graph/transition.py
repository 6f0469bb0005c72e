"""From neighbours to the transition matrix M = D^-1 W of the random walk (paper 4.1, eq. 2), and images tied to it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dgal_bench.arrays import Features
from dgal_bench.errors import ConfigError, choose
from dgal_bench.graph.knn import Neighbors, nearest, ranked, wanted

# The neighbour whose distance is a point's local scale (Zelnik-Manor and Perona, 2004).
_SCALE_NEIGHBOR = 7
# Below exp(-80) float32 would round weights to 0 and a row could lose them all.
_MAX_EXPONENT = 80.0
# Elements of one block of differences between images and pool points: 64 MB in float32.
_BLOCK = 16_000_000


@dataclass(frozen=True, eq=False)
class Graph:
    """The transition matrix M in CSR form: row i holds ``indices[indptr[i]:indptr[i+1]]`` with ``weights``.

    float32 weights that sum to 1 in every row that has any; int32 positions where they fit. ``degrees`` (N,) float64
    are the row sums D of the affinity W = D M; ``symmetric`` says whether W equals its transpose.
    """

    indptr: Tensor
    indices: Tensor
    weights: Tensor
    degrees: Tensor
    graph_k: int
    symmetric: bool

    @property
    def size(self) -> int:
        return len(self.indptr) - 1

    @property
    def default_steps(self) -> int:
        """T = ceil(log_K N): a walk that covers most of the graph (paper, App. B); K = 1 counts as 2."""
        return max(1, ceil(log(self.size) / log(max(2, self.graph_k)) - 1e-12))

    def to(self, device: torch.device) -> "Graph":
        parts = {name: getattr(self, name).to(device) for name in ("indptr", "indices", "weights", "degrees")}
        return replace(self, **parts)

    def neighbors(self, point: int) -> Tensor:
        """int64 positions that share an edge out of ``point``."""
        return self.indices[self.indptr[point] : self.indptr[point + 1]].long()


@dataclass(frozen=True, eq=False)
class Attachment:
    """How n images outside the graph hang on it: ``ids`` (n, K) int64, the points of the pool nearest to each.

    ``weights`` (n, K) float32: the kernel's, made to sum to 1 in every row.
    """

    ids: Tensor
    weights: Tensor


def typical_scale(distances_NK: Tensor) -> float:
    """The median local scale of points at ascending distances from their neighbours; 1 where all are duplicates."""
    raw = _raw_scales(distances_NK)
    finite = raw[torch.isfinite(raw)]
    return float(finite.median()) if len(finite) else 1.0


def local_scales(distances_nK: Tensor, typical: float) -> Tensor:
    """(n,) distances to the 7th neighbour (or the last), never below 1e-3 of the ``typical`` scale.

    Where duplicates make that distance 0 the next positive one counts, and the typical one where there is none: with
    the floor alone a pile of duplicates would weigh its edges to the rest exp(-1000) and become an island.
    """
    raw = _raw_scales(distances_nK)
    return torch.where(torch.isfinite(raw), raw, torch.full_like(raw, typical)).clamp(min=1e-3 * typical)


def _raw_scales(distances_nK: Tensor) -> Tensor:
    """Infinite where all neighbours are duplicates."""
    seventh = distances_nK[:, min(_SCALE_NEIGHBOR, distances_nK.shape[1]) - 1]
    beyond = distances_nK.masked_fill(distances_nK <= 0, torch.inf).amin(dim=1)
    return torch.where(seventh > 0, seventh, beyond)


def local_scaling(distances_nK: Tensor, scales_nK: Tensor) -> Tensor:
    """exp(-d_ij^2 / (s_i s_j)), s the local scales."""
    return _exp_minus(distances_nK.square() / scales_nK)


def gaussian_k(distances_nK: Tensor, scales_nK: Tensor) -> Tensor:
    """exp(-4 d_ij^2 / d_K(i)^2), d_K the distance to the last neighbour."""
    last = distances_nK[:, -1:]
    return _exp_minus(4 * (distances_nK / torch.where(last > 0, last, torch.ones_like(last))).square())


def uniform(distances_nK: Tensor, scales_nK: Tensor) -> Tensor:
    """1 for every edge."""
    return torch.ones_like(distances_nK)


def _exp_minus(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=_MAX_EXPONENT).neg().exp()


Kernel = Callable[[Tensor, Tensor], Tensor]
"""(ascending distances (n, K), products s_i s_j of the local scales at both ends (n, K)) -> weights (n, K)."""

KERNELS: dict[str, Kernel] = {"local_scaling": local_scaling, "gaussian_k": gaussian_k, "uniform": uniform}

SYMMETRIZERS: dict[str, Callable[[sparse.csr_array], sparse.csr_array]] = {
    "mean": lambda w: (w + w.T) / 2,
    "max": lambda w: w.maximum(w.T),
    "none": lambda w: w,
}


def affinity(neighbors: Neighbors, kernel: str = "local_scaling", symmetrize: str = "mean") -> sparse.csr_array:
    """The weights W: (N, N) float64 CSR, zero diagonal, columns ascending in each row."""
    size, k = neighbors.ids.shape
    weigh = choose(KERNELS, kernel, "graph.kernel")
    combine = choose(SYMMETRIZERS, symmetrize, "graph.symmetrize")
    scales = local_scales(neighbors.distances, typical_scale(neighbors.distances))
    weights = weigh(neighbors.distances, scales[:, None] * scales[neighbors.ids]).double().flatten().numpy()
    pointers = np.arange(0, size * k + 1, k)
    # A copy: the sort below would reorder the neighbours of the caller.
    ids = neighbors.ids.flatten().numpy().copy()
    directed = sparse.csr_array((weights, ids, pointers), shape=(size, size))
    combined = sparse.csr_array(combine(directed))
    combined.sum_duplicates()
    combined.sort_indices()
    return combined


def transition(neighbors: Neighbors, kernel: str = "local_scaling", symmetrize: str = "mean") -> Graph:
    """M = D^-1 W; a row without weight stays zero."""
    return from_affinity(affinity(neighbors, kernel, symmetrize), neighbors.k)


def from_affinity(weights: sparse.csr_array, graph_k: int) -> Graph:
    """Normalise the rows of any non-negative CSR matrix."""
    degree = np.asarray(weights.sum(axis=1)).ravel()
    rows = np.repeat(np.arange(weights.shape[0]), np.diff(weights.indptr))
    normalised = weights.data / np.where(degree > 0, degree, 1.0)[rows]
    dtype = torch.int32 if max(weights.nnz, weights.shape[0]) < 2**31 else torch.int64
    return Graph(
        torch.from_numpy(weights.indptr).to(dtype),
        torch.from_numpy(weights.indices).to(dtype),
        torch.from_numpy(normalised).float(),
        torch.from_numpy(degree.astype(np.float64)),
        graph_k,
        symmetric=(weights != weights.T).nnz == 0,
    )


def attach(
    neighbors: Neighbors, base: Features, queries: Features, kernel: str = "local_scaling", backend: str = "auto"
) -> Attachment:
    """Each query tied to as many of its nearest base points as a base point has neighbours, weighted by the kernel.

    A query's ties depend on no other query. One that coincides with a base point is tied to it as to any other.

    Args:
        neighbors: of the base points among themselves; their scales and K.
        base: (N, d) finite floats.
        queries: (n, d) floats.
        kernel: as for the graph's own edges.
        backend: what searches, see ``knn``; exact, on the CPU.

    Raises:
        ConfigError: NaN or infinity in the queries, an unknown kernel or backend.
    """
    weigh = choose(KERNELS, kernel, "graph.kernel")
    if bad := int((~torch.isfinite(queries)).any(dim=1).sum()):
        raise ConfigError(f"{bad} of {len(queries)} feature rows of the test images hold NaN or infinity")
    mean = base.mean(dim=0)
    ids, distances = _nearest((base - mean).float(), (queries - mean).float(), neighbors.k, backend)
    typical = typical_scale(neighbors.distances)
    own, theirs = local_scales(distances, typical), local_scales(neighbors.distances, typical)[ids]
    weights = weigh(distances, own[:, None] * theirs).double()
    return Attachment(ids, (weights / weights.sum(dim=1, keepdim=True)).float())


def _nearest(base: Features, queries: Features, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Positions and exact distances, both (n, k), of the base points nearest to each query; ties by position."""
    found = nearest(base, queries, wanted(k, len(base)), backend)
    blocks = torch.arange(len(queries)).split(max(1, _BLOCK // (found.shape[1] * base.shape[1])))
    ids, distances = zip(*(ranked(base, queries[rows], found[rows], k) for rows in blocks), strict=True)
    return torch.cat(ids), torch.cat(distances)


def diagnostics(neighbors: Neighbors, graph: Graph) -> dict[str, float | int | str]:
    """What to know of a graph before trusting it: components, stragglers, hubs, and how it was searched."""
    matrix = sparse.csr_array(
        (graph.weights.numpy(), graph.indices.numpy(), graph.indptr.numpy()), shape=(graph.size, graph.size)
    )
    n_components, component = connected_components(matrix, directed=True, connection="weak")
    in_degree = np.bincount(neighbors.ids.flatten().numpy(), minlength=graph.size).astype(float)
    spread = in_degree.std()
    return {
        "n_points": graph.size,
        "graph_k": graph.graph_k,
        "n_edges": len(graph.indices),
        "components": int(n_components),
        "symmetric": graph.symmetric,
        "outside_largest": 1 - float(np.bincount(component).max()) / graph.size,
        "in_degree_skew": float(((in_degree - in_degree.mean()) ** 3).mean() / spread**3) if spread > 0 else 0.0,
        "diffusion_steps": graph.default_steps,
        "search": neighbors.method,
        "exact": neighbors.recall == 1.0,
        "recall": neighbors.recall,
    }
