"""Features without images or training: a mixture of clusters, and one connected manifold that has none."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from dgal_bench.core.seeding import rng_for

SEED = 0
_BLOCK = 100_000  # rows that are drawn at once: a pool of any size is made in bounded memory
_CLUSTER = 1_000  # points of a cluster, on average: so a bigger pool has more clusters, not bigger ones
_WIDTH = 0.5  # of a cluster, in standard deviations of the centres
_INTRINSIC = 4  # dimensions of the manifold
_BEND = 2.0  # of the manifold: turns of the fastest wave over its side, in standard deviations

Floats = npt.NDArray[np.float32]
Draw = Callable[[np.random.Generator, int], Floats]


def blocks(kind: str, n_points: int, n_features: int) -> Iterator[Floats]:
    """(at most 100,000, d) float32 blocks of the ``n_points`` of one of KINDS, always the same, in no order."""
    draw = KINDS[kind](n_points, n_features)
    for number, start in enumerate(range(0, n_points, _BLOCK)):
        yield draw(rng_for(SEED, "benchmark points", kind, number), min(_BLOCK, n_points - start))


def points(kind: str, n_points: int, n_features: int) -> Floats:
    """The same (N, d) in memory."""
    return np.concatenate(list(blocks(kind, n_points, n_features)))


def clustered(n_points: int, n_features: int) -> Draw:
    """Normal clouds of some thousand points around centres drawn from a wider normal: most are islands of a graph."""
    n_clusters = max(10, n_points // _CLUSTER)
    centres = rng_for(SEED, "benchmark centres", n_points).standard_normal((n_clusters, n_features), dtype=np.float32)

    def draw(rng: np.random.Generator, size: int) -> Floats:
        cloud = rng.standard_normal((size, n_features), dtype=np.float32) * np.float32(_WIDTH)
        return cloud + centres[rng.integers(n_clusters, size=size)]

    return draw


def manifold(n_points: int, n_features: int) -> Draw:
    """A bent sheet of four dimensions in d: waves of random direction and phase over uniform coordinates."""
    rng = rng_for(SEED, "benchmark manifold")
    directions = rng.standard_normal((_INTRINSIC, n_features), dtype=np.float32) * np.float32(_BEND)
    phases = rng.uniform(0, 2 * np.pi, n_features).astype(np.float32)

    def draw(rng: np.random.Generator, size: int) -> Floats:
        coordinates = rng.random((size, _INTRINSIC), dtype=np.float32)
        waves: Floats = np.sin(coordinates @ directions + phases)
        return waves

    return draw


KINDS: Mapping[str, Callable[[int, int], Draw]] = {"clustered": clustered, "manifold": manifold}
