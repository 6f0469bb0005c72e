"""What set-ups have made, on its way to nodes of a cluster whose cache is without it."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dgal_bench.engines.base import Event
from dgal_bench.sweep import Job


class Cargo:
    """By set-up: the cache entries that its cells rest on, the node that has them, and what was packed there.

    Nothing is packed before a node says that its cache is without an entry: with one node, or a cache that all share,
    that is never. Ray keeps the pieces on the packing node, in memory and, where that is short, on its disk.
    """

    def __init__(self, ray: ModuleType, cache: Path) -> None:
        self._ray, self._cache = ray, str(cache)
        self._homes: dict[str, tuple[list[str], str]] = {}
        self._packed: dict[str, list[Any]] = {}

    def note(self, job: Job, ready: Event) -> None:
        """What the end of a set-up says of where its results are."""
        self._homes[job.setup_key] = (ready["entries"], ready["node"])

    def entries(self, job: Job) -> list[str]:
        return self._homes[job.setup_key][0] if job.setup_key in self._homes else []

    def parcels(self, job: Job) -> Mapping[str, list[Any]]:
        """What is packed already, of what the job rests on."""
        return {key: self._packed[key] for key in self.entries(job) if key in self._packed}

    def pack(self, job: Job, keys: Iterable[str]) -> bool:
        """Pack entries where they are; those packed before were lost. False: the node that had them is gone."""
        node = self._homes[job.setup_key][1]
        there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        pack = self._ray.remote(_pack).options(
            num_cpus=0, num_returns="streaming", max_retries=0, scheduling_strategy=there
        )
        for key in keys:
            *pieces, last = list(pack.remote(self._cache, key))  # references: nothing comes here
            try:
                self._ray.get(last)
            except self._ray.exceptions.RayError:
                return False
            self._packed[key] = pieces
        return True


def _pack(root: str, key: str) -> Iterator[Any]:
    from dgal_bench.engines.task import pack  # lightning and more, which the driver does without

    yield from pack(root, key)
