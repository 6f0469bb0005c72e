"""From neighbours to the transition matrix M = D^-1 W (paper 4.1, eq. 2), and images attached to the graph."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.sparse.csgraph import reverse_cuthill_mckee
from torch import Tensor

from dgal_bench.core.errors import ConfigError, choose
from dgal_bench.core.system import workers
from dgal_bench.core.types import Features
from dgal_bench.graph.affinity import KERNELS, SYMMETRIZERS, affinity, is_symmetric, local_scales, typical_scale
from dgal_bench.graph.exact_knn import nearest_to
from dgal_bench.graph.graph import GRAPH_ARRAYS, Attachment, Graph
from dgal_bench.graph.knn import Neighbors, pick_backend

# Edges that are reordered at once: about 200 MB in memory.
_EDGES = 8_000_000


def transition(neighbors: Neighbors, kernel: str = "local_scaling", symmetrize: str = "mean") -> Graph:
    """M = D^-1 W; a row without weight stays zero."""
    symmetric = True if SYMMETRIZERS.get(symmetrize) else None
    return from_affinity(affinity(neighbors, kernel, symmetrize), neighbors.k, symmetric)


def from_affinity(weights: sparse.csr_array, graph_k: int, symmetric: bool | None = None) -> Graph:
    """Normalise the rows of any non-negative CSR matrix between positions, and put them in an order of nodes.

    Beside the matrix and the graph only blocks of edges are in memory, and where W is asymmetric W + W^T.
    ``symmetric``: whether W is; None: to be checked.
    """
    symmetric = is_symmetric(weights) if symmetric is None else symmetric
    size = weights.shape[0]
    points = node_order(weights, symmetric)
    degrees = np.asarray(weights.sum(axis=1), dtype=np.float64).ravel()[points]
    counts = np.diff(weights.indptr)[points]
    dtype = np.int32 if max(weights.nnz, size) < 2**31 else np.int64
    pointers = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    indices, normalised = np.empty(weights.nnz, dtype=dtype), np.empty(weights.nnz, dtype=np.float32)
    nodes = np.empty(size, dtype=dtype)
    nodes[points] = np.arange(size, dtype=dtype)
    divisors = np.where(degrees > 0, degrees, 1.0)
    for first, last in _row_blocks(pointers):
        begin = pointers[first]
        shifts = weights.indptr[points[first:last]] - (pointers[first:last] - begin)
        block = np.repeat(shifts, counts[first:last]) + np.arange(pointers[last] - begin)
        indices[begin : pointers[last]] = nodes[weights.indices[block]]
        normalised[begin : pointers[last]] = weights.data[block] / np.repeat(divisors[first:last], counts[first:last])
    parts = (pointers.astype(dtype), indices, normalised, degrees, points)
    arrays = {name: torch.from_numpy(part) for name, part in zip(GRAPH_ARRAYS, parts, strict=True)}
    return Graph(**arrays, graph_k=graph_k, symmetric=symmetric)


def node_order(weights: sparse.csr_array, symmetric: bool) -> npt.NDArray[np.int64]:
    """(N,) positions in an order with neighbours near each other: reverse Cuthill and McKee (George and Liu, 1981).

    With a million clustered rows of ten classes a product takes a quarter of its time in order of position.
    """
    order: npt.NDArray[np.int64] = reverse_cuthill_mckee(weights, symmetric_mode=symmetric).astype(np.int64)
    return order


def _row_blocks(pointers: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of rows with at most _EDGES entries, or of one row."""
    first, size = 0, len(pointers) - 1
    while first < size:
        last = max(first + 1, int(np.searchsorted(pointers, pointers[first] + _EDGES, side="right")) - 1)
        yield first, last
        first = last


def attach(
    neighbors: Neighbors, base: Features, queries: Features, kernel: str = "local_scaling", backend: str = "auto"
) -> Attachment:
    """Attach each query to as many nearest base points as a base point has neighbours, weighted by the kernel.

    The result for a query depends on no other query. A base point that coincides with it is treated like any other.
    Exact, on the CPU, in blocks of ``base``, which may be memory-mapped.

    Args:
        neighbors: of the base points among themselves; their scales and K.
        base: (N, d) finite floats.
        queries: (n, d) floats.
        kernel: as for the graph's own edges.
        backend: as for the graph; it is only checked.

    Raises:
        ConfigError: NaN or infinity in the queries, an unknown kernel or backend.
    """
    weigh = choose(KERNELS, kernel, "graph.kernel")
    if bad := int((~torch.isfinite(queries)).any(dim=1).sum()):
        raise ConfigError(f"{bad} of {len(queries)} feature rows of the test images hold NaN or infinity")
    pick_backend(backend)  # an unknown or missing one is an error, though this search needs none
    with workers() as each:
        ids, distances = nearest_to(base, queries, neighbors.k, each)
    typical = typical_scale(neighbors.distances)
    own, theirs = local_scales(distances, typical), local_scales(neighbors.distances, typical)[ids]
    weights = weigh(distances, own[:, None] * theirs).double()
    return Attachment(ids, (weights / weights.sum(dim=1, keepdim=True)).float())


def diagnostics(neighbors: Neighbors, graph: Graph) -> dict[str, float | int | str]:
    """Facts to judge a graph by: components, points outside the largest, hubs, and how it was searched."""
    sizes = component_sizes(graph)
    in_degree = _in_degrees(neighbors.ids, graph.size)
    spread = in_degree.std()
    return {
        "n_points": graph.size,
        "graph_k": graph.graph_k,
        "n_edges": len(graph.indices),
        "components": len(sizes),
        "symmetric": graph.symmetric,
        "outside_largest": 1 - float(sizes.max()) / graph.size,
        "in_degree_skew": float(((in_degree - in_degree.mean()) ** 3).mean() / spread**3) if spread > 0 else 0.0,
        "diffusion_steps": graph.default_steps,
        "search": neighbors.method,
        "exact": is_exact(neighbors.method),
        "recall": neighbors.recall,
    }


def is_exact(method: str) -> bool:
    """By ``Neighbors.method``, not by recall: an approximate search may miss nothing on a sample."""
    name, _, lists = method.partition(" ")
    return name in ("tiles", "faiss") or (name == "lists" and len(set(lists.split("/"))) == 1)


def component_sizes(graph: Graph) -> npt.NDArray[np.int64]:
    """Points of each weakly connected component: by ``node_order`` a component is a range that no edge leaves."""
    pointers, indices = graph.indptr.numpy(), graph.indices.numpy()
    rows = np.flatnonzero(np.diff(pointers))
    if not len(rows):
        return np.ones(graph.size, dtype=np.int64)
    first = np.minimum(rows, np.minimum.reduceat(indices, pointers[rows]))
    last = np.maximum(rows, np.maximum.reduceat(indices, pointers[rows]))
    # edges across the gap before each node: they begin before it, and end at it or beyond
    n_begun, n_ended = (np.bincount(nodes + 1, minlength=graph.size + 1)[: graph.size] for nodes in (first, last))
    return np.diff(np.append(np.flatnonzero(np.cumsum(n_begun - n_ended) == 0), graph.size))


def _in_degrees(ids: Tensor, size: int) -> npt.NDArray[np.float64]:
    """(N,) how often each point is among the ids (N, K)."""
    counts = np.zeros(size)
    for column in ids.numpy().T:  # column by column: bincount copies its input
        counts += np.bincount(column, minlength=size)
    return counts
