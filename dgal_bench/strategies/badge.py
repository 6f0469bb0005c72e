"""BADGE (Ash et al., 2020): k-means++ seeding over last-layer gradients that are never written out."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgal_bench.core.types import CLOSE, SAME, Features, Index, TieKeys, smallest
from dgal_bench.strategies.base import Query


@dataclass(frozen=True)
class Badge:
    """Diverse and uncertain, by the gradients of the output layer for the classes that the network predicts.

    The first pick has the longest gradient; each next is drawn with probability proportional to its squared distance
    to the nearest pick. ``indistinct`` in the row: picks drawn uniformly, because every distance was 0.
    """

    def __call__(self, query: Query, candidates: Index, batch_size: int) -> Index:
        outputs = query.predict(candidates)
        errors = gradient_errors(outputs.log_probs)
        places, n_uniform = seed_batch(errors, outputs.features, batch_size, candidates, query.ties, query.rng)
        query.note("indistinct", lambda: n_uniform)
        return candidates[places]


def gradient_errors(log_probs: Tensor) -> Tensor:
    """q (N, C): one-hot of the predicted class, less the probabilities.

    With the features h, q (x) h is the gradient of the cross-entropy in the output layer's weights, up to its sign.
    """
    errors = -log_probs.exp()
    predicted = log_probs.argmax(dim=1, keepdim=True)
    # 1 - p of a confident network loses its digits in float32; the sum of the other probabilities keeps them
    errors.scatter_(1, predicted, 0)
    return errors.scatter_(1, predicted, -errors.sum(dim=1, keepdim=True))


def seed_batch(
    errors_NC: Tensor, features_Nd: Features, batch_size: int, ids: Index, ties: TieKeys, rng: np.random.Generator
) -> tuple[Index, int]:
    """k-means++ seeding over the gradients g_i = q_i (x) h_i in O(N (C + d)) time per pick and O(N) more memory.

    |g_i - g_j|^2 = |q_i|^2 |h_i|^2 + |q_j|^2 |h_j|^2 - 2 (q_i.q_j)(h_i.h_j): no (N, C d) matrix.

    Args:
        errors_NC: q, float32.
        features_Nd: h, float32.
        batch_size: picks, at most N.
        ids: (N,) the positions of the rows.
        ties: their tie keys, among equally long gradients.
        rng: one ``random()`` per pick, or one ``integers()`` where every distance is 0.

    Returns:
        (B,) distinct places, and how many of them were drawn uniformly because every distance was 0.
    """
    norms = errors_NC.square().sum(dim=1) * features_Nd.square().sum(dim=1)
    picks = [int(smallest(-norms, 1, ids, ties))]
    n_uniform = int(norms[picks[0]] == 0)
    nearest = torch.full_like(norms, torch.inf)
    for _ in range(batch_size - 1):
        torch.minimum(nearest, _squared_distances(errors_NC, features_Nd, norms, picks[-1]), out=nearest)
        nearest[picks[-1]] = 0
        place = draw(nearest, rng)
        if place is None:
            n_uniform += 1
            place = _draw_uniformly(picks, len(norms), rng)
        picks.append(place)
    return torch.tensor(picks), n_uniform


def _squared_distances(errors_NC: Tensor, features_Nd: Features, norms: Tensor, pick: int) -> Tensor:
    """(N,) squared distances of all gradients to that of ``pick``; exactly 0 where both are equal up to rounding."""
    scale = norms + norms[pick]
    product = (errors_NC @ errors_NC[pick]).mul_(features_Nd @ features_Nd[pick])
    squared = torch.add(scale, product, alpha=-2, out=product)
    near = torch.nonzero(squared <= CLOSE * scale).flatten()
    exact = _squared_differences(errors_NC, features_Nd, near, pick)
    squared[near] = exact.masked_fill_(exact <= SAME * scale[near], 0)
    return squared


def _squared_differences(errors_NC: Tensor, features_Nd: Features, near: Index, pick: int) -> Tensor:
    """|g_i - g_j|^2 of g_i - g_j = (q_i - q_j) (x) h_i + q_j (x) (h_i - h_j): small terms for near points."""
    q, h = errors_NC[pick], features_Nd[near]
    dq, dh = errors_NC[near] - q, h - features_Nd[pick]
    squared = dq.square().sum(1) * h.square().sum(1) + q.square().sum() * dh.square().sum(1)
    return squared.add_(2 * (dq @ q) * (h * dh).sum(1)).clamp_(min=0)


def draw(weights: Tensor, rng: np.random.Generator) -> int | None:
    """A place with probability proportional to its weight (at least 0), by one ``rng.random()``; None: all are 0."""
    heap = weights.cumsum(0, dtype=torch.float64)  # torch.multinomial takes at most 2^24 weights
    total = float(heap[-1])
    if total <= 0:
        return None
    level = min(rng.random() * total, np.nextafter(total, 0))
    return int(torch.searchsorted(heap, torch.tensor(level, dtype=torch.float64), right=True))


def _draw_uniformly(picks: list[int], size: int, rng: np.random.Generator) -> int:
    """One of the places that are not among the picks."""
    unpicked = torch.ones(size, dtype=torch.bool)
    unpicked[picks] = False
    return int(torch.nonzero(unpicked).flatten()[rng.integers(size - len(picks))])
