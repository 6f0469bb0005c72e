"""TaskModule: the classifier trained from scratch in every round, and the rule that stops its training."""

import math
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from dgal_bench.config.schema import RunConfig, TrainingConfig
from dgal_bench.core.errors import UserError, choose
from dgal_bench.data.datamodule import PoolDataModule, SliceLoader
from dgal_bench.models.trainer import silent_trainer

# The sum of squares of thousands of such features still fits float32.
_LARGEST_FEATURE = 1e17

# Per Lightning step: so many make the cost of its hooks small.
_MINIBATCHES = 32


class TaskModule(lightning.LightningModule):
    """Cross-entropy on the labeled points; ``epoch_loss`` is the last epoch's mean training loss in nats.

    One Lightning step is so many passes over the labeled set that they make 32 minibatches, at least one (manual
    optimisation): its hooks around a step and an epoch cost up to 2 ms, as much as the step of a tiny network.
    ``epochs`` counts passes; ``stop`` is called after each.
    """

    automatic_optimization = False

    def __init__(self, net: nn.Module, n_classes: int, training: TrainingConfig, amp: bool = False) -> None:
        super().__init__()
        self.net = net
        self.amp = amp
        self.training_config = training
        self.loss = nn.CrossEntropyLoss()
        self.accuracy = MulticlassAccuracy(n_classes, average="micro")
        self.stop = StopWhenFlat(training, chance=math.log(n_classes))
        self.epochs = 0
        self._loss_sum = torch.zeros(())
        self._seen = 0

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """A SliceLoader stays: its minibatches move one by one."""
        return (
            batch if isinstance(batch, SliceLoader) else super().transfer_batch_to_device(batch, device, dataloader_idx)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (b, C) and features (b, feature_dim) in float32, computed in bfloat16 if ``amp`` is true."""
        if not self.amp:
            return self.net(images)  # type: ignore[no-any-return]
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits, features = self.net(images)
        return logits.float(), features.float()

    def training_step(self, labeled: SliceLoader, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        for _ in range(max(1, _MINIBATCHES // len(labeled))):
            self._train_epoch(labeled, optimizer)
            self.epochs += 1
            if self.stop(self.epoch_loss, self.epochs) or self.epochs == self.training_config.max_epochs:
                self.trainer.should_stop = True
                return

    def _train_epoch(self, labeled: SliceLoader, optimizer: torch.optim.Optimizer) -> None:
        total, self._seen = torch.zeros((), device=self.device), 0
        for images, labels in labeled:
            loss = self.loss(self(images.to(self.device))[0], labels.to(self.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(labels)
            self._seen += len(labels)
        self._loss_sum = total

    @property
    def epoch_loss(self) -> float:
        return float(self._loss_sum) / max(1, self._seen)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits, features = self(images)
        check_outputs(logits, features)
        self.accuracy.update(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.training_config
        optimizers: dict[str, Any] = {
            "sgd": lambda: torch.optim.SGD(
                self.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
            ),
            # fused: one kernel over all parameters, a fifth off the step of a tiny net
            "adam": lambda: torch.optim.Adam(
                self.parameters(), config.lr, weight_decay=config.weight_decay, fused=True
            ),
        }
        optimizer: torch.optim.Optimizer = choose(optimizers, config.optimizer, "training.optimizer")()
        return optimizer


def check_outputs(logits: Tensor, features: Tensor) -> None:
    """Raises UserError for outputs that cannot be ranked: NaN, or features whose squares overflow."""
    if torch.isnan(logits.sum()) and (n_nan := int(logits.isnan().any(dim=1).sum())):
        raise UserError(
            f"the network answers NaN for {n_nan} of {len(logits)} images: its training has diverged, lower training.lr"
        )
    if not (largest := float(features.abs().amax())) < _LARGEST_FEATURE:
        raise UserError(
            f"the network's features reach {largest:.2g}, their distances overflow: its training has diverged, "
            "lower training.lr"
        )


class StopWhenFlat:
    """Stop after ``patience`` epochs without an improvement of ``min_delta`` nats of the epoch-mean training loss.

    Only with the loss below (ln C)/2 and after ``min_epochs``: the loss of a small set stays at chance for dozens of
    epochs, and without ``min_delta`` it improves for ever (the paper, App. A, gives only the patience, 10).
    """

    def __init__(self, training: TrainingConfig, chance: float) -> None:
        self.config = training
        self.chance = chance
        self.best = math.inf
        self.stale = 0

    def __call__(self, loss: float, epochs: int) -> bool:
        """Whether to stop after so many epochs, the last of this loss; to be called after each epoch."""
        if loss < self.best - self.config.min_delta:
            self.best, self.stale = loss, 0
            return False
        self.stale += 1
        armed = loss < self.chance / 2 and epochs >= self.config.min_epochs
        return armed and self.stale >= self.config.patience


@dataclass(frozen=True)
class Fit:
    """How one training ended: its epochs, the last one's mean loss in nats, and whether that is (ln C)/2 or more."""

    epochs: int
    train_loss: float
    underfit: bool


def new_trainer(config: RunConfig, device: torch.device) -> lightning.Trainer:
    """The Trainer of one round."""
    return silent_trainer(device, config.training.max_epochs, deterministic=config.deterministic)


def fit(trainer: lightning.Trainer, module: TaskModule, data: PoolDataModule) -> Fit:
    """Train on the labeled points until the loss is flat (paper, App. A)."""
    trainer.fit(module, datamodule=data)
    loss = module.epoch_loss
    if not math.isfinite(loss):
        raise UserError(f"the training loss is {loss} after {module.epochs} epochs: lower training.lr")
    return Fit(epochs=module.epochs, train_loss=loss, underfit=loss >= math.log(data.pool.n_classes) / 2)


def measure_accuracy(trainer: lightning.Trainer, module: TaskModule, data: PoolDataModule) -> float:
    """Share of the test split classified right, in 0..1; out of memory, it restarts with half the images at a time."""
    done = False
    while not done:
        module.accuracy.reset()
        try:
            trainer.test(module, datamodule=data, verbose=False)
            done = True
        except torch.OutOfMemoryError:
            pass
        if not done:  # after the except block, whose traceback holds the pass's memory
            data.halve_batch()
    return float(module.accuracy.compute())
