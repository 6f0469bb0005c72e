"""What benchmarks/training.py times: a round's training, a bare loop, and Lightning as it is usually used.

Each maker makes a network and its loaders anew and returns the training: the same first weights, the same order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from time import perf_counter

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks import inputs
from benchmarks.repetitions import Maker
from dgal_bench.config.schema import RunConfig
from dgal_bench.core.seeding import isolated, torch_rng_for
from dgal_bench.data.datamodule import PoolDataModule, Standardise
from dgal_bench.data.image_data import ImageData
from dgal_bench.models.task import TaskModule, fit, new_trainer
from dgal_bench.models.trainer import silent_trainer

OURS, BARE, USUAL = "Lightning, slices: ours", "bare loop, slices", "Lightning, per-item DataLoader"
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training leaves: the weights, the seconds before its first epoch, and the times when epochs ended."""

    weights: Mapping[str, Tensor]
    construction: float
    ends: Sequence[float]

    @property
    def per_epoch(self) -> float:
        """Median seconds from end to end of an epoch, the first one with Lightning's set-up not among them."""
        return median(later - earlier for earlier, later in pairwise(self.ends))


class EpochEnds(lightning.Callback):
    """Notes when epochs end; it costs Lightning a microsecond each."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.times.append(perf_counter())


class UsualModule(lightning.LightningModule):
    """Training as Lightning's own guide shows it: a loss a minibatch, Lightning steps the optimizer."""

    def __init__(self, module: TaskModule) -> None:
        super().__init__()
        self.task = module

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.task.net(images)[0], labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.task.configure_optimizers()


class Drawn(Sampler[int]):
    """Positions in the order that slices have: a draw from the same generator every epoch."""

    def __init__(self, ids: Tensor, order: torch.Generator) -> None:
        self.ids, self.order = ids, order

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids[torch.randperm(len(self.ids), generator=self.order)].tolist())


class SingleImages(Dataset[tuple[Tensor, int]]):
    """One image at a time, normalised by the slices' own arithmetic: from other roundings other weights would grow."""

    def __init__(self, data: ImageData, transform: Standardise) -> None:
        self.images, self.labels, self.transform = data.images, data.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index : index + 1])[0], self.labels[index]


@dataclass(frozen=True, eq=False)
class Task:
    """The first ``n_labeled`` of the images, to be trained on for ``config.training.max_epochs`` epochs exactly."""

    config: RunConfig
    data: ImageData
    transform: Standardise
    n_labeled: int

    @classmethod
    def of(cls, data: ImageData, n_labeled: int, epochs: int) -> "Task":
        never = [f"training.{name}={epochs}" for name in ("max_epochs", "min_epochs")]
        config = inputs.settings(*never, f"training.patience={epochs + 1}")
        return cls(config, data, inputs.standardise(config, data), n_labeled)

    def parts(self) -> tuple[TaskModule, PoolDataModule]:
        """The network and the loaders, made anew: every training begins with the same weights and the same order."""
        pool = inputs.first_pool(self.data, self.n_labeled)
        slices = inputs.datamodule(self.config, self.data, pool, self.transform)
        return inputs.new_module(self.config, self.data), slices


def trainings(task: Task) -> dict[str, Maker]:
    """By name: what makes a network and its loaders and returns the training of it."""
    return {
        OURS: lambda: in_a_round(task),
        BARE: lambda: bare(task),
        USUAL: lambda: usual(task),
    }


def in_a_round(task: Task) -> Callable[[], Trained]:
    module, slices = task.parts()
    stop, ends = module.stop, list[float]()

    def noted(loss: float, epochs: int) -> bool:
        ends.append(perf_counter())
        return stop(loss, epochs)

    module.stop = noted  # a step of Lightning's is several epochs where they are short

    def call() -> Trained:
        with isolated(task.config.seed, "training", 0):
            start = perf_counter()
            trainer = new_trainer(task.config, _CPU)
            construction = perf_counter() - start
            fit(trainer, module, slices)
        return Trained(module.net.state_dict(), construction, ends)

    return call


def bare(task: Task) -> Callable[[], Trained]:
    """The least that trains: no Trainer, no loss kept, no deterministic mode, nothing that could stop it."""
    module, slices = task.parts()
    net, training = module.net.train(), task.config.training

    def call() -> Trained:
        torch.use_deterministic_algorithms(False)  # a Trainer has left it on
        start = perf_counter()
        optimizer = torch.optim.SGD(
            net.parameters(), training.lr, momentum=training.momentum, weight_decay=training.weight_decay
        )
        loss_of = nn.CrossEntropyLoss()
        minibatches = slices.train_dataloader().minibatches
        construction, ends = perf_counter() - start, []
        for _ in range(training.max_epochs):
            for images, labels in minibatches:
                loss = loss_of(net(images)[0], labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            ends.append(perf_counter())
        return Trained(net.state_dict(), construction, ends)

    return call


def usual(task: Task) -> Callable[[], Trained]:
    """A Trainer with the same settings, but single images and Lightning's own optimisation."""
    module, slices = task.parts()
    images = SingleImages(task.data, task.transform)
    sampler = Drawn(slices.pool.labeled, torch_rng_for(task.config.seed, "order", 0))
    loader = DataLoader(images, task.config.training.train_batch_size, sampler=sampler)
    wrapped = UsualModule(module)

    def call() -> Trained:
        with isolated(task.config.seed, "training", 0):
            start = perf_counter()
            trainer = silent_trainer(_CPU, task.config.training.max_epochs, ends := EpochEnds())
            construction = perf_counter() - start
            trainer.fit(wrapped, loader)
        return Trained(module.net.state_dict(), construction, ends.times)

    return call
