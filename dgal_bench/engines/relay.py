"""What a Slurm job runs: a worker process of its own, whose events go into a file that the command reads."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dgal_bench.engines.base import Event
from dgal_bench.process import Worker


def relay(job: Mapping[str, Any], environment: Mapping[str, str], events: str) -> None:
    """Do a job in a fresh process of that environment, which is set before torch is imported there."""
    worker = Worker(environment)
    try:
        with Path(events).open("a") as file:
            for event in worker.run(job):
                file.write(json.dumps(event) + "\n")
                file.flush()
            os.fsync(file.fileno())
    finally:
        worker.close()


class Tail:
    """A file of events as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def __call__(self) -> Iterator[Event]:
        """The events that have come since the last call."""
        try:  # opened, not looked at: NFS says a size of up to a minute ago
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return  # the job waits in a queue
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            if (event := _parsed(line)) is not None:
                yield event


def _parsed(line: bytes) -> Event | None:
    """None: a torn line, or none at all."""
    try:
        event: Event = json.loads(line)
    except ValueError:
        return None
    return event
