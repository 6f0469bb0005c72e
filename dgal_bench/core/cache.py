"""A content-addressed folder of arrays: made once under a lock, written whole, its hashes checked on every load."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, Literal

import numpy as np

from dgal_bench.core.errors import CacheError
from dgal_bench.core.files import Lease, LockHeldError, holder, holder_name, locked

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]
_MANIFEST = "manifest.json"
_LOOK_AGAIN_SECONDS = 0.1
_recorded_keys: ContextVar[set[str] | None] = ContextVar("_noted", default=None)


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


def get_or_make(
    root: Path, key: str, make: Callable[[Path], tuple[Arrays, Mapping[str, Any]]], mapped: bool = False
) -> Entry:
    """The entry under ``root/key``, made by ``make`` where it is missing or does not check out.

    ``make(folder) -> (arrays, facts)``: an array that would not fit in memory is written as it is made, as a
    ``np.lib.format.open_memmap`` of ``folder/NAME.npy``. An entry of more than half of the free memory is
    memory-mapped when it is read, any if ``mapped``.

    Raises:
        CacheError: the folder cannot be written.
    """
    folder = root / key
    if (noted := _recorded_keys.get()) is not None:
        noted.add(key)
    with suppress(OSError, ValueError):  # of one that is being made again; what does not pass is said below
        if contains(root, key) and not _damaged(folder):
            shutil.rmtree(partial_folder(folder), ignore_errors=True)  # of a maker that was killed before it did so
            return open_entry(folder, mapped)  # it has its name since it is whole: whoever reads waits for nobody
    with _locked(root, key):
        with cache_errors(root):
            entry = _load(folder, mapped)
        if entry is None:
            with _temporary_folder(root, folder) as beside:
                made = make(beside)
                with cache_errors(root):
                    _store(beside, folder, *made)
                    entry = _load(folder, mapped)
                shutil.rmtree(partial_folder(beside), ignore_errors=True)
    assert entry is not None
    return entry


def partial_folder(folder: Path) -> Path:
    """Where the maker of an entry can leave what a later try goes on from: it is removed when the entry is whole.

    ``folder``: the one that the maker was given, or the entry's.
    """
    return folder.with_name(f"{folder.name.removesuffix('.part')}.blocks")


@contextmanager
def record_keys() -> Iterator[set[str]]:
    """The keys that this thread asks for while in here."""
    keys: set[str] = set()
    token = _recorded_keys.set(keys)
    try:
        yield keys
    finally:
        _recorded_keys.reset(token)


def contains(root: Path, key: str) -> bool:
    """Whether there is an entry; whether it checks out is seen when it is loaded."""
    return (root / key / _MANIFEST).is_file()


def adopt(root: Path, key: str, fill: Callable[[Path], None]) -> None:
    """Put an entry that was made elsewhere under ``root/key``, unless there is one; ``fill(folder)`` writes its files.

    Raises:
        CacheError: the folder cannot be written, or what was filled in does not check out.
    """
    folder = root / key
    with _locked(root, key):
        if contains(root, key):
            return
        with _temporary_folder(root, folder) as beside, cache_errors(root):
            fill(beside)
            if damaged := _damaged(beside):
                raise CacheError(f"cache entry {key} came damaged ({damaged}): start the command again")
            for file in beside.iterdir():
                with file.open("rb+") as written:
                    sync(written)
            _take_place(beside, folder)


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    with cache_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f"{key}.lock").open("w")
    with lock, _alone(root, root / key, lock.fileno()):
        yield


@contextmanager
def _temporary_folder(root: Path, folder: Path) -> Iterator[Path]:
    """An empty folder where an entry is written before it has its name."""
    beside = folder.with_name(f"{folder.name}.part")
    with cache_errors(root):
        shutil.rmtree(beside, ignore_errors=True)  # of a maker that was killed: the lock is ours now
        beside.mkdir()
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # of what failed or was stopped


@contextmanager
def _alone(root: Path, folder: Path, lock: int) -> Iterator[None]:
    """Wait until nobody else works on an entry, on this host or another."""
    told = False
    while not locked(lock):
        if not told:
            log.warning("waiting: %s makes %s", holder_name(holder(folder) or {}), folder.name)
        told = True
        sleep(_LOOK_AGAIN_SECONDS)
    with ExitStack() as held:
        while True:
            try:
                with cache_errors(root):
                    held.enter_context(Lease(folder))
                break
            except LockHeldError as error:
                if not told:
                    log.warning("waiting: %s", error)
                told = True
                sleep(_LOOK_AGAIN_SECONDS)
        yield


@contextmanager
def cache_errors(root: Path) -> Iterator[None]:
    """A file system's refusal, with the knob to turn; errors of the making itself are not touched."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"the cache at {root} cannot be used: {error}; set cache=DIR or DGAL_CACHE") from error


def _load(folder: Path, mapped: bool) -> Entry | None:
    if not folder.is_dir():
        return None
    if damaged := _damaged(folder):
        log.warning("cache entry %s is damaged (%s): made again", folder, damaged)
        return None
    return open_entry(folder, mapped)


def open_entry(folder: Path, mapped: bool = False) -> Entry:
    """An entry that is known to be whole, whatever its hashes; raises OSError and ValueError."""
    manifest = json.loads((folder / _MANIFEST).read_text())
    files = {name: folder / f"{name}.npy" for name in manifest["sha256"]}
    # copy-on-write: torch takes only arrays that could be written to
    mapped = mapped or sum(map(_bytes, files.values())) > free_memory() / 2
    mode: Literal["c"] | None = "c" if mapped else None
    arrays = {name: np.load(file, mmap_mode=mode, allow_pickle=False) for name, file in files.items()}
    return Entry(arrays, manifest["facts"], key_of(manifest["sha256"]), mapped)


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
            sync(file)
    hashes = {name: file_sha256(beside / f"{name}.npy") for name in arrays}
    with (beside / _MANIFEST).open("w") as text:
        json.dump({"sha256": hashes, "facts": dict(facts)}, text, indent=1)
        sync(text)
    _take_place(beside, folder)


def _take_place(beside: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def sync(file: Any) -> None:
    """What was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """Of a file's bytes; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
