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
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dgal_bench.config.schema import RepresentationConfig, to_dict
from dgal_bench.core.errors import ConfigError, DataError, UserError, innermost_error
from dgal_bench.core.system import thread_environment
from dgal_bench.core.types import Progress
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.models.vae import Share, VaeModule, fit
from dgal_bench.models.vae_nets import build_vae

# The processes of a distributed training as their parent sees them: started, followed to the end, and ended.


# What a process may raise that is its user's to mend; the rest is reported with its type and place.
_ERRORS = {error.__name__: error for error in (UserError, ConfigError, DataError)}

# Seconds that the others have, when one process fails, to say why: the first to be heard may only have lost its peer.
_GRACE = 5.0


Events: TypeAlias = "queue.SimpleQueue[tuple[RankProcess, dict[str, Any] | None]]"


class RankProcess:
    """One of the processes as their parent sees it: puts its events there as they come, and None at its end."""

    def __init__(self, folder: Path, number: int, of: int, threads: int, events: Events) -> None:
        self.name = f"process {number + 1} of the {of} that train the VAE"
        self._events = events
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dgal_bench.models.distributed", str(folder), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=os.environ | _environment(threads),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # and not what some library says while it is imported
                self._events.put((self, json.loads(line)))
        self._events.put((self, None))

    def exit_message(self) -> UserError:
        """Of a process that ended without a word."""
        code = self._process.wait()
        self._stderr.seek(0)
        last = self._stderr.read().strip().rpartition("\n")[2]
        if code >= 0:
            return UserError(f"{self.name} ended with exit code {code}" + (f": {last}" if last else ""))
        return UserError(
            f"{self.name} was killed by signal {-code}: if memory ran out, lower trainer.devices or "
            "representation.train_batch_size"
        )

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            assert pipe is not None
            pipe.close()


def _environment(threads: int) -> dict[str, str]:
    """Thread counts before torch is imported (Lightning sets its own where there is none); gloo on this host alone."""
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return thread_environment(threads) | ({"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {})


def follow(ranks: Sequence[RankProcess], events: Events, progress: Progress) -> dict[str, float]:
    """Wait for all; returns what the first reports of the training, or raises what went wrong first of all."""
    facts: dict[str, float] = {}
    running, heard = set(ranks), set[RankProcess]()
    troubles: list[Exception] = []
    deadline = float("inf")
    while running and (left := deadline - monotonic()) > 0:
        try:
            rank, event = events.get(timeout=left if troubles else None)
        except queue.Empty:
            break
        if event is None:
            running.discard(rank)
            troubles += [] if rank in heard else [rank.exit_message()]
        elif event["event"] == "progress":
            progress(event["what"], event["n"], event["of"])
        else:
            heard.add(rank)
            facts |= event.get("facts", {})
            troubles += [_error(rank, event)] if event["event"] == "failed" else []
        deadline = min(deadline, monotonic() + _GRACE) if troubles else deadline
    if troubles:
        # A lost peer is an error too, but never the reason.
        raise min(troubles, key=lambda error: not isinstance(error, UserError))
    return facts


def _error(rank: RankProcess, event: dict[str, Any]) -> Exception:
    if event["kind"] in _ERRORS:
        return _ERRORS[event["kind"]](event["error"])
    return RuntimeError(f"{rank.name} failed: {event['error']}")


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
        ranks: list[RankProcess] = []
        events: Events = queue.SimpleQueue()
        try:
            for number in range(devices):
                ranks.append(RankProcess(folder, number, devices, threads, events))
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


class _Siblings(LightningEnvironment):
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
    strategy = DDPStrategy(cluster_environment=_Siblings(rank), process_group_backend=backend)
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
        text = " ".join(str(error).split()) if isinstance(error, UserError) else innermost_error(error)
        emit("failed", kind=type(error).__name__, error=text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
