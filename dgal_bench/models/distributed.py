"""A VAE trained by several processes, one for each device, with Lightning's DDP.

``python -m dgal_bench.models.distributed FOLDER RANK`` is one of them. The parent starts them all, hands over images,
settings and initial weights in a folder, follows their events (JSON lines on stdout) and takes the weights back out
of the folder. A process ends when its stdin does, so that none outlives a killed parent; when one fails, the parent
ends the others. They meet through a file in the folder: no port to be found free, no MASTER_ADDR in any environment.
"""

import json
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dgal_bench.arrays import Progress
from dgal_bench.config import RepresentationConfig, to_dict
from dgal_bench.errors import ConfigError, UserError, innermost
from dgal_bench.models.ranks import Events, Rank, follow
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.models.vae import VaeModule, fit
from dgal_bench.models.vae_batches import Share
from dgal_bench.models.vae_nets import build_vae

_JOB, _IMAGES, _INITIAL, _WEIGHTS, _MEETING = (
    "job.json", "images.npy", "initial.safetensors", "weights.safetensors", "meeting",
)  # fmt: skip

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def fit_side_by_side(
    module: VaeModule, images: Tensor, maximum: int, device: torch.device, progress: Progress, devices: int
) -> dict[str, float]:
    """``vae.fit`` by ``devices`` processes: the same batches, of which each takes every ``devices``-th row.

    Each gets its share of the threads that torch has here, at least one. Gradients are those of the mean over the
    whole batch, so that only rounding tells the result from that of one process.

    Raises:
        ConfigError: fewer GPUs than ``devices``.
        UserError: whatever ``fit`` raises, or a process was killed.
        RuntimeError: a process crashed.
    """
    if device.type == "cuda" and (found := torch.cuda.device_count()) < devices:
        raise ConfigError(f"trainer.devices={devices}, but torch sees {found} of them: use trainer.devices={found}")
    threads = max(1, torch.get_num_threads() // devices)
    with tempfile.TemporaryDirectory(prefix="dgal-vae-") as name:
        folder = Path(name)
        file = backing_file(images)
        if file is None:
            file = folder / _IMAGES
            np.save(file, images.numpy(), allow_pickle=False)
        job = {"config": to_dict(module.config), "seed": module.seed, "maximum": maximum, "images": str(file)}
        job |= {"device": device.type, "devices": devices, "threads": threads}
        (folder / _JOB).write_text(json.dumps(job))
        _save(module, folder / _INITIAL)
        progress(f"starting {devices} processes", 0, 1)
        ranks: list[Rank] = []
        events: Events = queue.SimpleQueue()
        try:
            for number in range(devices):
                ranks.append(Rank(folder, number, devices, threads, events))
            facts = follow(ranks, events, progress)
        finally:
            for rank in ranks:
                rank.end()
        module.load_state_dict(load_file(folder / _WEIGHTS))
    return {**facts, "devices": devices}


def backing_file(images: Tensor) -> Path | None:
    """The .npy of which a tensor is the memory map, all of it; None where there is none or the system does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or not images.is_contiguous():
        return None
    for line in maps.read_text().splitlines():
        span, _, offset, _, _, *name = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in span.split("-"))
        if start <= images.data_ptr() < end and name and name[0].endswith(".npy"):
            array = np.load(name[0], mmap_mode="r", allow_pickle=False)
            whole = array.shape == images.shape and array.dtype == images.numpy().dtype and array.flags.c_contiguous
            at = images.data_ptr() - start + int(offset, 16)
            return Path(name[0]) if whole and array.offset == at else None
    return None


def _save(module: nn.Module, path: Path) -> None:
    # contiguous: safetensors knows no channels_last; loading copies into whatever layout a module has
    save_file({name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}, path)


class _Beside(LightningEnvironment):
    """Tells Lightning that the processes are there already, and which this one is; reads no environment variable."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0


def _train(folder: Path, rank: int, progress: Progress) -> dict[str, float]:
    """This process's part; the first leaves the weights in the folder."""
    job = json.loads((folder / _JOB).read_text())
    # copy-on-write: torch takes only arrays that could be written to
    images = torch.from_numpy(np.load(job["images"], mmap_mode="c", allow_pickle=False))
    config = RepresentationConfig(**job["config"])
    channels, height, width = images.shape[1:]
    module = VaeModule(build_vae((channels, height, width), config.latent_dim, config.encoder), config, job["seed"])
    module.load_state_dict(load_file(folder / _INITIAL))
    torch.set_num_threads(job["threads"])
    device, world, backend = torch.device(job["device"]), job["devices"], _BACKENDS[job["device"]]
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.FileStore(str(folder / _MEETING), world),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world,
        device_id=torch.device("cuda", rank) if device.type == "cuda" else None,
    )
    strategy = DDPStrategy(cluster_environment=_Beside(rank), process_group_backend=backend)
    facts = fit(module, images, job["maximum"], device, progress, Share(rank, world), strategy)
    torch.distributed.destroy_process_group()
    if rank > 0:
        return {}
    _save(module, folder / _WEIGHTS)
    return facts


def _end_with_parent(folder: Path) -> NoReturn:
    os.read(0, 1)  # nothing is ever written there; sys.stdin would be locked when the interpreter shuts down
    shutil.rmtree(folder, ignore_errors=True)  # the parent's to do, had it not been killed
    os._exit(1)


def main(folder: Path, rank: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an event
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()

    def emit(event: str, **facts: Any) -> None:
        events.write(json.dumps({"event": event, **facts}) + "\n")

    def tell(what: str, done: int, of: int) -> None:
        emit("progress", what=what, n=done, of=of)

    def nobody(what: str, done: int, of: int) -> None:
        """All are as far as the first."""

    silence_lightning()
    try:
        emit("done", facts=_train(folder, rank, tell if rank == 0 else nobody))
    except Exception as error:  # noqa: BLE001 - the boundary: the parent decides what a failure means
        text = " ".join(str(error).split()) if isinstance(error, UserError) else innermost(error)
        emit("failed", kind=type(error).__name__, error=text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
