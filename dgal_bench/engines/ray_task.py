"""What a Ray task executes: a job as a stream of events; the lines of the results file are events too."""

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
from dgal_bench.engines.ray_blocks import run_blocks
from dgal_bench.engines.ray_transfer import missing_entries, unpack
from dgal_bench.engines.worker import ForwardWarnings, final_event, handle, hide_missing_gpus
from dgal_bench.experiment import Experiment
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.results.reader import parse_run
from dgal_bench.results.writer import ForwardingWriter

Put = Callable[[Event], None]
PackedEntries = Mapping[str, Sequence[Any]]
"""By key of a cache entry, references to its pieces, which only a node without the entry fetches."""

EXPERIMENTS: dict[str, Experiment] = {}
"""What this process keeps between jobs."""


def run_task(job: Mapping[str, Any], content: bytes, packed: PackedEntries) -> Iterator[Event]:
    """Execute a job, in a thread so that its events leave at once; the last is one of FINAL_EVENTS, or ``missing``.

    Args:
        content: of the run's file so far.
        packed: cache entries that this node may lack.
    """
    _prepare_process()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    threading.Thread(target=_execute, args=(job, content, packed, events.put), daemon=True).start()
    while True:
        event = events.get()
        yield event
        if event["event"] in (*FINAL_EVENTS, "missing"):
            return


@cache
def _prepare_process() -> None:
    silence_lightning()
    hide_missing_gpus()


def _execute(job: Mapping[str, Any], content: bytes, packed: PackedEntries, put: Put) -> None:
    def emit(event: str, **facts: Any) -> None:
        put({"event": event, **facts})

    def open_writer(path: Path) -> nullcontext[ForwardingWriter]:
        log = parse_run(path, content)
        return nullcontext(ForwardingWriter(path, log, lambda line: emit("line", line=line)))

    warnings = ForwardWarnings(emit)
    logging.getLogger("dgal_bench").addHandler(warnings)
    try:
        with suppress(OSError):
            os.chdir(job["folder"])  # if it exists here: a user's paths may be relative
        if missing := _receive(job, packed):
            emit("missing", keys=missing)
        elif job["job"] == "setup":
            _set_up(job, emit)
        else:
            handle(job, emit, EXPERIMENTS, open_writer)
    except BaseException as error:  # noqa: BLE001 - without a final event the driver would wait for ever
        put(final_event(error, job["job"]))
    finally:
        logging.getLogger("dgal_bench").removeHandler(warnings)


def _receive(job: Mapping[str, Any], packed: PackedEntries) -> list[str]:
    """Fetch the entries that this node's cache lacks; returns the keys of those that are still missing."""
    root = Path(job["cache"])
    for key in missing_entries(root, job["entries"]):
        with suppress(KeyError, ray.exceptions.ObjectLostError, ray.exceptions.OwnerDiedError):
            unpack(root, key, map(ray.get, packed[key]))
    return missing_entries(root, job["entries"])


def _set_up(job: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """Execute a setup; its event ``ready`` also states which cache entries it used, and on which node."""
    EXPERIMENTS.clear()  # so that every entry is looked up
    with record_keys() as keys:

        def emit_with_entries(event: str, **facts: Any) -> None:
            entries = {"entries": sorted(keys), "node": ray.get_runtime_context().get_node_id()}
            emit(event, **facts, **(entries if event == "ready" else {}))

        handle(job, emit_with_entries, EXPERIMENTS, executor=run_blocks)
