"""The folders of offline runs: wandb cannot go on with one, so that one which is not whole is written anew.

A whole one has a marker, written last; one that is being written is locked. Whoever mirrors a cell leaves a whole one
as it is, and removes what others have left behind.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dgal_bench.disk import make_writable
from dgal_bench.record import CellLog
from dgal_bench.tracking import facts
from dgal_bench.tracking.settings import runs_folder

MARKER = "dgal-bench.json"


class Lock:
    """A lock on the folder of a run until ``release`` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._file = os.open(self.folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        os.close(self._file)


class Folders:
    """The folders of runs, a folder of them for each results folder. ``images``: rounds whose picks are to be shown."""

    def __init__(self, images: Sequence[int]) -> None:
        self._images = images

    def of(self, log: CellLog) -> Path:
        return runs_folder(results_of(log))

    def prepare(self, log: CellLog) -> None:
        """Make sure that runs can be written there: wandb itself would take a temporary folder instead.

        Raises:
            ResultsError: they cannot.
        """
        folder = self.of(log)
        make_writable(folder, str(folder), "set WANDB_DIR=DIR")
        os.environ.setdefault("WANDB_DATA_DIR", str(folder))  # else pictures wait in the home for their upload

    def has(self, log: CellLog) -> bool:
        """Whether there is a whole one with all that the file says, and the pictures asked for."""
        rounds = set(self._images) & {record.round for record in log.records if record.indices}
        markers, digest = [_marker(folder) for folder in self._all(log)], facts.digest(log)
        return any(marker.get("digest") == digest and rounds <= set(marker["images"]) for marker in markers)

    def mark(self, log: CellLog, folder: Path) -> None:
        """Mark a folder as whole."""
        marker = {"cell": log.header["cell"], "digest": facts.digest(log), "images": list(self._images)}
        (folder / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")

    def clear(self, log: CellLog, lock: Lock) -> None:
        """Remove the other folders of a run that nobody writes to: 'wandb sync' would send them over this one."""
        for folder in self._all(log):
            if folder != lock.folder and not _held(folder):
                shutil.rmtree(folder, ignore_errors=True)  # another process may be at the same
        lock.release()

    def _all(self, log: CellLog) -> list[Path]:
        return sorted(self.of(log).glob(f"*run-*-{facts.names(log).id}"))


def results_of(log: CellLog) -> Path:
    """RESULTS of RESULTS/suite/dataset/strategy/seed-0.jsonl."""
    parents = log.path.absolute().parents
    return parents[min(3, len(parents) - 1)]


def _held(folder: Path) -> bool:
    try:
        file = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def _marker(folder: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return found
    return {}
