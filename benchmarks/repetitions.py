"""Contenders timed in turn, several times over, and what comes of their seconds."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.machine import cores_of_others

Maker = Callable[[], Callable[[], Any]]
"""Does what is not timed and returns the call that is."""


@dataclass(frozen=True, eq=False)
class Repeated:
    """By contender and repetition: seconds and what was kept of the answers; by repetition: the cores others used."""

    seconds: dict[str, list[float]]
    answers: dict[str, list[Any]]
    cores_of_others: list[float | None]


Keep = Callable[[str, Any], Any]
"""What of a contender's answer is kept, off the clock."""


def interleaved(makers: Mapping[str, Maker], repeats: int, keep: Keep = lambda _, answer: answer) -> Repeated:
    """Every contender once, then every one again: what disturbs the machine for a while disturbs them all.

    Each repetition begins with another contender, so that none always comes after the same one. Large answers should
    not all be kept: whoever answers into new memory would have the system find more for every repetition.
    """
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    answers: dict[str, list[Any]] = {name: [] for name in makers}
    others = []
    names = list(makers)
    for _ in range(repeats):
        used = cores_of_others()
        for name in names:
            call = makers[name]()
            gc.collect()  # a Trainer that has ended holds its network until then
            start = perf_counter()
            answered = call()
            seconds[name].append(perf_counter() - start)
            answers[name].append(keep(name, answered))
            del call, answered
        others.append(used())
        names = [*names[1:], names[0]]
    return Repeated(seconds, answers, others)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The quotient, repetition by repetition: both of a pair had the same machine."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def ratio_text(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"
