"""What is timed: badge, coreset and margin, each as dgal_bench, a plain reference and scikit-activeml do it.

A maker takes the network's outputs and the number of picks, does what is not timed, and returns the call that is.
All calls of one case start from the same float32 arrays and return places in 0..N-1. Imports are inside the makers:
a process pays, in memory too, for the implementation that it measures only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.plan import N_CENTRES, N_FEATURES

SEED = 0
_CLUSTERS = 10  # of the features where no number of classes is given
_SHARPNESS = 4.0  # half of the points get more than 0.9 for their class, as from a network that is half trained

Floats = npt.NDArray[np.float32]
Call = Callable[[], list[int]]


@dataclass(frozen=True, eq=False)
class NetworkOutputs:
    """What the network has said when the clock starts: ``log_probs`` and ``probs`` (N, C), ``features`` (N, d).

    ``centres`` (k, d) are the features of the labeled points.
    """

    log_probs: Floats
    probs: Floats
    features: Floats
    centres: Floats


def network_outputs(n_points: int, n_classes: int | None) -> NetworkOutputs:
    """Synthetic: one cluster of rectified features per class, and a linear layer that has learned the clusters."""
    n_classes = n_classes or _CLUSTERS
    rng = np.random.default_rng([SEED, n_points, n_classes])
    means = rng.standard_normal((n_classes, N_FEATURES), dtype=np.float32)
    n_all = n_points + N_CENTRES
    features = rng.standard_normal((n_all, N_FEATURES), dtype=np.float32)
    features += means[rng.integers(n_classes, size=n_all)]
    np.maximum(features, 0, out=features)
    head = np.maximum(means, 0)
    head = (head - head.mean(axis=0)).T * np.float32(_SHARPNESS / np.sqrt(N_FEATURES))
    logits = features[:n_points] @ head
    logits -= logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return NetworkOutputs(log_probs, np.exp(log_probs), features[:n_points].copy(), features[n_points:].copy())


def _draws() -> np.random.Generator:
    """The same for every implementation that takes a generator, and for every repeat."""
    return np.random.default_rng(SEED)


def badge_ours(outputs: NetworkOutputs, n_picks: int) -> Call:
    import torch

    from dgal_bench.core.seeding import TieBreak
    from dgal_bench.strategies.badge import gradient_errors, seed_batch

    log_probs, features = torch.from_numpy(outputs.log_probs), torch.from_numpy(outputs.features)
    ids = torch.arange(len(features))

    def call() -> list[int]:
        places, _ = seed_batch(gradient_errors(log_probs), features, n_picks, ids, TieBreak(SEED, len(ids)), _draws())
        return places.tolist()

    return call


def badge_reference(outputs: NetworkOutputs, n_picks: int) -> Call:
    """Every gradient written out, in float32 as ours."""
    import torch

    from dgal_bench.strategies.badge import gradient_errors
    from tests import reference

    log_probs = torch.from_numpy(outputs.log_probs)
    return lambda: reference.badge(gradient_errors(log_probs).numpy(), outputs.features, n_picks, _draws())


def badge_peer(outputs: NetworkOutputs, n_picks: int) -> Call:
    """Draws from a stream of its own: its picks are not to be compared."""
    from skactiveml.pool import Badge

    clf, y = _classifier(outputs), np.full(len(outputs.features), np.nan)
    strategy = Badge(clf_embedding_flag_name="return_embeddings", random_state=SEED)
    return lambda: _ints(strategy.query(outputs.features, y, clf, fit_clf=False, batch_size=n_picks))


def coreset_ours(outputs: NetworkOutputs, n_picks: int) -> Call:
    import torch

    from dgal_bench.core.seeding import TieBreak
    from dgal_bench.strategies.coreset import farthest_first

    features, centres = torch.from_numpy(outputs.features), torch.from_numpy(outputs.centres)
    ids = torch.arange(len(features))
    return lambda: farthest_first(features, centres, n_picks, ids, TieBreak(SEED, len(ids)))[0].tolist()


def coreset_reference(outputs: NetworkOutputs, n_picks: int) -> Call:
    """All distances to all centres, again for every pick."""
    from tests import reference

    return lambda: reference.k_center(outputs.features, outputs.centres, n_picks)


def coreset_peer(outputs: NetworkOutputs, n_picks: int) -> Call:
    from skactiveml.pool import CoreSet

    points = np.concatenate([outputs.centres, outputs.features])
    y = np.full(len(points), np.nan)
    y[:N_CENTRES] = 0
    strategy = CoreSet(random_state=SEED)
    return lambda: [place - N_CENTRES for place in _ints(strategy.query(points, y, batch_size=n_picks))]


def margin_ours(outputs: NetworkOutputs, n_picks: int) -> Call:
    """From log probabilities, as the strategy gets them: it pays for the exp that the others are spared."""
    import torch

    from dgal_bench.core.seeding import TieBreak
    from dgal_bench.core.types import margins, smallest

    log_probs = torch.from_numpy(outputs.log_probs)
    ids = torch.arange(len(log_probs))

    def call() -> list[int]:
        return smallest(margins(log_probs.exp()), n_picks, ids, TieBreak(SEED, len(ids))).tolist()

    return call


def margin_reference(outputs: NetworkOutputs, n_picks: int) -> Call:
    """Two plain sorts: of every row, and of all points."""

    def call() -> list[int]:
        ordered = np.sort(outputs.probs, axis=1)
        return _ints(np.argsort(ordered[:, -1] - ordered[:, -2], kind="stable")[:n_picks])

    return call


def margin_peer(outputs: NetworkOutputs, n_picks: int) -> Call:
    from skactiveml.pool import UncertaintySampling

    clf, y = _classifier(outputs), np.full(len(outputs.features), np.nan)
    strategy = UncertaintySampling(method="margin_sampling", random_state=SEED)
    return lambda: _ints(strategy.query(outputs.features, y, clf, fit_clf=False, batch_size=n_picks))


def _classifier(outputs: NetworkOutputs) -> object:
    """For scikit-activeml: a fitted classifier that answers for all points at once with what is given, at no cost."""
    from skactiveml.base import SkactivemlClassifier

    class Given(SkactivemlClassifier):
        def fit(self, X: Floats, y: Floats, sample_weight: Floats | None = None) -> "Given":
            return self

        def predict_proba(self, X: Floats, return_embeddings: bool = False) -> Floats | tuple[Floats, Floats]:
            assert len(X) == len(outputs.probs)
            return (outputs.probs, outputs.features) if return_embeddings else outputs.probs

    return Given()


def _ints(places: npt.ArrayLike) -> list[int]:
    return [int(place) for place in np.asarray(places)]


MAKERS: Mapping[tuple[str, str], Callable[[NetworkOutputs, int], Call]] = {
    ("badge", "ours"): badge_ours,
    ("badge", "reference"): badge_reference,
    ("badge", "scikit-activeml"): badge_peer,
    ("coreset", "ours"): coreset_ours,
    ("coreset", "reference"): coreset_reference,
    ("coreset", "scikit-activeml"): coreset_peer,
    ("margin", "ours"): margin_ours,
    ("margin", "reference"): margin_reference,
    ("margin", "scikit-activeml"): margin_peer,
}
