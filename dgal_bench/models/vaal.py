"""VAAL (the paper's GANVAE): a VAE and a discriminator that tells labeled from unlabeled latents."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgal_bench.config.schema import AdversarySettings
from dgal_bench.core.errors import ConfigError, NotApplicableError, UserError
from dgal_bench.core.seeding import isolated
from dgal_bench.core.types import Index
from dgal_bench.data.datamodule import halve
from dgal_bench.models.trainer import silent_trainer
from dgal_bench.models.vae import as_float
from dgal_bench.models.vae_nets import Vae, build_vae, refuse_embeddings

_HIDDEN = 512


@dataclass(frozen=True, eq=False)
class PairLoader:
    """A loader of one item, a whole training: ``steps`` times ``vae_steps`` pairs of batches.

    Labeled and unlabeled points are both drawn uniformly with replacement, so that one labeled point is enough: without
    replacement its batch would never be full (VAAL's code loops for ever there).
    """

    images: Tensor
    maximum: int
    labeled: Index
    unlabeled: Index
    batch_size: int
    steps: int
    vae_steps: int
    generator: torch.Generator

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator["PairLoader"]:
        yield self

    def draw_steps(self) -> Iterator[list[Tensor]]:
        """The batches of each step: (2b, channels, height, width) floats in [0, 1], the first b of each labeled."""
        for _ in range(self.steps):
            yield [self._batch() for _ in range(self.vae_steps)]

    def _batch(self) -> Tensor:
        ids = [
            points[torch.randint(len(points), (self.batch_size,), generator=self.generator)]
            for points in (self.labeled, self.unlabeled)
        ]
        return as_float(self.images[torch.cat(ids)], self.maximum)


class VaalModule(lightning.LightningModule):
    """The VAE learns latents that hide which images are labeled; the discriminator (512-512-1, on the means) finds out.

    VAE: ELBO(labeled) + ELBO(unlabeled) + BCE(D(mu_L), 1) + BCE(D(mu_U), 1), the error summed over pixels and the KL
    over latents (VAAL's code averages the error and sums the KL, which collapses the latent). Discriminator:
    BCE(D(mu_L), 1) + BCE(D(mu_U), 0). Manual optimisation; one Lightning step is a whole training.
    """

    automatic_optimization = False

    def __init__(self, vae: Vae, settings: AdversarySettings) -> None:
        super().__init__()
        self.vae = vae
        self.settings = settings
        self.discriminator = nn.Sequential(
            nn.Linear(settings.latent_dim, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, 1),
        )
        self.losses = (math.nan, math.nan)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """A PairLoader stays: its batches move one by one."""
        return batch

    def training_step(self, draws: PairLoader, batch_idx: int) -> None:
        vae_optimizer, optimizer = self.optimizers(use_pl_optimizer=False)  # type: ignore[misc]
        vae_loss = loss = torch.full((), math.nan)
        for batches in draws.draw_steps():
            for images in batches:
                images = images.to(self.device)
                vae_loss = _step(vae_optimizer, self.vae_loss(images))
            loss = _step(optimizer, self.discriminator_loss(images))
        self.losses = (float(vae_loss), float(loss))

    def vae_loss(self, images: Tensor) -> Tensor:
        """Of 2b images, b labeled and b unlabeled: twice the mean over all is the sum of the means of both sets."""
        noise = torch.randn(len(images), self.settings.latent_dim, device=images.device)
        error, kl, mu = self.vae.losses(images, noise)
        adversarial = -F.logsigmoid(self.discriminator(mu)).mean()  # BCE(D(mu), 1) for both sets
        return 2 * ((self.settings.recon_weight * error + kl).mean() + adversarial)

    def discriminator_loss(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            mu, _ = self.vae.encode(images)
        labeled, unlabeled = self.discriminator(mu).chunk(2)
        return -F.logsigmoid(labeled).mean() - F.logsigmoid(-unlabeled).mean()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return (
            torch.optim.Adam(self.vae.parameters(), self.settings.vae_lr, fused=True),
            torch.optim.Adam(self.discriminator.parameters(), self.settings.lr, fused=True),
        )

    @torch.inference_mode()
    def score(self, images: Tensor, maximum: int, batch_size: int = 1024) -> tuple[Tensor, int]:
        """(n,) logits of D(mu) of uint8 images, in eval mode: low = looks unlabeled.

        Also the final batch size: less than ``batch_size`` if memory ran out.
        """
        self.eval()
        logits: list[Tensor] = []
        n_done = 0
        while n_done < len(images):
            try:
                for block in images[n_done:].split(batch_size):
                    mu, _ = self.vae.encode(as_float(block, maximum).to(self.device))
                    logits.append(self.discriminator(mu)[:, 0].cpu())
                    n_done += len(block)
            except torch.OutOfMemoryError:
                pass
            if n_done < len(images):
                batch_size = halve(batch_size)
        return torch.cat(logits), batch_size


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad()
    # its own parameters only: the VAE's loss goes through the discriminator, whose gradients no step would use
    loss.backward(inputs=[parameter for group in optimizer.param_groups for parameter in group["params"]])
    optimizer.step()
    return loss.detach()


def train_vaal(
    images: Tensor,
    maximum: int,
    labeled: Index,
    unlabeled: Index,
    settings: AdversarySettings,
    seed: int,
    device: torch.device,
    steps: int,
) -> VaalModule:
    """A new VAE and discriminator, trained on both sets; the global RNGs do not change.

    Args:
        images: (N, channels, height, width) uint8.
        maximum: the pixel value that means white.
        labeled: positions, at least one.
        unlabeled: positions, at least one.
        settings: see AdversarySettings.
        seed: of initial weights, batches and noise.
        device: where to train.
        steps: see ``AdversarySettings.steps``.

    Raises:
        NotApplicableError: embeddings, or images too small for a VAE.
        UserError: the losses are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = PairLoader(
        images, maximum, labeled, unlabeled, settings.train_batch_size, steps, settings.vae_steps, generator
    )
    with isolated(seed, "adversary"):
        module = VaalModule(_vae_for(images, settings), settings)
        # the mode that the round's own Trainer set
        trainer = silent_trainer(device, 1, deterministic=torch.are_deterministic_algorithms_enabled())
        trainer.fit(module, train_dataloaders=draws)
    if not all(math.isfinite(loss) for loss in module.losses):
        vae_loss, loss = module.losses
        raise UserError(
            f"the adversary's losses are {vae_loss:.3g} (VAE) and {loss:.3g} (discriminator) after {steps} steps: "
            "lower strategy.acquire.vae_lr or strategy.acquire.lr"
        )
    return module.to(device)


def _vae_for(images: Tensor, settings: AdversarySettings) -> Vae:
    try:
        refuse_embeddings(images, "choose another strategy than ganvae")
        channels, height, width = images.shape[1:]
        return build_vae((channels, height, width), settings.latent_dim, settings.encoder)
    except ConfigError as error:
        raise NotApplicableError(str(error)) from error
