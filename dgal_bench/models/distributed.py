"""A VAE trained by several processes, one for each device, with Lightning's DDP.

``python -m dgal_bench.models.distributed FOLDER RANK`` is one of them. The parent starts them all, passes images,
settings and initial weights in a folder, follows their events (JSON lines on stdout) and reads the weights from the
folder. A process ends when its stdin closes, so that none outlives a killed parent; when one fails, the parent ends
the others. They meet through a file in the folder, which needs no free port and no MASTER_ADDR in the environment.
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

_JOB, _IMAGES, _INITIAL, _WEIGHTS, _MEETING = (
    "job.json", "images.npy", "initial.safetensors", "weights.safetensors", "meeting",
)  # fmt: skip

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}

Events: TypeAlias = "queue.SimpleQueue[tuple[RankProcess, dict[str, Any] | None]]"


def fit_distributed(
    module: VaeModule, images: Tensor, maximum: int, device: torch.device, progress: Progress, devices: int
) -> dict[str, float]:
    """``vae.fit`` by ``devices`` processes: the same batches, of which each takes every ``devices``-th row.

    Each gets its share of torch's threads here, at least one. Gradients are those of the mean over the whole batch, so
    that the result differs from that of one process only by rounding.

    Raises:
        ConfigError: fewer GPUs than ``devices``.
        UserError: as in ``fit``, or a process was killed.
        RuntimeError: a process crashed.
    """
    if device.type == "cuda" and (available := torch.cuda.device_count()) < devices:
        raise ConfigError(
            f"trainer.devices={devices}, but torch sees {available} of them: use trainer.devices={available}"
        )
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
    """The .npy whose memory map, all of it, a tensor is; None: there is none, or the system cannot tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or not images.is_contiguous():
        return None
    for line in maps.read_text().splitlines():
        span, _, offset, _, _, *name = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in span.split("-"))
        if start <= images.data_ptr() < end and name and name[0].endswith(".npy"):
            array = np.load(name[0], mmap_mode="r", allow_pickle=False)
            whole = array.shape == images.shape and array.dtype == images.numpy().dtype and array.flags.c_contiguous
            position = images.data_ptr() - start + int(offset, 16)
            return Path(name[0]) if whole and array.offset == position else None
    return None


def _save(module: nn.Module, path: Path) -> None:
    # contiguous: safetensors has no channels_last; loading copies into the layout of the module
    save_file({name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}, path)


class RankProcess:
    """The parent's handle of one process; puts its events into ``events``, and None when it ends."""

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

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # else a library printed it while it was imported
                self._events.put((self, json.loads(line)))
        self._events.put((self, None))

    def exit_message(self) -> UserError:
        """For a process that ended without an event."""
        code = self._process.wait()
        self._stderr.seek(0)
        last_line = self._stderr.read().strip().rpartition("\n")[2]
        if code >= 0:
            return UserError(f"{self.name} ended with exit code {code}" + (f": {last_line}" if last_line else ""))
        return UserError(
            f"{self.name} was killed by signal {-code}: if memory ran out, lower trainer.devices or "
            "representation.train_batch_size"
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            assert pipe is not None
            pipe.close()


def _environment(threads: int) -> dict[str, str]:
    """Thread counts before torch is imported (Lightning sets its own if none is set); gloo on this host only."""
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return thread_environment(threads) | ({"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {})


# Seconds to wait for the other processes after one fails: it may have failed only because it lost another.
_GRACE = 5.0


def follow(ranks: Sequence[RankProcess], events: Events, progress: Progress) -> dict[str, float]:
    """Wait for all; returns the facts that rank 0 reports, or raises the first error that is a cause."""
    facts: dict[str, float] = {}
    running, reported = set(ranks), set[RankProcess]()
    errors: list[Exception] = []
    deadline = float("inf")
    while running and (seconds := deadline - monotonic()) > 0:
        try:
            rank, event = events.get(timeout=seconds if errors else None)
        except queue.Empty:
            break
        if event is None:
            running.discard(rank)
            errors += [] if rank in reported else [rank.exit_message()]
        elif event["event"] == "progress":
            progress(event["what"], event["n"], event["of"])
        else:
            reported.add(rank)
            facts |= event.get("facts", {})
            errors += [_error(rank, event)] if event["event"] == "failed" else []
        deadline = min(deadline, monotonic() + _GRACE) if errors else deadline
    if errors:
        # A UserError first: the loss of another process is an error too, but never the cause.
        raise min(errors, key=lambda error: not isinstance(error, UserError))
    return facts


# Errors that the user can mend; any other is reported with its type and place.
_ERRORS = {error.__name__: error for error in (UserError, ConfigError, DataError)}


def _error(rank: RankProcess, event: dict[str, Any]) -> Exception:
    if event["kind"] in _ERRORS:
        return _ERRORS[event["kind"]](event["error"])
    return RuntimeError(f"{rank.name} failed: {event['error']}")


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library's output must not be read as an event
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()

    def emit(event: str, **facts: Any) -> None:
        events.write(json.dumps({"event": event, **facts}) + "\n")

    def progress(what: str, done: int, of: int) -> None:
        if rank == 0:  # all ranks progress alike
            emit("progress", what=what, n=done, of=of)

    silence_lightning()
    try:
        emit("done", facts=_train(folder, rank, progress))
    except Exception as error:  # noqa: BLE001 - the boundary: the parent decides what a failure means
        text = " ".join(str(error).split()) if isinstance(error, UserError) else innermost_error(error)
        emit("failed", kind=type(error).__name__, error=text)


def _train(folder: Path, rank: int, progress: Progress) -> dict[str, float]:
    """This process's part; rank 0 saves the weights in the folder."""
    job = json.loads((folder / _JOB).read_text())
    # copy-on-write: torch takes only writable arrays
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
    strategy = DDPStrategy(cluster_environment=_RankEnvironment(rank), process_group_backend=backend)
    facts = fit(module, images, job["maximum"], device, progress, Share(rank, world), strategy)
    torch.distributed.destroy_process_group()
    if rank > 0:
        return {}
    _save(module, folder / _WEIGHTS)
    return facts


class _RankEnvironment(LightningEnvironment):
    """Tells Lightning that the processes exist already, and the rank of this one; reads no environment variable."""

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


def _end_with_parent(folder: Path) -> NoReturn:
    os.read(0, 1)  # returns at the end of stdin; sys.stdin would be locked when the interpreter shuts down
    shutil.rmtree(folder, ignore_errors=True)  # the parent was killed before it could
    os._exit(1)


if __name__ == "__main__":
    main()
