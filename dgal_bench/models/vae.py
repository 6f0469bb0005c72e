"""VaeModule: the variational auto-encoder trained once on the whole pool, without labels (paper 3.2, App. A)."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import lightning
import torch
from torch import Tensor, nn

from dgal_bench.arrays import Features, Progress
from dgal_bench.config import RepresentationConfig
from dgal_bench.data.datasets import ImageData
from dgal_bench.errors import UserError
from dgal_bench.models.trainer import silent_trainer
from dgal_bench.seeding import rng_for

# Shares of the pool's variance below which the latents say too little of the images to build a graph on.
MIN_EXPLAINED_VARIANCE = 0.20
ACTIVE_VARIANCE = 0.01


class VaeCNN(nn.Module):
    """Stride-2 convolutions 32-64 (and 128 from 32 pixels up), linear 256, mu and log variance; a mirrored decoder.

    Images are (b, channels, height, width) floats in [0, 1]; any height and width of at least 4. No BatchNorm.
    """

    def __init__(self, image_shape: tuple[int, int, int], latent_dim: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        widths = [channels, 32, 64] + ([128] if min(height, width) >= 32 else [])
        sizes = [(height >> i, width >> i) for i in range(len(widths))]
        steps = list(zip(widths, widths[1:], sizes, strict=False))
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for narrow, wide, (h, w) in steps:
            encoder += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.ReLU()]
            up = nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1, output_padding=(h % 2, w % 2))
            decoder = [up, nn.ReLU(), *decoder]
        bottom = (widths[-1], *sizes[-1])
        flat = math.prod(bottom)
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(flat, 256), nn.ReLU())
        self.mu = nn.Linear(256, latent_dim)
        self.log_variance = nn.Linear(256, latent_dim)
        decoder[-1] = nn.Sigmoid()
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, flat), nn.ReLU(), nn.Unflatten(1, bottom), *decoder
        )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance, each (b, latent_dim)."""
        hidden = self.encoder(images)
        return self.mu(hidden), self.log_variance(hidden)

    def decode(self, latents: Tensor) -> Tensor:
        """(b, latent_dim) -> images in [0, 1]."""
        images: Tensor = self.decoder(latents)
        return images

    def losses(self, images: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error summed over pixels and KL summed over latents, (b,) each; posterior means (b, latent_dim)."""
        mu, log_variance = self.encode(images)
        error = (self.decode(mu + noise * (log_variance / 2).exp()) - images).square().flatten(1).sum(1)
        kl = 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return error, kl, mu


class VaeModule(lightning.LightningModule):
    """The negative ELBO per image: recon_weight x squared error summed over pixels + KL summed over latents.

    Both are summed: averaging the error while summing the KL, as VAAL's code does, collapses the latent.
    """

    def __init__(self, vae: VaeCNN, config: RepresentationConfig) -> None:
        super().__init__()
        self.vae = vae
        self.config = config

    def losses(self, images: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
        """Squared error and KL per image, (b,) each, at standard normal ``noise`` (b, latent_dim); 0: at the mean."""
        return self.vae.losses(images, noise)[:2]

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        noise = torch.randn(len(images), self.config.latent_dim, device=images.device)
        error, kl = self.losses(images, noise)
        return (self.config.recon_weight * error + kl).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.config.lr, fused=True)


@dataclass(frozen=True, eq=False)
class _Batches:
    """Float slices of uint8 images, in a new order every epoch; a last batch of one is left out."""

    images: Tensor
    maximum: int
    batch_size: int
    order: torch.Generator

    def __len__(self) -> int:
        return max(1, math.ceil((len(self.images) - 1) / self.batch_size))

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=self.order)
        for ids in order.split(self.batch_size)[: len(self)]:
            yield as_float(self.images[ids], self.maximum)


def as_float(images: Tensor, maximum: int) -> Tensor:
    """uint8 images -> float32 in [0, 1]."""
    # channels_last: 1.7 times faster on MNIST's VAE (two threads, with the fused Adam)
    return images.to(torch.float32, memory_format=torch.channels_last).div_(maximum)


class KeepBest(lightning.Callback):
    """Early stopping on the hold-out's negative ELBO, the best weights put back at the end; needs no label."""

    def __init__(self, holdout: Tensor, config: RepresentationConfig, progress: Progress) -> None:
        self.holdout = holdout
        # The same noise every epoch: an ELBO whose changes are the network's, and no draw from a global RNG.
        self.noise = torch.randn(len(holdout), config.latent_dim, generator=torch.Generator().manual_seed(0))
        self.config = config
        self.progress = progress
        self.best = math.inf
        self.best_epoch = 0
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, VaeModule)
        pl_module.eval()
        error, kl = pl_module.losses(self.holdout.to(pl_module.device), self.noise.to(pl_module.device))
        pl_module.train()
        loss = float((self.config.recon_weight * error + kl).mean())
        if loss < self.best:
            self.best, self.best_epoch = loss, trainer.current_epoch
            self.weights = copy.deepcopy(pl_module.state_dict())
        trainer.should_stop = trainer.current_epoch - self.best_epoch >= self.config.patience
        self.progress("VAE epoch", trainer.current_epoch + 1, self.config.max_epochs)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self.weights:
            raise UserError("the VAE's loss was never finite: lower representation.lr")
        pl_module.load_state_dict(self.weights)


def train_vae(
    data: ImageData, config: RepresentationConfig, seed: int, device: torch.device, progress: Progress
) -> tuple[VaeModule, dict[str, float]]:
    """Fit on the pool less a 5 % hold-out that decides when to stop. The caller isolates the global RNGs.

    Returns:
        The module with its best weights, in eval mode, and how the training went.
    """
    order = torch.from_numpy(rng_for(seed, "holdout").permutation(data.size))
    n_holdout = max(1, round(config.holdout * data.size))
    holdout = as_float(data.images[order[:n_holdout]], data.maximum)
    shuffle = torch.Generator().manual_seed(seed)
    batches = _Batches(data.images[order[n_holdout:]], data.maximum, config.train_batch_size, shuffle)
    vae = VaeCNN(data.image_shape, config.latent_dim).to(memory_format=torch.channels_last)
    module = VaeModule(vae, config)
    keep = KeepBest(holdout, config, progress)
    trainer = silent_trainer(device, config.max_epochs, keep)
    trainer.fit(module, train_dataloaders=batches)
    facts = {"epochs": trainer.current_epoch, "best_epoch": keep.best_epoch + 1, "holdout_loss": keep.best}
    return module.eval().to(device), facts


@torch.inference_mode()
def encode(module: VaeModule, data: ImageData, batch_size: int = 1024) -> tuple[Tensor, dict[str, float]]:
    """Posterior means (N, latent_dim) of the whole pool, float32 on the CPU, and how good they are.

    Raises:
        UserError: the latent has collapsed: no active latent, or under 20 % of the pool's variance explained.
    """
    means, errors, kls = [], 0.0, 0.0
    for block in data.images.split(batch_size):
        images = as_float(block, data.maximum).to(module.device)
        error, kl, mu = module.vae.losses(images, noise=0.0)
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
    return _checked(latents, facts), facts


@torch.inference_mode()
def posterior_means(module: VaeModule, images: Tensor, maximum: int, batch_size: int = 1024) -> Features:
    """(n, latent_dim) float32 on the CPU, for any uint8 images of the pool's shape and ``maximum``."""
    blocks = images.split(batch_size)
    return torch.cat([module.vae.encode(as_float(block, maximum).to(module.device))[0].cpu() for block in blocks])


def _total_squares(data: ImageData) -> float:
    """Sum over images and pixels of the squared distance to the pool's mean image, pixels in [0, 1]."""
    blocks = data.images.flatten(1).split(4096)
    mean = sum(block.double().sum(0) for block in blocks) / data.size
    return sum(float((block.double() - mean).square().sum()) for block in blocks) / data.maximum**2


def _checked(latents: Tensor, facts: dict[str, float]) -> Tensor:
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
