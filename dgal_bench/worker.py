"""A worker process: takes jobs as JSON lines on stdin, runs them, tells of rounds and endings as JSON lines on stdout.

Started with its thread counts in the environment, before torch is imported. It ends when its stdin does, so that no
worker outlives a killed parent.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dgal_bench import plugins
from dgal_bench.config import from_dict
from dgal_bench.data.datasets import fetch, load
from dgal_bench.data.images import Request
from dgal_bench.errors import ConfigError, DataError, ResultsError, UserError, innermost
from dgal_bench.lab import Cell, Lab, open_lab, own_content
from dgal_bench.loop import run_cell
from dgal_bench.models.nets import check_fits, initial_weights
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.record import Recorder

Emit = Callable[..., None]


def jobs_from(stream: Any) -> Iterator[dict[str, Any]]:
    """Jobs as they come; a reader beside the work ends the process as soon as the parent is gone."""
    waiting: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            waiting.put(line)
        # Nothing to clean up: a results file is whole after every line, and a cache entry is renamed into place.
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(waiting.get())


def hide_missing_gpus() -> None:
    """torch's optimizers look for a GPU driver at every step: 0.4 ms, a tenth of a tiny network's whole step."""
    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class Emitter(logging.Handler):
    """Sends the package's warnings to the parent, who can show them."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(logging.WARNING)
        self._emit_event = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit_event("warning", text=record.getMessage())


def handle(job: dict[str, Any], emit: Emit, labs: dict[str, Lab]) -> None:
    if job["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when timm is first imported, which is after this
    plugins.install(job["plugins"])
    config = from_dict(job["config"])
    key = job["setup_key"]

    def progress(what: str, done: int, of: int) -> None:
        emit("progress", what=what, n=done, of=of)

    if job["job"] == "content":
        data = load(Request(config.dataset, Path(job["data"]), Path(job["cache"]), progress))
        weights = initial_weights(data.image_shape, config.net)
        emit("ready", content=own_content(config, data, weights))
        return
    if job["job"] == "setup":
        fetch(config.dataset.kind, Path(job["data"]), progress, job["offline"], Path(job["cache"]))
    if key not in labs:
        labs.clear()  # one data set in memory at a time
        labs[key] = open_lab(config, Path(job["data"]), Path(job["cache"]), progress)
    lab = labs[key]
    if job["job"] == "setup":
        # a network that does not fit the images is a mistake to find now
        check_fits(Cell.of(config, lab).new_module(0).net, lab.data.image_shape, config.net)
        emit("ready", points=lab.data.size)
        return
    with Recorder(Path(job["path"])) as recorder:
        try:
            run_cell(
                Cell.of(config, lab),
                recorder,
                lambda record: emit("round", round=record.round, accuracy=record.accuracy),
                job["jobs"],
                job["resume_anyway"],
            )
        except Exception as error:
            # A ResultsError says that the file is not this cell's to write in.
            if recorder.header_written and not isinstance(error, ResultsError):
                recorder.write_failure(one_line(error), traceback.format_exc())
            raise
    emit("done")


def one_line(error: BaseException) -> str:
    """The error as a user should see it: the message alone for a user's mistake, with type and place otherwise."""
    return " ".join(str(error).split()) if isinstance(error, UserError) else innermost(error)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an event

    def emit(event: str, **facts: Any) -> None:
        events.write(json.dumps({"event": event, **facts}) + "\n")

    silence_lightning()
    hide_missing_gpus()
    logging.getLogger("dgal_bench").addHandler(Emitter(emit))
    labs: dict[str, Lab] = {}
    for job in jobs_from(sys.stdin):
        try:
            handle(job, emit, labs)
        except Exception as error:  # noqa: BLE001 - the boundary: the parent decides what a failure means
            # A wrong setting, missing data or an unusable cache stops a sweep that is being set up; anything else
            # costs its cells only.
            stop = isinstance(error, ConfigError | DataError | ResultsError)
            emit("failed", error=one_line(error), exit_code=getattr(error, "exit_code", 1), stop=stop)


if __name__ == "__main__":
    main()
