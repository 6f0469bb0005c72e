"""Cache entries on their way to nodes of a Ray cluster that do not share the cache: their files in pieces."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dgal_bench.core import cache
from dgal_bench.engines.base import Event
from dgal_bench.engines.sweep import PlannedRun

PIECE_BYTES = 64 * 1024**2
"""Bytes of a file per piece: the memory that a transfer needs, however large the entry is."""

Piece = tuple[str, bytes]
"""A file name and the next bytes of that file."""


def missing_entries(root: Path, keys: Iterable[str]) -> list[str]:
    """The keys that have no entry in the cache under ``root``."""
    return [key for key in keys if not cache.contains(root, key)]


def pieces(root: Path, key: str, size: int = PIECE_BYTES) -> Iterator[Piece]:
    """An entry as pieces of at most ``size`` bytes, each file in order; raises OSError if there is no such entry."""
    for path in sorted((root / key).iterdir()):
        with path.open("rb") as file:
            while piece := file.read(size):
                yield path.name, piece


def unpack(root: Path, key: str, packed: Iterable[Piece]) -> None:
    """Write an entry from its pieces into the cache under ``root``, unless it is there by now.

    Raises:
        CacheError: the cache cannot be written, or the pieces are damaged.
    """

    def fill(folder: Path) -> None:
        for name, piece in packed:
            with (folder / Path(name).name).open("ab") as file:
                file.write(piece)

    cache.adopt(root, key, fill)


class EntryStore:
    """The driver's record for each setup: its cache entries, the node that has them, and the packed ones.

    An entry is packed only when a node reports that it lacks it: never with one node or a shared cache. Ray keeps the
    pieces on the packing node, in memory or, if that is short, on its disk.
    """

    def __init__(self, ray: ModuleType, cache: Path) -> None:
        self._ray, self._cache = ray, str(cache)
        self._locations: dict[str, tuple[list[str], str]] = {}
        self._packed: dict[str, list[Any]] = {}

    def add(self, job: PlannedRun, ready: Event) -> None:
        """Remember the entries and the node of a finished setup."""
        self._locations[job.setup_key] = (ready["entries"], ready["node"])

    def keys(self, job: PlannedRun) -> list[str]:
        return self._locations[job.setup_key][0] if job.setup_key in self._locations else []

    def packed(self, job: PlannedRun) -> Mapping[str, list[Any]]:
        """The entries of the job that are packed already."""
        return {key: self._packed[key] for key in self.keys(job) if key in self._packed}

    def pack(self, job: PlannedRun, keys: Iterable[str]) -> bool:
        """Pack entries on their node, again if packed before. False: that node is gone."""
        node = self._locations[job.setup_key][1]
        on_node = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        pack = self._ray.remote(_pack).options(
            num_cpus=0, num_returns="streaming", max_retries=0, scheduling_strategy=on_node
        )
        for key in keys:
            *references, last = list(pack.remote(self._cache, key))  # no data comes to the driver
            try:
                self._ray.get(last)
            except self._ray.exceptions.RayError:
                return False
            self._packed[key] = references
        return True


def _pack(root: str, key: str) -> Iterator[Piece | None]:
    """The pieces of an entry, None after the last; Ray keeps them in this node's memory, or on its disk if large."""
    yield from pieces(Path(root), key)
    yield None
