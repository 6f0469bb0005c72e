"""A stopwatch with named phases. Time belongs to the innermost phase; every edge synchronises the device.

What is on the clock in a query, and so what query time means, is said by ``loop.run_query``.
"""

import gc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Stopwatch:
    """Seconds by exclusive phase, and the total, measured apart.

    ``with watch.running():`` brackets the whole; ``with watch.phase("diffuse"):`` charges a part. Time
    outside any phase is in ``total`` only, so that the sum of phases can be checked against it.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._stack: list[str] = []
        self._mark = 0.0
        self.total = 0.0
        self.seconds: dict[str, float] = defaultdict(float)

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return perf_counter()

    def _charge(self) -> None:
        now = self._now()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._mark
        self._mark = now

    @contextmanager
    def running(self) -> Iterator[None]:
        """Bracket what is measured; seconds add up over several brackets.

        Garbage collection is off in here (as in ``timeit``): it would find the trainer that has just ended.
        """
        collecting = gc.isenabled()
        gc.disable()
        start = self._now()
        try:
            yield
        finally:
            self.total += self._now() - start
            if collecting:
                gc.enable()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time in here, less that of phases inside it, to ``name``."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()
