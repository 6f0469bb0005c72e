"""Makes every Lightning Trainer of the package: silent, deterministic by default, on one device except for a VAE."""

import logging
import warnings

import lightning
import torch
from lightning.pytorch.strategies import Strategy


def silence_lightning() -> None:
    """Hide its hints, and torch's: they say nothing about a run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torch")


def silent_trainer(
    device: torch.device,
    max_epochs: int,
    *callbacks: lightning.Callback,
    deterministic: bool = True,
    strategy: Strategy | None = None,
    devices: int = 1,
) -> lightning.Trainer:
    """A new Trainer, for one ``fit``: a second one would train nothing. It logs, prints and saves nothing.

    ``deterministic``: deterministic algorithms only, no cuDNN benchmark, no TF32. ``strategy``: for one of
    several processes, on ``devices`` devices of the kind of ``device``.
    """
    torch.backends.cudnn.allow_tf32 = not deterministic
    # A debugging aid of deterministic mode fills every new tensor with NaN: 5 % of a tiny network's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return lightning.Trainer(
        max_epochs=max_epochs,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=devices,
        strategy=strategy or "auto",
        use_distributed_sampler=False,  # each process loads its own share already
        deterministic=deterministic,
        benchmark=False,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
