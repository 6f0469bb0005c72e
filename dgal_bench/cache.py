"""A content-addressed folder of arrays: made once under a lock, written whole, its hashes checked on every load."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dgal_bench.errors import ResultsError

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]
_MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class Entry:
    """The arrays of one key, and the facts their maker left: the ledger."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    sha256: str


def key_of(parts: Mapping[str, Any]) -> str:
    """20 hex digits that depend on every part."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def get_or_make(root: Path, key: str, make: Callable[[], tuple[Arrays, Mapping[str, Any]]]) -> Entry:
    """The entry under ``root/key``, made by ``make() -> (arrays, facts)`` where it is missing or does not check out.

    Raises:
        ResultsError: the folder cannot be written.
    """
    folder = root / key
    with _usable(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f"{key}.lock").open("w")
    with lock:
        with _usable(root):
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the holder's death
            entry = _load(folder)
        if entry is None:
            made = make()
            with _usable(root):
                _store(folder, *made)
                entry = _load(folder)
    assert entry is not None
    return entry


@contextmanager
def _usable(root: Path) -> Iterator[None]:
    """A file system's refusal, with the knob to turn; errors of the making itself are not touched."""
    try:
        yield
    except OSError as error:
        raise ResultsError(f"the cache at {root} cannot be used: {error}; set cache=DIR or DGAL_CACHE") from error


def _load(folder: Path) -> Entry | None:
    if not folder.is_dir():
        return None
    if damaged := _damaged(folder):
        log.warning("cache entry %s is damaged (%s): made again", folder, damaged)
        return None
    manifest = json.loads((folder / _MANIFEST).read_text())
    arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in manifest["sha256"]}
    return Entry(arrays, manifest["facts"], key_of(manifest["sha256"]))


def _damaged(folder: Path) -> str | None:
    """The first file that does not check out."""
    try:
        hashes = json.loads((folder / _MANIFEST).read_text())["sha256"]
        wrong = [name for name, expected in hashes.items() if _sha256(folder / f"{name}.npy") != expected]
    except (OSError, ValueError, KeyError):
        return _MANIFEST
    return f"{wrong[0]}.npy" if wrong else None


def _store(folder: Path, arrays: Arrays, facts: Mapping[str, Any]) -> None:
    """Write beside, fsync, rename: a reader sees all of an entry or none."""
    beside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)  # of a maker that was killed: the lock is ours now
    beside.mkdir()
    for name, array in arrays.items():
        with (beside / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
    hashes = {name: _sha256(beside / f"{name}.npy") for name in arrays}
    with (beside / _MANIFEST).open("w") as text:
        json.dump({"sha256": hashes, "facts": dict(facts)}, text, indent=1)
        _sync(text)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
