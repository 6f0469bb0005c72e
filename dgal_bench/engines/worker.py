"""A worker process: takes jobs as JSON lines on stdin, runs them, tells of rounds and endings as JSON lines on stdout.

Started with its thread counts in the environment, before torch is imported. It ends when its stdin does, so that no
worker outlives a killed parent.
"""

import json
import logging
import os
import platform
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from dgal_bench.config.schema import RunConfig, from_trusted_dict
from dgal_bench.core.errors import (
    CacheError,
    ConfigError,
    DataError,
    NotApplicableError,
    ResultsError,
    UserError,
    innermost_error,
)
from dgal_bench.core.files import LockHeldError
from dgal_bench.core.types import Progress
from dgal_bench.data.datasets import fetch, load
from dgal_bench.data.image_data import DatasetRequest
from dgal_bench.engines.replay_task import run_replay_job
from dgal_bench.experiment import Experiment, Run, content_hashes, open_experiment
from dgal_bench.graph.block_search import RunBlocks, one_by_one
from dgal_bench.loop import run_loop
from dgal_bench.models.nets import check_fits, initial_weights
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.report.projection import projection_message
from dgal_bench.results.resume import ALGORITHM_VERSION, header_outline
from dgal_bench.results.writer import FileWriter, RowWriter, UnwritableError
from dgal_bench.strategies import plugins

Emit = Callable[..., None]
Open = Callable[[Path], AbstractContextManager[RowWriter]]


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


class ForwardWarnings(logging.Handler):
    """Sends the package's warnings to the parent, who can show them."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(logging.WARNING)
        self._emit_event = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit_event("warning", text=record.getMessage())


def handle(
    job: Mapping[str, Any],
    emit: Emit,
    experiments: dict[str, Experiment],
    open_record: Open = FileWriter,
    spread: RunBlocks = one_by_one,
) -> None:
    """Do a job and tell of it; ``experiments`` is what this process keeps from one job to the next.

    ``spread``: who else works on a large graph.
    """
    if job["algorithm_version"] != ALGORITHM_VERSION:
        raise ConfigError(
            f"{platform.node()} has a dgal-bench of algorithm {ALGORITHM_VERSION}, the command's is "
            f"{job['algorithm_version']}: install the same version everywhere"
        )
    if job["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when timm is first imported, which is after this
    plugins.install(job["plugins"])
    config = from_trusted_dict(job["config"])
    key = job["setup_key"]

    def progress(what: str, done: int, of: int) -> None:
        emit("progress", what=what, n=done, of=of)

    if job["job"] == "content":
        data = load(DatasetRequest(config.dataset, Path(job["data"]), Path(job["cache"]), progress))
        weights = initial_weights(data.image_shape, config.net)
        emit("ready", content=content_hashes(config, data, weights))
        return
    if job["job"] == "setup":
        fetch(config.dataset.kind, Path(job["data"]), progress, job["offline"], Path(job["cache"]))
    if key not in experiments:
        experiments.clear()  # one data set in memory at a time
        experiments[key] = open_experiment(config, Path(job["data"]), Path(job["cache"]), progress, spread)
    experiment = experiments[key]
    if job["job"] == "setup":
        # a network that does not fit the images is a mistake to find now
        check_fits(Run.of(config, experiment).new_module(0).net, experiment.data.image_shape, config.net)
        emit(
            "ready",
            points=experiment.data.size,
            **make_projection(config, experiment, Path(job["cache"]), progress, emit),
        )
        return
    if job["job"] == "replay":
        run_replay_job(job, config, experiment, emit)
        return
    with open_record(Path(job["path"])) as record:
        end = run_job(config, experiment, record, emit, job["resume_anyway"])
    emit(**end)  # the record is closed, its lease gone


def make_projection(
    config: RunConfig, experiment: Experiment, cache: Path, progress: Progress, emit: Emit
) -> dict[str, Any]:
    """The projection of the latents; what goes wrong with a picture costs nothing but the picture."""
    try:
        return projection_message(config, experiment.data, experiment.prepared, cache, progress)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is
        emit("warning", text=f"no map of the latents of {experiment.data.name}: {innermost_error(error)}")
        return {}


def run_job(
    config: RunConfig, experiment: Experiment, record: RowWriter, emit: Emit, resume_anyway: bool
) -> dict[str, Any]:
    """A run to its end, whatever that is, which is in its record; the event that tells of it.

    Raises:
        ResultsError: the record is not this run's to write in, or takes no more lines.
    """
    began = perf_counter()
    try:
        run_loop(
            Run.of(config, experiment),
            record,
            lambda row: emit("round", round=row.round, accuracy=row.accuracy),
            resume_anyway,
        )
    except ResultsError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it costs this run only
        if not record.header_written:
            record.write_header(
                header_outline(config, f"{experiment.data.name}/{record.path.parent.name}/{record.path.stem}")
            )
        if isinstance(error, NotApplicableError):
            record.write_skipped(one_line(error))
        else:
            record.write_failure(one_line(error), traceback.format_exc())
        return final_event(error, "run") | {"recorded": True}
    return {"event": "done", "seconds": perf_counter() - began}


def final_event(error: BaseException, kind: str) -> dict[str, Any]:
    """The event that tells of an error.

    Where a sweep is set up, a wrong setting, missing data or an unusable cache stops it; a results folder that takes
    no more rows does so at any time. Anything else costs its runs only.
    """
    event = (
        "held" if isinstance(error, LockHeldError) else "skipped" if isinstance(error, NotApplicableError) else "failed"
    )
    fatal = UnwritableError if kind == "run" else ConfigError | DataError | ResultsError
    return {
        "event": event,
        "error": one_line(error),
        "exit_code": getattr(error, "exit_code", 1),
        "stop": isinstance(error, fatal),
        "refused": isinstance(error, ResultsError) and not isinstance(error, CacheError),
        "node": platform.node(),
    }


def one_line(error: BaseException) -> str:
    """The error as a user should see it: the message alone for a user's mistake, with type and place otherwise."""
    return " ".join(str(error).split()) if isinstance(error, UserError) else innermost_error(error)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an event

    def emit(event: str, **facts: Any) -> None:
        events.write(json.dumps({"event": event, **facts}) + "\n")

    silence_lightning()
    hide_missing_gpus()
    logging.getLogger("dgal_bench").addHandler(ForwardWarnings(emit))
    experiments: dict[str, Experiment] = {}
    for job in jobs_from(sys.stdin):
        try:
            handle(job, emit, experiments)
        except Exception as error:  # noqa: BLE001 - the boundary: the parent decides what a failure means
            emit(**final_event(error, job["job"]))


if __name__ == "__main__":
    main()
