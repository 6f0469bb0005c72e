"""A map of the features: t-SNE in two dimensions, made once by the set-up, cached, and saved with the results.

It is for figures only: no number of a report depends on it, and no strategy sees it.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dgal_bench.config.schema import RunConfig
from dgal_bench.core import cache
from dgal_bench.core.seeding import seed_for
from dgal_bench.core.system import on_threads, provenance
from dgal_bench.core.types import Features, Index, Progress
from dgal_bench.data.image_data import ImageData
from dgal_bench.graph.exact_knn import rank_exactly, search_width
from dgal_bench.graph.knn import SearchIndex, build_index, pick_backend

if TYPE_CHECKING:
    from dgal_bench.experiment import Prepared
from dgal_bench.results.projection_file import LEVELS, PROJECTION_VERSION, write_projection

# Up to so many points no t-SNE: scikit-learn's takes two seconds to import, and a smoke run has 300 points.
_FEW = 300
# Points in t-SNE itself: six seconds, where 60,000 would take minutes.
_SAMPLE = 3_000
# Of more than the first number of points only the second number have a position.
_ALL_UP_TO, _SUBSET = 200_000, 50_000
# Of t-SNE: neighbours per point; steps, of which 1,000 take twice as long for the same picture (trustworthiness of the
# digits 0.9951 instead of 0.9950).
_PERPLEXITY, _STEPS = 30, 500
# Nearest sample points of a point; how many of them its position averages; the distance below which two points are one
# (the space is one wide).
_NEAR, _AVERAGED, _SAME = 5, 3, 1e-6
# Floats of the features in one block: 64 MB.
_BLOCK = 16 * 2**20


def project(features: Features, seed: int, points: Index | None = None, backend: str = "auto") -> Features:
    """Positions (n, 2) of all points, or of ``points``: t-SNE of a sample, the others near their neighbours in it.

    t-SNE keeps neighbourhoods, not the distances, sizes and densities of groups, and may split a connected group.
    Few points get two principal components; features (N, d) of one or two dimensions are their own positions.
    """
    ids = torch.arange(len(features)) if points is None else points
    if features.shape[1] <= 2:
        return torch.nn.functional.pad(features[ids].float(), (0, 2 - features.shape[1]))
    chosen = ids[_draw_sample(len(ids), _SAMPLE, seed_for(seed, "sample"))]
    drawn = features[chosen].double()
    middle = drawn.mean(0)
    scale = (drawn - middle).abs().max()
    if scale == 0:
        return torch.zeros(len(ids), 2)  # all points are the same
    base = ((drawn - middle) / scale).float()
    positions = principal_plane(base) if len(base) <= _FEW else tsne(base, seed_for(seed, "t-SNE"))
    if len(chosen) == len(ids):
        return positions
    search = build_index(base, backend)
    blocks = ids.split(max(1, _BLOCK // (search_width(_NEAR, len(base)) * features.shape[1])))
    return torch.cat(
        [place_among(base, positions, ((features[block] - middle) / scale).float(), search) for block in blocks]
    )


def _draw_sample(size: int, at_most: int, seed: int) -> Index:
    """Up to ``at_most`` of ``size`` positions, drawn uniformly, in order."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(size)[:at_most]))


def principal_plane(points: Features) -> Features:
    """Points (n, d) on their two principal components: (n, 2), zeros where there is no second."""
    left, sizes, _ = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    plane = (left * sizes)[:, :2]
    return torch.nn.functional.pad(plane, (0, 2 - plane.shape[1]))


def tsne(points: Features, seed: int) -> Features:
    """scikit-learn's t-SNE (n, 2), started at the principal components; it needs more points than 3 perplexities.

    On one thread: with several the order of a sum, and so its last bits, differ each time.
    """
    from sklearn.manifold import TSNE  # two seconds
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    model = TSNE(2, perplexity=_PERPLEXITY, max_iter=_STEPS, init="pca", random_state=seed % 2**32)
    with threadpool_limits(1):
        return torch.from_numpy(model.fit_transform(points.numpy()))


def place_among(base: Features, positions: Features, points: Features, search: SearchIndex) -> Features:
    """(m, 2): for each of the points (m, d) the mean of 3 base positions, weighted by inverse square distance.

    Of its 5 nearest base points they are the nearest and the two next to that one on the map. The mean of all five puts
    points between groups, where there are no features (of MNIST's 60,000 the ten neighbours on the map then share a
    point's class in 75 % instead of 81 %). A point of the base, or a duplicate of one, keeps that position.
    """
    ids, distances = rank_exactly(base, points, search(points, search_width(_NEAR, len(base))), _NEAR)
    nearest = positions[ids]
    on_map = torch.linalg.vector_norm(nearest - nearest[:, :1], dim=2)
    stray = on_map > on_map.sort(dim=1).values[:, _AVERAGED - 1 : _AVERAGED]
    weights = distances.clamp(min=_SAME).square().reciprocal().masked_fill(stray, 0)
    return (nearest * (weights / weights.sum(1, keepdim=True))[:, :, None]).sum(1)


def get_projection(config: RunConfig, prepared: "Prepared", root: Path, progress: Progress) -> Mapping[str, np.ndarray]:
    """``positions`` (n, 2) from the cache under ``root``, made if missing; ``ids`` (n,) unless they are of all points.

    Its seconds are in no ledger, and it is not among the caches that a run depends on.
    """
    backend = pick_backend(config.graph.backend)
    parts = {"latents": prepared.features_sha256, "projection": PROJECTION_VERSION, "backend": backend}

    def make(folder: Path) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
        progress("projection", 0, 1)
        start, size = perf_counter(), len(prepared.features)
        ids = _draw_sample(size, _SUBSET, seed_for(0, "projection", "kept")) if size > _ALL_UP_TO else None
        with on_threads(config.setup_threads):
            positions = project(prepared.features, seed_for(0, "projection"), ids, backend).numpy()
        arrays = {"positions": positions} | ({} if ids is None else {"ids": ids.numpy()})
        return arrays, {"seconds": perf_counter() - start, "made_by": provenance()}

    return cache.get_or_make(root, cache.key_of(parts), make).arrays


def save_projection(
    config: RunConfig, data: ImageData, prepared: "Prepared", folder: Path, root: Path, progress: Progress
) -> None:
    """Write the projection to a data set's ``folder`` of results; ``root``: the cache.

    Raises:
        ResultsError: the folder is not writable.
    """
    content = pack_file(get_projection(config, prepared, root, progress), data, prepared.features_sha256)
    write_projection(folder, prepared.features_sha256, content)


def pack_file(arrays: Mapping[str, np.ndarray], data: ImageData, features_sha256: str) -> bytes:
    """The file: positions as levels of the longer side, true labels, and the hash of the features."""
    ids = arrays.get("ids")
    labels = data.labels.numpy() if ids is None else data.labels.numpy()[ids]
    content = {
        "version": np.array(PROJECTION_VERSION),
        "latents": np.array(features_sha256),
        "positions": _levels(arrays["positions"]),
        "labels": labels.astype(np.min_scalar_type(max(1, data.n_classes - 1))),
        "n_classes": np.array(data.n_classes),
        **({} if ids is None else {"ids": ids.astype(np.uint32)}),
        **({"classes": np.array([str(name) for name in data.facts["classes"]])} if "classes" in data.facts else {}),
    }
    file = io.BytesIO()
    np.savez_compressed(file, **content, allow_pickle=False)
    return file.getvalue()


def _levels(positions: np.ndarray) -> np.ndarray:
    """(n, 2) uint16: the map centred in a square; equal points all lie in its middle."""
    lower, upper = positions.min(0).astype(float), positions.max(0).astype(float)
    side = float((upper - lower).max()) or 1.0
    parts = (positions - (lower + upper) / 2) / side + 0.5
    levels: np.ndarray = np.rint(parts.clip(0, 1) * LEVELS).astype(np.uint16)
    return levels
