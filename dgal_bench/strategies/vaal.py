"""GANVAE: variational adversarial active learning (VAAL; Sinha et al., 2019)."""

from dataclasses import dataclass

from dgal_bench.config.schema import AdversarySettings
from dgal_bench.core.errors import ConfigError
from dgal_bench.core.types import Index, smallest
from dgal_bench.strategies.base import Query
from dgal_bench.strategies.restrict import at_least_one

# Points that the untimed rehearsal scores.
_REHEARSAL_POINTS = 256
# Images that pass through the adversary's VAE at a time.
_BATCH = 1024


@dataclass(frozen=True)
class Adversary(AdversarySettings):
    """The candidates that a discriminator, trained anew in every round, most surely classifies as unlabeled.

    Its training is part of the query, as the phase ``aux_train``. In the row: ``aux_scored``, the points passed
    through its VAE; ``aux_steps``, its training steps; where memory ran out, ``aux_halved_to``, the final number of
    images at a time.
    """

    def __post_init__(self) -> None:
        for name in ("latent_dim", "max_steps", "epochs", "vae_steps", "train_batch_size"):
            at_least_one(name, getattr(self, name))
        for name in ("recon_weight", "vae_lr", "lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive")

    def __call__(self, query: Query, candidates: Index, batch_size: int) -> Index:
        from dgal_bench.models.vaal import train_vaal  # Lightning: seconds that a sweep's parent must not pay

        pool = query.pool
        unlabeled = pool.unlabeled
        steps = 1 if query.rehearsal else self.steps(len(unlabeled))
        if query.rehearsal:
            candidates = candidates[: max(batch_size, _REHEARSAL_POINTS)]
        seed = int(query.rng.integers(2**62))
        with query.clock.phase("aux_train"):
            module = train_vaal(query.images, query.maximum, pool.labeled, unlabeled, self, seed, query.device, steps)
        with query.clock.phase("infer"):
            looks_labeled, at_a_time = module.score(query.images[candidates], query.maximum, _BATCH)
        query.note("aux_scored", lambda: len(candidates))
        query.note("aux_steps", lambda: steps)
        if at_a_time < _BATCH:
            query.note("aux_halved_to", lambda: at_a_time)
        return candidates[smallest(looks_labeled, batch_size, candidates, query.ties)]
