"""Blocks of a graph's search as Ray tasks: the other nodes of a cluster answer some, and this one goes on meanwhile."""

import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import sleep
from types import ModuleType
from typing import Any
from uuid import uuid4

import ray

from dgal_bench.config.schema import available_cores
from dgal_bench.core import cache
from dgal_bench.core.cache import Arrays
from dgal_bench.core.errors import ConfigError, innermost_error
from dgal_bench.core.system import on_threads
from dgal_bench.engines.base import Event
from dgal_bench.engines.queue import MAX_DEATHS
from dgal_bench.engines.sweep import PlannedRun
from dgal_bench.graph.block_search import Block, BlockSearch
from dgal_bench.results.resume import ALGORITHM_VERSION

# Cache entries on their way to machines that do not share the cache: the bytes of their files, piece by piece.


PIECE_BYTES = 64 * 1024**2
"""Of a file at a time: what an entry needs of memory on its way, however large it is."""

Piece = tuple[str, bytes]
"""The name of a file, and its next bytes."""


def missing_entries(root: Path, keys: Iterable[str]) -> list[str]:
    """Those of the keys that the cache under ``root`` has no entry of."""
    return [key for key in keys if not cache.contains(root, key)]


def pieces(root: Path, key: str, size: int = PIECE_BYTES) -> Iterator[Piece]:
    """An entry as pieces of at most ``size`` bytes, each file in order; raises OSError where there is none."""
    for path in sorted((root / key).iterdir()):
        with path.open("rb") as file:
            while piece := file.read(size):
                yield path.name, piece


def unpack(root: Path, key: str, arriving: Iterable[Piece]) -> None:
    """Write an entry from its pieces into the cache under ``root``, unless it has come there in the meantime.

    Raises:
        CacheError: the cache cannot be written, or the pieces are not what was packed.
    """

    def fill(folder: Path) -> None:
        for name, piece in arriving:
            with (folder / Path(name).name).open("ab") as file:
                file.write(piece)

    cache.adopt(root, key, fill)


# What set-ups have made, on its way to nodes of a cluster whose cache is without it.


class EntryStore:
    """By set-up: the cache entries that its runs rest on, the node that has them, and what was packed there.

    Nothing is packed before a node says that its cache is without an entry: with one node, or a cache that all share,
    that is never. Ray keeps the pieces on the packing node, in memory and, where that is short, on its disk.
    """

    def __init__(self, ray: ModuleType, cache: Path) -> None:
        self._ray, self._cache = ray, str(cache)
        self._homes: dict[str, tuple[list[str], str]] = {}
        self._packed: dict[str, list[Any]] = {}

    def note(self, job: PlannedRun, ready: Event) -> None:
        """What the end of a set-up says of where its results are."""
        self._homes[job.setup_key] = (ready["entries"], ready["node"])

    def entries(self, job: PlannedRun) -> list[str]:
        return self._homes[job.setup_key][0] if job.setup_key in self._homes else []

    def parcels(self, job: PlannedRun) -> Mapping[str, list[Any]]:
        """What is packed already, of what the job rests on."""
        return {key: self._packed[key] for key in self.entries(job) if key in self._packed}

    def pack(self, job: PlannedRun, keys: Iterable[str]) -> bool:
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
    from dgal_bench.engines.ray_task import pack  # lightning and more, which the driver does without

    yield from pack(root, key)


_LOOK_AGAIN_SECONDS = 0.1

log = logging.getLogger(__name__)


def run_blocks(search: BlockSearch, blocks: Sequence[Block]) -> Iterator[tuple[Block, Arrays]]:
    """Every block with its answer, whoever was first to give it; a node that is lost costs what it was at."""
    crew = BlockScheduler(search, blocks)
    try:
        yield from crew.answers()
    finally:
        crew.dismiss()


class BlockScheduler:
    """Who is at which block. One here, on this process's threads, and one on every other node, on all of its cores.

    When no block is left that nobody is at, this node begins those of others too: nobody waits for a node that never
    answers, and at the end only for the block that this node itself is at.
    """

    def __init__(self, search: BlockSearch, blocks: Sequence[Block]) -> None:
        self._search, self._left = search, dict.fromkeys(blocks)
        self._flying: dict[Any, tuple[str, Block]] = {}
        self._failures: Counter[str] = Counter()
        self._lists: list[Any] = []
        self._sent: set[str] = set()
        # A crew's own: under the search's name another command on that node may be at the same graph.
        self._aside = search.root.with_name(f"{search.root.stem}-{uuid4().hex[:8]}{search.root.suffix}")
        self._me = ray.get_runtime_context().get_node_id()

    def answers(self) -> Iterator[tuple[Block, Arrays]]:
        own: Future[Arrays] | None = None
        with ThreadPoolExecutor(1) as here:
            while self._left:
                if own is None:
                    block = next(iter(self._untouched() or self._left))
                    own = here.submit(self._search, block)
                self._launch(block)
                for answered, answer in self._landed():
                    if answered in self._left:
                        del self._left[answered]
                        yield answered, answer
                if not own.done():
                    continue
                if block in self._left:
                    del self._left[block]
                    yield block, own.result()
                own = None

    def dismiss(self) -> None:
        for reference in self._flying:
            ray.cancel(reference, force=True)
        for node in self._sent:
            _on(node, _clear).remote(self._aside)

    def _untouched(self, here: Block | None = None) -> list[Block]:
        taken = {block for _, block in self._flying.values()} | {here}
        return [block for block in self._left if block not in taken]

    def _launch(self, here: Block) -> None:
        """A block for every other node that has none, from the other end."""
        busy = {node for node, _ in self._flying.values()} | {self._me}
        known = ray.nodes()  # type: ignore[no-untyped-call]
        able = [node["NodeID"] for node in known if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        idle = [node for node in able if node not in busy and self._failures[node] < MAX_DEATHS]
        for node, block in zip(idle, reversed(self._untouched(here)), strict=False):
            words = self._search, self._aside, block, self._lists, ALGORITHM_VERSION
            self._flying[_on(node, _answer).remote(*words)] = node, block
            if self._lists:
                self._sent.add(node)

    def _landed(self) -> Iterator[tuple[Block, Arrays]]:
        """What has come back; a node without the lists is sent them."""
        flying = list(self._flying)
        if not flying:
            sleep(_LOOK_AGAIN_SECONDS)
            return
        for reference in ray.wait(flying, timeout=_LOOK_AGAIN_SECONDS)[0]:
            node, block = self._flying.pop(reference)
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._failed(node, error)
                continue
            if answer is not None:
                yield block, answer
            elif not self._lists:
                self._lists = [ray.put(piece) for piece in pieces(self._search.root, self._search.lists)]

    def _failed(self, node: str, error: Exception) -> None:
        """Said once of a node: whatever it is, the others do its blocks."""
        if not self._failures[node]:
            known = ray.nodes()  # type: ignore[no-untyped-call]
            name = next((each["NodeManagerHostname"] for each in known if each["NodeID"] == node), node)
            log.warning("node %s gave no answer to a block of neighbours: %s", name, innermost_error(_cause(error)))
        self._failures[node] += 1


def _cause(error: Exception) -> Exception:
    """What a task raised, or what became of its worker."""
    cause: Exception | None = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    return cause or error


def _on(node: str, work: Any) -> Any:
    """A task that runs there or fails. It asks for one CPU, and may use more: as in a set-up, nothing else runs yet."""
    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(work).options(name="neighbours", num_cpus=1, max_retries=0, scheduling_strategy=there)


def _answer(search: BlockSearch, aside: Path, block: Block, lists: Sequence[Any], version: int) -> Arrays | None:
    """By the lists where the command has them, if these are they, else ``aside``.

    None: the lists are in neither place, and were not sent along as pieces.
    """
    if version != ALGORITHM_VERSION:
        raise ConfigError(f"its dgal-bench is of algorithm {ALGORITHM_VERSION}, the command's of {version}")
    if not search.ready:
        search = replace(search, root=aside)
        if not search.ready:
            if not lists:
                return None
            unpack(aside, search.lists, map(ray.get, lists))
    with on_threads(available_cores()):
        return search(block)


def _clear(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
