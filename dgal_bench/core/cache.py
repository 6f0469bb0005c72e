"""A content-addressed folder of arrays: made once under a lock, written whole, hashes checked on every load."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from dgal_bench.core.errors import CacheError
from dgal_bench.core.files import lock

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]
_MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class Entry:
    """The arrays of one key, and their maker's ``facts`` (the ledger). ``mapped``: too large to be in memory."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    sha256: str
    mapped: bool


def key_of(parts: Mapping[str, Any]) -> str:
    """20 hex digits that depend on every part."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def get_or_make(root: Path, key: str, make: Callable[[Path], tuple[Arrays, Mapping[str, Any]]]) -> Entry:
    """The entry under ``root/key``, made by ``make`` where it is missing or damaged.

    ``make(folder) -> (arrays, facts)``: an array that would not fit in memory is written as it is made, as a
    ``np.lib.format.open_memmap`` of ``folder/NAME.npy``. An entry of more than half of the free memory is
    memory-mapped when it is read.

    Raises:
        CacheError: the folder cannot be written.
    """
    folder = root / key
    with suppress(OSError, ValueError):  # another process makes it again now; a damaged entry is reported below
        if (folder / _MANIFEST).is_file() and not _damaged(folder):
            return _open(folder)  # an entry gets its name when it is whole: readers need no lock
    with _locked(root, key):
        with _cache_errors(root):
            entry = _load(folder)
        if entry is None:
            with _temporary_folder(root, folder) as temporary:
                arrays, facts = make(temporary)
                with _cache_errors(root):
                    _store(temporary, folder, arrays, facts)
                    entry = _load(folder)
    assert entry is not None
    return entry


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    """Wait until no other process works on the entry, on this host or another."""
    with ExitStack() as stack:
        with _cache_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(root / key, wait=True))
        yield


@contextmanager
def _temporary_folder(root: Path, folder: Path) -> Iterator[Path]:
    """An empty folder where an entry is written before it has its name."""
    temporary = folder.with_name(f"{folder.name}.part")
    with _cache_errors(root):
        shutil.rmtree(temporary, ignore_errors=True)  # of a maker that was killed: the lock is ours now
        temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # of a maker that failed or was stopped


@contextmanager
def _cache_errors(root: Path) -> Iterator[None]:
    """A file system's refusal as CacheError, with the knob to turn."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"the cache at {root} cannot be used: {error}; set cache=DIR or DGAL_CACHE") from error


def _load(folder: Path) -> Entry | None:
    if not folder.is_dir():
        return None
    if damaged := _damaged(folder):
        log.warning("cache entry %s is damaged (%s): made again", folder, damaged)
        return None
    return _open(folder)


def _open(folder: Path) -> Entry:
    """An entry whose hashes were checked or need no check; raises OSError and ValueError."""
    manifest = json.loads((folder / _MANIFEST).read_text())
    files = {name: folder / f"{name}.npy" for name in manifest["sha256"]}
    # copy-on-write: torch takes only writable arrays
    mapped = sum(file.stat().st_size for file in files.values()) > free_memory() / 2
    mode: Literal["c"] | None = "c" if mapped else None
    arrays = {name: np.load(file, mmap_mode=mode, allow_pickle=False) for name, file in files.items()}
    return Entry(arrays, manifest["facts"], key_of(manifest["sha256"]), mapped)


def free_memory() -> int:
    """Bytes of memory available without swapping."""
    return int(psutil.virtual_memory().available)


def _damaged(folder: Path) -> str | None:
    """The first file whose hash is wrong; None: the entry is whole."""
    try:
        hashes = json.loads((folder / _MANIFEST).read_text())["sha256"]
        wrong = [name for name, expected in hashes.items() if file_sha256(folder / f"{name}.npy") != expected]
    except (OSError, ValueError, KeyError):
        return _MANIFEST
    return f"{wrong[0]}.npy" if wrong else None


def _store(temporary: Path, folder: Path, arrays: Arrays, facts: Mapping[str, Any]) -> None:
    """Write to a temporary folder, fsync, rename: a reader sees all of an entry or none."""
    for name, array in arrays.items():
        path = temporary / f"{name}.npy"
        if isinstance(array, np.memmap) and os.path.isfile(path) and os.path.samefile(str(array.filename), path):
            array.flush()
            continue
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
    hashes = {name: file_sha256(temporary / f"{name}.npy") for name in arrays}
    with (temporary / _MANIFEST).open("w") as manifest:
        json.dump({"sha256": hashes, "facts": dict(facts)}, manifest, indent=1)
        _sync(manifest)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _sync(file: Any) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
