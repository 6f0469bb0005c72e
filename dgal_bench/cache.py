"""A content-addressed folder of arrays: made once under a lock, written whole, its hashes checked on every load."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dgal_bench.errors import ResultsError

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]
_MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class Entry:
    """The arrays of one key, and the facts their maker left: the ledger. ``mapped``: they are too many for memory."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    sha256: str
    mapped: bool


def key_of(parts: Mapping[str, Any]) -> str:
    """20 hex digits that depend on every part."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def get_or_make(root: Path, key: str, make: Callable[[Path], tuple[Arrays, Mapping[str, Any]]]) -> Entry:
    """The entry under ``root/key``, made by ``make`` where it is missing or does not check out.

    ``make(folder) -> (arrays, facts)``: an array that would not fit in memory is written as it is made, as a
    ``np.lib.format.open_memmap`` of ``folder/NAME.npy``. An entry of more than half of the free memory is
    memory-mapped when it is read.

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
            beside = folder.with_name(f"{folder.name}.part")
            with _usable(root):
                shutil.rmtree(beside, ignore_errors=True)  # of a maker that was killed: the lock is ours now
                beside.mkdir()
            try:
                made = make(beside)
                with _usable(root):
                    _store(beside, folder, *made)
                    entry = _load(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)  # of what failed or was stopped
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
    files = {name: folder / f"{name}.npy" for name in manifest["sha256"]}
    # copy-on-write: torch takes only arrays that could be written to
    mode: Literal["c"] | None = "c" if sum(map(_bytes, files.values())) > free_memory() / 2 else None
    arrays = {name: np.load(file, mmap_mode=mode, allow_pickle=False) for name, file in files.items()}
    return Entry(arrays, manifest["facts"], key_of(manifest["sha256"]), mapped=mode is not None)


def _bytes(file: Path) -> int:
    return file.stat().st_size


def free_memory() -> int:
    """Bytes that can be had without swapping; where the system does not tell, half of what is built in."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _damaged(folder: Path) -> str | None:
    """The first file that does not check out."""
    try:
        hashes = json.loads((folder / _MANIFEST).read_text())["sha256"]
        wrong = [name for name, expected in hashes.items() if file_sha256(folder / f"{name}.npy") != expected]
    except (OSError, ValueError, KeyError):
        return _MANIFEST
    return f"{wrong[0]}.npy" if wrong else None


def _store(beside: Path, folder: Path, arrays: Arrays, facts: Mapping[str, Any]) -> None:
    """Write beside, fsync, rename: a reader sees all of an entry or none."""
    for name, array in arrays.items():
        path = beside / f"{name}.npy"
        if isinstance(array, np.memmap) and os.path.isfile(path) and os.path.samefile(str(array.filename), path):
            array.flush()
            continue
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
    hashes = {name: file_sha256(beside / f"{name}.npy") for name in arrays}
    with (beside / _MANIFEST).open("w") as text:
        json.dump({"sha256": hashes, "facts": dict(facts)}, text, indent=1)
        _sync(text)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """Of a file's bytes; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
