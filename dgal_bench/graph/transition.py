"""From neighbours to the transition matrix M = D^-1 W of the random walk (paper 4.1, eq. 2)."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dgal_bench.errors import choose
from dgal_bench.graph.knn import Neighbors

# The neighbour whose distance is a point's local scale (Zelnik-Manor and Perona, 2004).
_SCALE_NEIGHBOR = 7
# Below exp(-80) float32 would round weights to 0 and a row could lose them all.
_MAX_EXPONENT = 80.0


@dataclass(frozen=True, eq=False)
class Graph:
    """The transition matrix M in CSR form: row i holds ``indices[indptr[i]:indptr[i+1]]`` with ``weights``.

    float32 weights that sum to 1 in every row that has any; int32 positions where they fit.
    """

    indptr: Tensor
    indices: Tensor
    weights: Tensor
    graph_k: int

    @property
    def size(self) -> int:
        return len(self.indptr) - 1

    @property
    def default_steps(self) -> int:
        """T = ceil(log_K N): a walk that covers most of the graph (paper, App. B); K = 1 counts as 2."""
        return max(1, ceil(log(self.size) / log(max(2, self.graph_k)) - 1e-12))

    def to(self, device: torch.device) -> "Graph":
        return Graph(self.indptr.to(device), self.indices.to(device), self.weights.to(device), self.graph_k)

    def neighbors(self, point: int) -> Tensor:
        """int64 positions that share an edge out of ``point``."""
        return self.indices[self.indptr[point] : self.indptr[point + 1]].long()


def local_scaling(neighbors: Neighbors) -> Tensor:
    """exp(-d_ij^2 / (s_i s_j)), s_i the distance to the 7th neighbour (or the last), never below 1e-3 of the median.

    Where duplicates make that distance 0 the next positive one counts, and the median where there is none: with the
    floor alone a pile of duplicates would weigh its edges to the rest exp(-1000) and become an island.
    """
    sigma = neighbors.distances[:, min(_SCALE_NEIGHBOR, neighbors.k) - 1].clone()
    beyond = neighbors.distances.masked_fill(neighbors.distances <= 0, torch.inf).amin(dim=1)
    sigma = torch.where(sigma > 0, sigma, beyond)
    finite = sigma[torch.isfinite(sigma)]
    median = float(finite.median()) if len(finite) else 1.0
    sigma = torch.where(torch.isfinite(sigma), sigma, torch.full_like(sigma, median)).clamp(min=1e-3 * median)
    return _exp_minus(neighbors.distances.square() / (sigma[:, None] * sigma[neighbors.ids]))


def gaussian_k(neighbors: Neighbors) -> Tensor:
    """exp(-4 d_ij^2 / d_K(i)^2), d_K the distance to the last neighbour."""
    last = neighbors.distances[:, -1:]
    return _exp_minus(4 * (neighbors.distances / torch.where(last > 0, last, torch.ones_like(last))).square())


def uniform(neighbors: Neighbors) -> Tensor:
    """1 for every edge."""
    return torch.ones_like(neighbors.distances)


def _exp_minus(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=_MAX_EXPONENT).neg().exp()


KERNELS: dict[str, Callable[[Neighbors], Tensor]] = {
    "local_scaling": local_scaling,
    "gaussian_k": gaussian_k,
    "uniform": uniform,
}

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
    weights = weigh(neighbors).double().flatten().numpy()
    pointers = np.arange(0, size * k + 1, k)
    directed = sparse.csr_array((weights, neighbors.ids.flatten().numpy(), pointers), shape=(size, size))
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
        graph_k,
    )


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
        "outside_largest": 1 - float(np.bincount(component).max()) / graph.size,
        "in_degree_skew": float(((in_degree - in_degree.mean()) ** 3).mean() / spread**3) if spread > 0 else 0.0,
        "diffusion_steps": graph.default_steps,
        "search": neighbors.method,
        "exact": neighbors.recall == 1.0,
        "recall": neighbors.recall,
    }
