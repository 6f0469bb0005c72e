"""Acquisitions that rank candidates one by one (paper 4.3, 5.1), and the random one."""

from dataclasses import dataclass

import torch

from dgal_bench.core.types import Index, margins, smallest
from dgal_bench.strategies.base import Query


@dataclass(frozen=True)
class Random:
    """Uniform among the candidates, without a pass through the network."""

    def __call__(self, query: Query, candidates: Index, batch_size: int) -> Index:
        return candidates[torch.from_numpy(query.rng.choice(len(candidates), batch_size, replace=False))]


@dataclass(frozen=True)
class LeastConfidence:
    """The largest 1 - max_c p_c (Lewis, 1995)."""

    def __call__(self, query: Query, candidates: Index, batch_size: int) -> Index:
        confidence = query.predict(candidates).probs.amax(dim=1)
        return candidates[smallest(confidence, batch_size, candidates, query.ties)]


@dataclass(frozen=True)
class Margin:
    """The smallest difference of the two largest probabilities (Scheffer et al., 2001)."""

    def __call__(self, query: Query, candidates: Index, batch_size: int) -> Index:
        scores = margins(query.predict(candidates).probs)
        return candidates[smallest(scores, batch_size, candidates, query.ties)]


@dataclass(frozen=True)
class Entropy:
    """The largest -sum_c p_c log p_c; log p comes from log_softmax, so no log of 0 is taken."""

    def __call__(self, query: Query, candidates: Index, batch_size: int) -> Index:
        outputs = query.predict(candidates)
        negentropy = (outputs.probs * outputs.log_probs).sum(dim=1)
        return candidates[smallest(negentropy, batch_size, candidates, query.ties)]
