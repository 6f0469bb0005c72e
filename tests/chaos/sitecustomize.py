"""A process of a sweep that kills itself at chosen moments: Python imports this at its start, from $PYTHONPATH.

``$CHAOS_TOKENS`` is a folder of tokens such as ``07-query``, each good for one SIGKILL at that kind of moment. A
process that comes to one draws, and whoever then takes the token away dies there: kinds and number of kills are exact.

training, query    before they begin
half, whole        of a line of a results file: its first half is written, all of it is
cache, upgrade     written beside, and not yet renamed to what it will be
"""

import importlib.machinery
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

OFTEN = ("training", "query", "half", "whole")
"""A process dies at one of these with a chance of ``$CHAOS_CHANCE``; at others, which are rare, whenever it can."""

RENAMES = {".part": "cache", ".new": "upgrade"}
"""By the suffix of what is renamed."""


def tokens(kind: str) -> list[Path]:
    return sorted(Path(os.environ["CHAOS_TOKENS"]).glob(f"*-{kind}"))


def due(kind: str) -> bool:
    """Whether to die here: the token is gone then, and nobody else will."""
    if kind in OFTEN and draw.random() >= float(os.environ["CHAOS_CHANCE"]):
        return False
    for token in tokens(kind):
        try:
            token.unlink()
        except FileNotFoundError:
            continue
        return True
    return False


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def perhaps(*args: Any, **kwargs: Any) -> Any:
        if due(kind):
            die()
        return work(*args, **kwargs)

    return perhaps


def torn(write: Callable[..., None]) -> Callable[..., None]:
    def perhaps(file: Any, content: bytes) -> None:
        if due("half"):
            write(file, content[: len(content) // 2])
            die()
        write(file, content)
        if due("whole"):
            die()

    return perhaps


def unrenamed(rename: Callable[..., Path]) -> Callable[..., Path]:
    def perhaps(path: Path, target: Path) -> Path:
        if path.suffix in RENAMES and due(RENAMES[path.suffix]):
            die()
        return rename(path, target)

    return perhaps


def in_loop(module: Any) -> None:
    module.fit = before("training", module.fit)
    module.run_query = before("query", module.run_query)  # before its clock starts


def in_writer(module: Any) -> None:
    module._write = torn(module._write)


PATCHES: dict[str, Callable[[Any], None]] = {
    "dgal_bench.loop": in_loop,
    "dgal_bench.results.writer": in_writer,
}


class Patching(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        PATCHES[module.__name__](module)


class Finder:
    """Finds what others find, and has it patched when it has been executed."""

    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = Patching(name, spec.origin)
        return spec


def begin() -> None:
    """Draw by how many have died, so that who takes a dead one's place does not die at the same draw."""
    draw.seed(f"{os.environ['CHAOS_SEED']} {len(tokens('*'))}")


draw = random.Random()

if "CHAOS_TOKENS" in os.environ:
    begin()
    os.register_at_fork(after_in_child=begin)
    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]
    for name in PATCHES.keys() & sys.modules.keys():  # in a process that was forked from one with its imports
        PATCHES[name](sys.modules[name])
    Path.rename = unrenamed(Path.rename)  # type: ignore[method-assign]
