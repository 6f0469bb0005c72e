"""How many threads torch works on: part of a cell's identity, since they change the bits of a training."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_environment(count: int) -> dict[str, str]:
    """What a process that works on ``count`` threads is started with: read when torch, FAISS and BLAS are imported.

    How threads wait is said once more, for a node of a cluster that starts it with an environment of its own.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    waiting = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return {**dict.fromkeys(names, str(count)), "OMP_WAIT_POLICY": waiting}


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Work on ``count`` threads, and go back to what was before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Workers:
    """A map over items, each done on one thread: the same bits however many threads there are."""

    pool: ThreadPoolExecutor

    def __call__(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        return list(self.pool.map(work, items))


@contextmanager
def workers() -> Iterator[Workers]:
    """As many as torch has threads.

    The calling thread is left one of its own: OpenMP's would spin in the workers' way after whatever it does itself.
    """
    count = torch.get_num_threads()
    with on_threads(1), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield Workers(pool)
