"""A worker process: reads jobs as JSON lines from stdin, executes them, writes events as JSON lines to stdout.

Thread counts are in its environment before torch is imported. It ends with its stdin, so that no worker outlives a
killed parent. ``stream_events`` is what Ray's tasks call.
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
from contextlib import suppress
from functools import cache
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
from dgal_bench.engines.base import Event
from dgal_bench.engines.process import FINAL_EVENTS
from dgal_bench.engines.replay_task import run_replay_job
from dgal_bench.experiment import Experiment, Run, content_hashes, open_experiment
from dgal_bench.loop import run_loop
from dgal_bench.models.nets import check_fits, initial_weights
from dgal_bench.models.trainer import silence_lightning
from dgal_bench.report.projection import save_projection
from dgal_bench.results.resume import ALGORITHM_VERSION, header_outline
from dgal_bench.results.writer import FileWriter, UnwritableError
from dgal_bench.strategies import plugins

Emit = Callable[..., None]


def jobs_from(stream: Any) -> Iterator[dict[str, Any]]:
    """Jobs as they arrive; a reader thread ends the process as soon as the parent is gone."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        # Nothing to clean up: a results file is whole after every line, and a cache entry is renamed into place.
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def hide_missing_gpus() -> None:
    """torch's optimizers look for a GPU driver at every step: 0.4 ms, a tenth of a tiny network's step."""
    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class ForwardWarnings(logging.Handler):
    """Sends the package's warnings to the parent, which shows them."""

    def __init__(self, emit: Emit) -> None:
        super().__init__(logging.WARNING)
        self._emit_event = emit

    def emit(self, record: logging.LogRecord) -> None:
        self._emit_event("warning", text=record.getMessage())


def handle(job: Mapping[str, Any], emit: Emit, experiments: dict[str, Experiment]) -> None:
    """Execute a job and emit its events; ``experiments`` is what this process keeps between jobs."""
    if job["algorithm_version"] != ALGORITHM_VERSION:
        raise ConfigError(
            f"{platform.node()} has dgal-bench of algorithm version {ALGORITHM_VERSION}, the command has "
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
        fetch(config.dataset.kind, Path(job["data"]), progress, job["offline"])
    if key not in experiments:
        experiments.clear()  # one data set in memory at a time
        experiments[key] = open_experiment(config, Path(job["data"]), Path(job["cache"]), progress)
    experiment = experiments[key]
    if job["job"] == "setup":
        # a network that does not fit the images is an error now, not in the first run
        check_fits(Run.of(config, experiment).new_module(0).net, experiment.data.image_shape, config.net)
        project_features(config, experiment, job, progress, emit)
        emit("ready", points=experiment.data.size)
        return
    if job["job"] == "replay":
        run_replay_job(job, config, experiment, emit)
        return
    with FileWriter(Path(job["path"]), job["command"]) as writer:
        event = run_job(config, experiment, writer, emit, job["resume_anyway"])
    emit(**event)  # after the file is closed and its lock released


def project_features(
    config: RunConfig, experiment: Experiment, job: Mapping[str, Any], progress: Progress, emit: Emit
) -> None:
    """Save the projection of the features beside the data set's results; an error costs the picture only."""
    if config.full_supervision:
        return
    folder = Path(job["path"]).parents[1]
    try:
        save_projection(config, experiment.data, experiment.prepared, folder, Path(job["cache"]), progress)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - any error
        emit("warning", text=f"no map of the features of {experiment.data.name}: {innermost_error(error)}")


def run_job(
    config: RunConfig, experiment: Experiment, writer: FileWriter, emit: Emit, resume_anyway: bool
) -> dict[str, Any]:
    """Execute a run and write how it ended into its file; returns the final event.

    Raises:
        ResultsError: the file is another run's, or cannot be written.
    """
    start = perf_counter()
    try:
        run_loop(
            Run.of(config, experiment),
            writer,
            lambda row: emit("round", round=row.round, accuracy=row.accuracy),
            resume_anyway,
        )
    except ResultsError:
        raise
    except Exception as error:  # noqa: BLE001 - any error costs this run only
        if not writer.header_written:
            name = f"{experiment.data.name}/{writer.path.parent.name}/{writer.path.stem}"
            writer.write_header(header_outline(config, name))
        if isinstance(error, NotApplicableError):
            writer.write_skipped(one_line(error))
        else:
            writer.write_failure(one_line(error), traceback.format_exc())
        return final_event(error, "run") | {"recorded": True}
    return {"event": "done", "seconds": perf_counter() - start}


def final_event(error: BaseException, kind: str) -> dict[str, Any]:
    """The final event of a job that raised ``error``.

    During setup a wrong setting, missing data or an unusable cache stops the sweep. A results folder that cannot be
    written always stops it. Any other error costs its runs only.
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
    """The message alone for a user's mistake, with type and place for any other error."""
    return " ".join(str(error).split()) if isinstance(error, UserError) else innermost_error(error)


EXPERIMENTS: dict[str, Experiment] = {}
"""What a process of ``stream_events`` keeps between jobs."""


def stream_events(job: Mapping[str, Any], check: Callable[[], None]) -> Iterator[Event]:
    """Execute a job of Ray in this process; yield its events, the last being one of FINAL_EVENTS.

    In a thread, so that events leave at once. ``check`` comes first, and raises where this node is not fit.
    """
    _prepare_process()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def emit(event: str, **facts: Any) -> None:
        events.put({"event": event, **facts})

    def execute() -> None:
        warnings = ForwardWarnings(emit)
        logging.getLogger("dgal_bench").addHandler(warnings)
        try:
            with suppress(OSError):
                os.chdir(job["folder"])  # if it exists here: a user's paths may be relative
            check()
            handle(job, emit, EXPERIMENTS)
        except BaseException as error:  # noqa: BLE001 - without a final event the driver would wait for ever
            emit(**final_event(error, job["job"]))
        finally:
            logging.getLogger("dgal_bench").removeHandler(warnings)

    threading.Thread(target=execute, daemon=True).start()
    while True:
        event = events.get()
        yield event
        if event["event"] in FINAL_EVENTS:
            return


@cache
def _prepare_process() -> None:
    silence_lightning()
    hide_missing_gpus()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be read as an event

    def emit(event: str, **facts: Any) -> None:
        events.write(json.dumps({"event": event, **facts}) + "\n")

    _prepare_process()
    logging.getLogger("dgal_bench").addHandler(ForwardWarnings(emit))
    experiments: dict[str, Experiment] = {}
    for job in jobs_from(sys.stdin):
        try:
            handle(job, emit, experiments)
        except Exception as error:  # noqa: BLE001 - the parent decides what a failure means
            emit(**final_event(error, job["job"]))


if __name__ == "__main__":
    main()
