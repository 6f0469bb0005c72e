"""What a Ray worker runs: a job as its stream of events, a line of the run's record being one of them."""

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

from dgal_bench.core.cache import record_keys
from dgal_bench.engines.base import Event
from dgal_bench.engines.process import FINAL_EVENTS
from dgal_bench.engines.ray_transfer import Piece, missing_entries, pieces, run_blocks, unpack
from dgal_bench.engines.worker import ForwardWarnings, final_event, handle, hide_missing_gpus
from dgal_bench.experiment import Experiment
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.results.reader import parse_run
from dgal_bench.results.writer import ForwardingWriter

Put = Callable[[Event], None]
Parcels = Mapping[str, Sequence[Any]]
"""By key of a cache entry, references to its pieces: they are fetched where the entry is missing, and only there."""

EXPERIMENTS: dict[str, Experiment] = {}
"""What this process keeps from one job to the next."""


def run_task(job: Mapping[str, Any], before: bytes, shipped: Parcels) -> Iterator[Event]:
    """Do a job, in a thread so that its events leave while it goes on; the last is one of ENDINGS, or ``lacking``.

    Args:
        before: what the run's file holds so far.
        shipped: what this node's cache may be without.
    """
    _once()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    threading.Thread(target=_do, args=(job, before, shipped, events.put), daemon=True).start()
    while True:
        event = events.get()
        yield event
        if event["event"] in (*FINAL_EVENTS, "lacking"):
            return


@cache
def _once() -> None:
    silence_lightning()
    hide_missing_gpus()


def _do(job: Mapping[str, Any], before: bytes, shipped: Parcels, put: Put) -> None:
    def emit(event: str, **facts: Any) -> None:
        put({"event": event, **facts})

    def scribe(path: Path) -> nullcontext[ForwardingWriter]:
        log = parse_run(path, before)
        return nullcontext(ForwardingWriter(path, log, lambda line: emit("line", line=line)))

    warnings = ForwardWarnings(emit)
    logging.getLogger("dgal_bench").addHandler(warnings)
    try:
        with suppress(OSError):
            os.chdir(job["folder"])  # where it exists: a user's own paths may be relative
        if lacking := _receive(job, shipped):
            emit("lacking", keys=lacking)
        elif job["job"] == "setup":
            _set_up(job, emit)
        else:
            handle(job, emit, EXPERIMENTS, scribe)
    except BaseException as error:  # noqa: BLE001 - the boundary, and the one end that the stream of a thread has
        put(final_event(error, job["job"]))
    finally:
        logging.getLogger("dgal_bench").removeHandler(warnings)


def _receive(job: Mapping[str, Any], shipped: Parcels) -> list[str]:
    """Put the entries that this node's cache is without there; those that are not to be had are returned."""
    root = Path(job["cache"])
    for key in missing_entries(root, job["entries"]):
        with suppress(KeyError, ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError):
            unpack(root, key, map(ray.get, shipped[key]))
    return missing_entries(root, job["entries"])


def _set_up(job: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """A set-up that says, when it is ready, which cache entries it rests on, and which node has them."""
    EXPERIMENTS.clear()  # so that every entry is asked for
    with record_keys() as keys:

        def told(event: str, **facts: Any) -> None:
            here = {"entries": sorted(keys), "node": ray.get_runtime_context().get_node_id()}
            emit(event, **facts, **(here if event == "ready" else {}))

        handle(job, told, EXPERIMENTS, spread=run_blocks)


def pack(root: str, key: str) -> Iterator[Piece | None]:
    """The pieces of an entry, None after the last; Ray keeps them in its memory here, and on its disk what is much."""
    yield from pieces(Path(root), key)
    yield None
