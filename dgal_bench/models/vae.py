"""VaeModule: the variational auto-encoder trained once on the whole pool, without labels (paper 3.2, App. A)."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor

from dgal_bench.config.schema import RepresentationConfig
from dgal_bench.core.errors import ConfigError, UserError
from dgal_bench.core.seeding import normals, rng_for, seed_for
from dgal_bench.core.types import Features, Index, Progress
from dgal_bench.data.image_data import ImageData
from dgal_bench.models.trainer import silent_trainer, spawning
from dgal_bench.models.vae_nets import Vae, build_vae, refuse_embeddings


def as_float(images: Tensor, maximum: int) -> Tensor:
    """uint8 images -> float32 in [0, 1]."""
    # channels_last: 1.7 times faster on MNIST's VAE (two threads, with the fused Adam)
    return images.to(torch.float32, memory_format=torch.channels_last).div_(maximum)


class Batch(NamedTuple):
    """This process's rows of a batch: floats in [0, 1], their positions in the pool, and the weight of their mean.

    The mean over processes of ``weight`` x (mean loss of the rows) is the mean loss of the whole batch.
    """

    images: Tensor
    ids: Index
    weight: float


@dataclass(frozen=True)
class Share:
    """The rows of a batch that this process takes: every ``of``-th from ``rank`` on."""

    rank: int = 0
    of: int = 1

    def __call__(self, rows: Tensor) -> Tensor:
        return rows[self.rank :: self.of]


@dataclass(frozen=True, eq=False)
class Batches:
    """A share of batches of uint8 images, in a new order every epoch, without a last batch of one."""

    images: Tensor
    maximum: int
    ids: Index
    batch_size: int
    order: torch.Generator
    share: Share

    def __len__(self) -> int:
        return max(1, math.ceil((len(self.ids) - 1) / self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.ids), generator=self.order)
        for batch in order.split(self.batch_size)[: len(self)]:
            rows = self.share(batch)
            weight = len(rows) * self.share.of / len(batch)
            # A process without a row must still take part with a gradient: that of any row, times 0.
            ids = self.ids[rows if len(rows) else batch[:1]]
            yield Batch(as_float(self.images[ids], self.maximum), ids, weight)


class TrainingData(lightning.LightningDataModule):
    """A pool's images: a hold-out that decides when to stop, and batches of all others to train on."""

    def __init__(self, images: Tensor, maximum: int, config: RepresentationConfig, seed: int) -> None:
        super().__init__()
        self.images, self.maximum, self.config, self.seed = images, maximum, config, seed
        order = torch.from_numpy(rng_for(seed, "holdout").permutation(len(images)))
        n_holdout = max(1, round(config.holdout * len(images)))
        self.holdout, self.ids = order[:n_holdout], order[n_holdout:]

    @property
    def share(self) -> Share:
        """That of this process, one of the trainer's."""
        assert self.trainer is not None
        return Share(self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> Batches:
        order = torch.Generator().manual_seed(self.seed)
        return Batches(self.images, self.maximum, self.ids, self.config.train_batch_size, order, self.share)


class VaeModule(lightning.LightningModule):
    """The negative ELBO per image: recon_weight x squared error summed over pixels + KL summed over latents.

    Both are summed: averaging the error while summing the KL, as VAAL's code does, collapses the latent. The noise of
    an image in an epoch is a pure function of (seed, epoch, image, latent), in any batch and process.
    """

    def __init__(self, vae: Vae, config: RepresentationConfig, seed: int) -> None:
        super().__init__()
        self.vae = vae
        self.config = config
        self.seed = seed

    def losses(self, images: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error and KL per image, (b,) each, at standard normal ``noise`` (b, latent_dim); posterior means.

        Noise 0: at the mean. All three are float32, computed in bfloat16 if ``representation.amp`` is true.
        """
        with self.precision():
            return self.vae.losses(images, noise)

    def loss(self, images: Tensor, noise: Tensor | float) -> Tensor:
        """(b,) negative ELBOs."""
        error, kl, _ = self.losses(images, noise)
        return self.config.recon_weight * error + kl

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        noise = normals(seed_for(self.seed, "noise", self.current_epoch), batch.ids, self.config.latent_dim)
        return self.loss(batch.images, noise).mean() * batch.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.config.lr, fused=True)


_EVALUATION_BATCH = 256


class KeepBest(lightning.Callback):
    """Early stopping on the hold-out's negative ELBO; the best weights are restored at the end. Needs no label.

    Its facts are the trainer's ``callback_metrics``, which Lightning brings back from other processes.
    """

    def __init__(self, data: TrainingData, progress: Progress) -> None:
        self.data = data
        self.progress = progress
        self.best = math.inf
        self.best_epoch = 0
        self.weights: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, VaeModule)
        pl_module.eval()
        loss = self.holdout_loss(trainer, pl_module)
        pl_module.train()
        if loss < self.best:
            self.best, self.best_epoch = loss, trainer.current_epoch
            self.weights = copy.deepcopy(pl_module.state_dict())
        stop = trainer.current_epoch - self.best_epoch >= self.data.config.patience
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if trainer.is_global_zero:
            self.progress("VAE epoch", trainer.current_epoch + 1, self.data.config.max_epochs)

    @torch.no_grad()
    def holdout_loss(self, trainer: lightning.Trainer, module: VaeModule) -> float:
        """Mean negative ELBO of all shares; the noise is the same in every epoch, only the network changes."""
        seed = seed_for(module.seed, "holdout noise")
        total = torch.zeros((), dtype=torch.float64, device=module.device)
        for ids in self.data.share(self.data.holdout).split(_EVALUATION_BATCH):
            noise = normals(seed, ids.to(module.device), module.config.latent_dim)
            images = as_float(self.data.images[ids], self.data.maximum).to(module.device)
            total += module.loss(images, noise).double().sum()
        return float(trainer.strategy.reduce(total, reduce_op="sum")) / len(self.data.holdout)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.weights:
            pl_module.load_state_dict(self.weights)
        facts = {"epochs": trainer.current_epoch, "best_epoch": self.best_epoch + 1, "holdout_loss": self.best}
        # through NumPy, since torch would make float32 of a float
        trainer.callback_metrics.update({name: torch.from_numpy(np.array(value)) for name, value in facts.items()})


def train_vae(
    data: ImageData,
    config: RepresentationConfig,
    seed: int,
    device: torch.device,
    progress: Progress,
    devices: int = 1,
) -> tuple[VaeModule, dict[str, float]]:
    """Fit on the pool less a 5 % hold-out that decides when to stop. The caller isolates the global RNGs.

    Args:
        data: its pool of images.
        config: see conf/config.yaml, ``representation``.
        seed: of hold-out, order and noise; the initial weights come from the global torch RNG.
        device: where to train.
        progress: called after every epoch.
        devices: more than one: so many processes train it together, each on a device of that kind.

    Returns:
        The module with its best weights, in eval mode, and facts of the training.

    Raises:
        ConfigError: embeddings, images too small, or fewer GPUs than ``devices``.
        UserError: the loss was never finite, or one of several processes died.
    """
    refuse_embeddings(data.images, "set representation=pixels (the embeddings as they are), pca or npy")
    module = VaeModule(build_vae(data.image_shape, config.latent_dim, config.encoder), config, seed)
    if device.type == "cuda" and (available := torch.cuda.device_count()) < devices:
        raise ConfigError(
            f"trainer.devices={devices}, but torch sees {available} of them: use trainer.devices={available}"
        )
    if devices == 1:
        facts = fit(module, data.images, data.maximum, device, progress)
    else:
        progress(f"starting {devices} processes", 0, 1)
        with spawning(devices, progress) as send:
            facts = fit(module, data.images, data.maximum, device, send, devices)
        facts["devices"] = devices
    return module.eval().to(device), facts


def fit(
    module: VaeModule, images: Tensor, maximum: int, device: torch.device, progress: Progress, devices: int = 1
) -> dict[str, float]:
    """Train in place, to the best weights. More than one of ``devices``: within ``spawning``, with its progress.

    Several take the same batches, each every ``devices``-th row of each. Gradients are those of the mean over the whole
    batch, so that the result differs from one process's only by rounding.
    """
    data = TrainingData(images, maximum, module.config, module.seed)
    trainer = silent_trainer(device, module.config.max_epochs, KeepBest(data, progress), devices=devices)
    trainer.fit(module, datamodule=data)
    facts = {name: value.item() for name, value in trainer.callback_metrics.items()}
    if facts["holdout_loss"] == math.inf:
        raise UserError("the VAE's loss was never finite: lower representation.lr")
    return facts


MIN_EXPLAINED_VARIANCE = 0.20  # of the pool's: with less, the latents are no basis for a graph
ACTIVE_VARIANCE = 0.01  # of a latent over the pool: with more, it is active


@torch.inference_mode()
def encode(module: VaeModule, data: ImageData, batch_size: int = _EVALUATION_BATCH) -> tuple[Tensor, dict[str, float]]:
    """Posterior means (N, latent_dim) of the whole pool, float32 on the CPU, and measures of their quality.

    Raises:
        UserError: the latent has collapsed: no active latent, or under 20 % of the pool's variance explained.
    """
    means, errors, kls = [], 0.0, 0.0
    for block in data.images.split(batch_size):
        error, kl, mu = module.losses(as_float(block, data.maximum).to(module.device), 0.0)
        means.append(mu.cpu())
        errors += float(error.sum())
        kls += float(kl.sum())
    latents = torch.cat(means)
    facts = {
        "squared_error": errors / data.size,
        "kl": kls / data.size,
        "active_latents": int((latents.var(dim=0) > ACTIVE_VARIANCE).sum()),
        "explained_variance": 1 - errors / max(_total_squares(data), 1e-12),
    }
    return _check_latents(latents, facts), facts


@torch.inference_mode()
def posterior_means(module: VaeModule, images: Tensor, maximum: int, batch_size: int = _EVALUATION_BATCH) -> Features:
    """(n, latent_dim) float32 on the CPU, for any uint8 images of the pool's shape and ``maximum``."""
    with module.precision():
        means = [module.vae.encode(as_float(block, maximum).to(module.device))[0] for block in images.split(batch_size)]
    return torch.cat([mean.cpu() for mean in means])


_BLOCK = 4_000_000  # elements of a block of images in float64: 32 MB


def _total_squares(data: ImageData) -> float:
    """Sum over images and pixels of the squared distance to the pool's mean image, pixels in [0, 1]."""
    blocks = data.images.flatten(1).split(max(1, _BLOCK // data.images[0].numel()))
    mean = sum(block.double().sum(0) for block in blocks) / data.size
    return sum(float((block.double() - mean).square().sum()) for block in blocks) / data.maximum**2


def _check_latents(latents: Tensor, facts: dict[str, float]) -> Tensor:
    active, explained = facts["active_latents"], facts["explained_variance"]
    if not torch.isfinite(latents).all():
        raise UserError("the VAE's latents hold NaN or infinity: lower representation.lr")
    if active == 0 or explained < MIN_EXPLAINED_VARIANCE:
        raise UserError(
            f"the VAE says too little of these images: {active} active latents of {latents.shape[1]}, "
            f"{explained:.0%} of the variance explained where {MIN_EXPLAINED_VARIANCE:.0%} is the least: "
            "raise representation.recon_weight or representation.max_epochs"
        )
    return latents
