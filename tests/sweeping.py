"""Sweeps: of real worker processes, for tests that disturb them, and in the process of the test for all others."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

import psutil

from dgal_bench.cli.main import main
from dgal_bench.conformance import EXAMPLE_SETTINGS, example_config, run_in_process
from dgal_bench.core.files import find_files
from dgal_bench.engines.process import ForkServers
from dgal_bench.engines.worker import ForwardWarnings, final_event, handle
from dgal_bench.results.reader import read_results
from dgal_bench.results.rows import choice

HERE = Path(__file__).parent.parent


def command(root, cache, *words, report=False):
    base = ["bench", "representation=pca", "profile=smoke", f"results={root}", f"cache={cache}", *EXAMPLE_SETTINGS]
    base += ["full_supervision=false", f"report={str(report).lower()}"]
    return [sys.executable, "-m", "dgal_bench.cli.main", *base, *words]


def finish(words, limit=240, **environment):
    return subprocess.run(
        words, capture_output=True, text=True, timeout=limit, cwd=HERE, check=False, env=os.environ | environment
    )


class WorkerHere:
    """Stands for ``WorkerProcess``: jobs and events are JSON all the same, and nothing is imported anew."""

    pid = os.getpid()
    one_at_a_time = threading.Lock()  # lanes are threads of this process, which has one global generator

    def __init__(self, environment):
        self.environment, self.experiments = environment, {}

    def run(self, job):
        events = []

        def emit(event, **facts):
            events.append({"event": event, **facts})

        emitter, log = ForwardWarnings(emit), logging.getLogger("dgal_bench")
        with self.one_at_a_time:
            log.addHandler(emitter)
            try:
                handle(json.loads(json.dumps(job)), emit, self.experiments)
            except Exception as error:  # noqa: BLE001 - the boundary, as in worker.main
                emit(**final_event(error, job["job"]))
            finally:
                log.removeHandler(emitter)
        yield from json.loads(json.dumps(events))

    def close(self):
        pass


def fit_here(_, worker, environment):
    return worker if worker is not None and worker.environment == environment else WorkerHere(environment)


def here(words, **environment):
    """What ``finish`` does, with the command and its workers in this process: for tests of what they do and say.

    Where the process itself is what is tested (it is killed, limited, alone, or one of two), it is ``finish``.
    """
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as changed:
        for change in (
            patch.object(ForkServers, "fit", fit_here),
            patch.dict(os.environ, environment),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            changed.enter_context(change)
        code = main(words[words.index("dgal_bench.cli.main") + 1 :])
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def is_alive(pid):
    """A killed process that its parent has not waited for is not."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def descendants(pid):
    """Process ids below ``pid``."""
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def written(root):
    """Bytes of results so far."""
    return sum(path.stat().st_size for path in find_files(root, "*.jsonl"))


def in_progress(root, runs, rows=3):
    """Whether so many runs have their header and so many rows."""
    return sum(path.read_bytes().count(b"\n") > rows for path in find_files(root, "seed-*.jsonl")) >= runs


def choices_of(root):
    return {log.header["cell"]: [choice(r) for r in log.records] for log in read_results(root)}


def texts_of(root):
    """The choice fields of every run, and its first labels, as JSON: equal where the bits are."""
    return {
        log.header["cell"]: json.dumps([log.header["initial"], *(choice(r) for r in log.records)])
        for log in read_results(root)
    }


def alone(experiment, root, strategies, seeds, *overrides):
    """The same runs one after the other in this process, undisturbed."""
    for strategy in strategies:
        for seed in seeds:
            config = example_config(strategy, f"seed={seed}", *overrides)
            run_in_process(experiment, root / "s" / "digits" / strategy / f"seed-{seed}.jsonl", config)
    return choices_of(root)


def listing(root):
    """Every file below a folder and its bytes."""
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
