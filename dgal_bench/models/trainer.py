"""Makes every Lightning Trainer of the package: silent, deterministic by default, on one device except for a VAE."""

import logging
import multiprocessing
import os
import socket
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import NoReturn

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from dgal_bench.core.errors import UserError
from dgal_bench.core.system import thread_environment
from dgal_bench.core.types import Progress


def silence_lightning() -> None:
    """Hide its hints, and torch's: they say nothing about a run."""
    for name in ("lightning.pytorch", "lightning.fabric", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torch")


def silent_trainer(
    device: torch.device, max_epochs: int, *callbacks: lightning.Callback, deterministic: bool = True, devices: int = 1
) -> lightning.Trainer:
    """A new Trainer, for one ``fit``: a second one would train nothing. It logs, prints and saves nothing.

    ``deterministic``: deterministic algorithms only, no cuDNN benchmark, no TF32. ``devices``: more than one: a process
    for each, of the kind of ``device``; make and use it within ``spawning``.
    """
    _set_backends(deterministic)
    return lightning.Trainer(
        max_epochs=max_epochs,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=devices,
        strategy=SpawnedProcesses(device, deterministic) if devices > 1 else "auto",
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


def _set_backends(deterministic: bool) -> None:
    """What Lightning does not set, neither here nor in a process that it starts."""
    torch.backends.cudnn.allow_tf32 = not deterministic
    # A debugging aid of deterministic mode fills every new tensor with NaN: 5 % of a tiny network's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class SpawnedProcesses(DDPStrategy):
    """Lightning's DDP in new processes, which end with this one; only within ``spawning``."""

    def __init__(self, device: torch.device, deterministic: bool) -> None:
        super().__init__(
            cluster_environment=LightningEnvironment(),
            process_group_backend="nccl" if device.type == "cuda" else "gloo",
            start_method="spawn",
        )
        self.deterministic = deterministic

    def setup_environment(self) -> None:
        """In each of the processes, before they meet."""
        silence_lightning()
        _set_backends(self.deterministic)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().setup_environment()


def _end_with_parent() -> NoReturn:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# What a cluster's launcher or torchrun leaves for torch and Lightning to read.
_LAUNCHERS = (
    "MASTER_ADDR", "MASTER_PORT", "STANDALONE_PORT", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK",
    "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip


@contextmanager
def spawning(devices: int, progress: Progress) -> Iterator[Progress]:
    """In here a Trainer may start ``devices`` processes, each with its share of torch's threads, at least one.

    Yields:
        A function to call in any of them: ``progress`` is then called here, in a thread.

    Raises:
        UserError: a process was killed, or the images do not fit in shared memory.
        RuntimeError: a process crashed.
    """
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)

    def forward() -> None:
        for step in iter(receiver.recv, None):
            progress(*step)

    thread = threading.Thread(target=forward)
    thread.start()
    before = dict(os.environ)
    try:
        with tempfile.TemporaryDirectory(prefix="dgal-vae-") as folder:
            for name in _LAUNCHERS:
                os.environ.pop(name, None)
            # TMPDIR: Lightning brings the weights back in a folder that it does not remove
            os.environ |= thread_environment(max(1, torch.get_num_threads() // devices)) | {"TMPDIR": folder}
            loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
            os.environ |= {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}
            yield partial(_send, sender)
    except ProcessException as error:
        raise _first_failure(error, devices) from error
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise UserError(
            "the images do not fit in shared memory, from which all processes of the VAE read them: enlarge /dev/shm "
            "(docker: --shm-size), or use trainer.devices=1"
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(before)
        sender.send(None)
        thread.join()


def _send(sender: Connection, *step: str | int) -> None:
    sender.send(step)


def _first_failure(error: ProcessException, devices: int) -> Exception:
    name = f"process {error.error_index + 1} of the {devices} that train the VAE"
    if not isinstance(error, ProcessExitedException):
        return RuntimeError(f"{name} failed: {error.msg.strip().splitlines()[-1]}")  # its traceback's last line
    how = f"was killed by {error.signal_name}" if error.signal_name else f"ended with exit code {error.exit_code}"
    return UserError(f"{name} {how}: if memory ran out, lower trainer.devices or representation.train_batch_size")
