"""Blocks of a graph's search as Ray tasks: other nodes of the cluster answer some, and this one works meanwhile."""

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any
from uuid import uuid4

import ray

from dgal_bench.config.schema import available_cores
from dgal_bench.core.cache import Arrays
from dgal_bench.core.errors import ConfigError, innermost_error
from dgal_bench.core.system import on_threads
from dgal_bench.engines.queue import MAX_DEATHS
from dgal_bench.engines.ray_transfer import pieces, unpack
from dgal_bench.graph.block_search import Block, BlockSearch
from dgal_bench.results.resume import ALGORITHM_VERSION

_LOOK_AGAIN_SECONDS = 0.1

_logger = logging.getLogger(__name__)


def run_blocks(search: BlockSearch, blocks: Sequence[Block]) -> Iterator[tuple[Block, Arrays]]:
    """Every block with its first answer; a lost node costs only its current block."""
    scheduler = BlockScheduler(search, blocks)
    try:
        yield from scheduler.answers()
    finally:
        scheduler.close()


class BlockScheduler:
    """One block at a time in this process, on its threads, and one on every other node, on all of its cores.

    When every remaining block is taken, this node starts those of others too: it never waits for a node that does not
    answer, and at the end only for its own block.
    """

    def __init__(self, search: BlockSearch, blocks: Sequence[Block]) -> None:
        self._search, self._left = search, dict.fromkeys(blocks)
        self._tasks: dict[Any, tuple[str, Block]] = {}
        self._failures: Counter[str] = Counter()
        self._lists: list[Any] = []  # packed, once a node lacks them
        self._nodes_with_lists: set[str] = set()
        # A name of its own: another command on that node may use the search's name for the same graph.
        self._copy = search.root.with_name(f"{search.root.stem}-{uuid4().hex[:8]}{search.root.suffix}")
        self._this_node = ray.get_runtime_context().get_node_id()

    def answers(self) -> Iterator[tuple[Block, Arrays]]:
        own: Future[Arrays] | None = None
        with ThreadPoolExecutor(1) as here:
            while self._left:
                if own is None:
                    block = next(iter(self._untaken() or self._left))
                    own = here.submit(self._search, block)
                self._launch(block)
                for answered, answer in self._answered():
                    if answered in self._left:
                        del self._left[answered]
                        yield answered, answer
                if not own.done():
                    continue
                if block in self._left:
                    del self._left[block]
                    yield block, own.result()
                own = None

    def close(self) -> None:
        for reference in self._tasks:
            ray.cancel(reference, force=True)
        for node in self._nodes_with_lists:
            _on(node, _remove).remote(self._copy)

    def _untaken(self, here: Block | None = None) -> list[Block]:
        taken = {block for _, block in self._tasks.values()} | {here}
        return [block for block in self._left if block not in taken]

    def _launch(self, here: Block) -> None:
        """Give every idle other node a block, from the other end."""
        busy = {node for node, _ in self._tasks.values()} | {self._this_node}
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        able = [node["NodeID"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        idle = [node for node in able if node not in busy and self._failures[node] < MAX_DEATHS]
        for node, block in zip(idle, reversed(self._untaken(here)), strict=False):
            arguments = self._search, self._copy, block, self._lists, ALGORITHM_VERSION
            self._tasks[_on(node, _answer).remote(*arguments)] = node, block
            if self._lists:
                self._nodes_with_lists.add(node)

    def _answered(self) -> Iterator[tuple[Block, Arrays]]:
        """Answers of other nodes; a node without the lists gets them with its next block."""
        tasks = list(self._tasks)
        if not tasks:
            sleep(_LOOK_AGAIN_SECONDS)
            return
        for reference in ray.wait(tasks, timeout=_LOOK_AGAIN_SECONDS)[0]:
            node, block = self._tasks.pop(reference)
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._record_failure(node, error)
                continue
            if answer is not None:
                yield block, answer
            elif not self._lists:
                self._lists = [ray.put(piece) for piece in pieces(self._search.root, self._search.lists)]

    def _record_failure(self, node: str, error: Exception) -> None:
        """Warn once per node; other nodes do its blocks."""
        if not self._failures[node]:
            nodes = ray.nodes()  # type: ignore[no-untyped-call]
            name = next((each["NodeManagerHostname"] for each in nodes if each["NodeID"] == node), node)
            _logger.warning("node %s gave no answer to a block of neighbours: %s", name, innermost_error(_cause(error)))
        self._failures[node] += 1


def _cause(error: Exception) -> Exception:
    """The error that a task raised, or Ray's error about its worker."""
    cause: Exception | None = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    return cause or error


def _on(node: str, work: Any) -> Any:
    """A task on that node. It reserves one CPU and uses all: during a setup nothing else runs."""
    on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(work).options(name="neighbours", num_cpus=1, max_retries=0, scheduling_strategy=on_node)


def _answer(search: BlockSearch, copy: Path, block: Block, lists: Sequence[Any], version: int) -> Arrays | None:
    """Search a block with the lists of the command's folder if they are the right ones, else with those in ``copy``.

    None: the lists are in neither place, and ``lists`` has no pieces of them.
    """
    if version != ALGORITHM_VERSION:
        raise ConfigError(f"it has dgal-bench of algorithm version {ALGORITHM_VERSION}, the command has {version}")
    if not search.ready:
        search = replace(search, root=copy)
        if not search.ready:
            if not lists:
                return None
            unpack(copy, search.lists, map(ray.get, lists))
    with on_threads(available_cores()):
        return search(block)


def _remove(copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
