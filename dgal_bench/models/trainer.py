"""The one way a Lightning Trainer is made here: silent, exact when asked to be, on one device but for a VAE's."""

import logging
import warnings

import lightning
import torch
from lightning.pytorch.strategies import Strategy


def silence_lightning() -> None:
    """Its hints and tips, and torch's, say nothing about a run."""
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
    """A new Trainer, for one ``fit``: a second of the same one trains nothing. It logs, prints and saves nothing.

    ``deterministic``: deterministic algorithms only, no cuDNN benchmark, no TF32. ``strategy``: that of one of
    several processes on ``devices`` devices of the kind of ``device``.
    """
    torch.backends.cudnn.allow_tf32 = not deterministic
    # Debugging aid of deterministic mode that fills every new tensor with NaN: a twentieth of a tiny network's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return lightning.Trainer(
        max_epochs=max_epochs,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=devices,
        strategy=strategy or "auto",
        use_distributed_sampler=False,  # the loader's batches are shared out already
        deterministic=deterministic,
        benchmark=False,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
