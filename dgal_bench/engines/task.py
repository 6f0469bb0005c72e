"""What a Ray worker runs: a job as its stream of events, a line of the cell's record being one of them."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import ray

from dgal_bench.cache import noting
from dgal_bench.engines import parcels
from dgal_bench.engines.base import Event
from dgal_bench.engines.crew import spread
from dgal_bench.lab import Lab
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.process import ENDINGS
from dgal_bench.record import parse_cell
from dgal_bench.recorder import Courier
from dgal_bench.worker import Emitter, ending, handle, hide_missing_gpus

Put = Callable[[Event], None]
Parcels = Mapping[str, Sequence[Any]]
"""By key of a cache entry, references to its pieces: they are fetched where the entry is missing, and only there."""

LABS: dict[str, Lab] = {}
"""What this process keeps from one job to the next."""


def work(job: Mapping[str, Any], before: bytes, shipped: Parcels) -> Iterator[Event]:
    """Do a job, in a thread so that its events leave while it goes on; the last is one of ENDINGS, or ``lacking``.

    Args:
        before: what the cell's file holds so far.
        shipped: what this node's cache may be without.
    """
    _once()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    threading.Thread(target=_do, args=(job, before, shipped, events.put), daemon=True).start()
    while True:
        event = events.get()
        yield event
        if event["event"] in (*ENDINGS, "lacking"):
            return


@cache
def _once() -> None:
    silence_lightning()
    hide_missing_gpus()


def _do(job: Mapping[str, Any], before: bytes, shipped: Parcels, put: Put) -> None:
    def emit(event: str, **facts: Any) -> None:
        put({"event": event, **facts})

    def scribe(path: Path) -> nullcontext[Courier]:
        log = parse_cell(path, before)
        return nullcontext(Courier(path, log, lambda line: emit("line", line=line)))

    warnings = Emitter(emit)
    logging.getLogger("dgal_bench").addHandler(warnings)
    try:
        with suppress(OSError):
            os.chdir(job["folder"])  # where it exists: a user's own paths may be relative
        if lacking := _receive(job, shipped):
            emit("lacking", keys=lacking)
        elif job["job"] == "setup":
            _set_up(job, emit)
        else:
            handle(job, emit, LABS, scribe)
    except BaseException as error:  # noqa: BLE001 - the boundary, and the one end that the stream of a thread has
        put(ending(error, job["job"]))
    finally:
        logging.getLogger("dgal_bench").removeHandler(warnings)


def _receive(job: Mapping[str, Any], shipped: Parcels) -> list[str]:
    """Put the entries that this node's cache is without there; those that are not to be had are returned."""
    root = Path(job["cache"])
    for key in parcels.missing(root, job["entries"]):
        with suppress(KeyError, ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError):
            parcels.unpack(root, key, map(ray.get, shipped[key]))
    return parcels.missing(root, job["entries"])


def _set_up(job: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """A set-up that says, when it is ready, which cache entries it rests on, and which node has them."""
    LABS.clear()  # so that every entry is asked for
    with noting() as keys:

        def told(event: str, **facts: Any) -> None:
            here = {"entries": sorted(keys), "node": ray.get_runtime_context().get_node_id()}
            emit(event, **facts, **(here if event == "ready" else {}))

        handle(job, told, LABS, spread=spread)


def pack(root: str, key: str) -> Iterator[parcels.Piece | None]:
    """The pieces of an entry, None after the last; Ray keeps them in its memory here, and on its disk what is much."""
    yield from parcels.pieces(Path(root), key)
    yield None
