"""The processes of a distributed training as their parent sees them: started, followed to the end, and ended."""

import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias

from dgal_bench.arrays import Progress
from dgal_bench.errors import ConfigError, DataError, UserError
from dgal_bench.threads import thread_environment

# What a process may raise that is its user's to mend; the rest is reported with its type and place.
_ERRORS = {error.__name__: error for error in (UserError, ConfigError, DataError)}

# Seconds that the others have, when one process fails, to say why: the first to be heard may only have lost its peer.
_GRACE = 5.0


Events: TypeAlias = "queue.SimpleQueue[tuple[Rank, dict[str, Any] | None]]"


class Rank:
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

    def epitaph(self) -> UserError:
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


def follow(ranks: Sequence[Rank], events: Events, progress: Progress) -> dict[str, float]:
    """Wait for all; returns what the first reports of the training, or raises what went wrong first of all."""
    facts: dict[str, float] = {}
    running, heard = set(ranks), set[Rank]()
    troubles: list[Exception] = []
    deadline = float("inf")
    while running and (left := deadline - monotonic()) > 0:
        try:
            rank, event = events.get(timeout=left if troubles else None)
        except queue.Empty:
            break
        if event is None:
            running.discard(rank)
            troubles += [] if rank in heard else [rank.epitaph()]
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


def _error(rank: Rank, event: dict[str, Any]) -> Exception:
    if event["kind"] in _ERRORS:
        return _ERRORS[event["kind"]](event["error"])
    return RuntimeError(f"{rank.name} failed: {event['error']}")
