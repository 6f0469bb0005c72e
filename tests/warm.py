"""Commands of tests without their imports: forked from a process that has them, in 0.3 s of CPU instead of 10.

``warm_processes`` makes ``subprocess.Popen`` start ``python -m`` of the package in this way, here and in the processes
that it starts, and test_slurm's ``sbatch``. All else, and what asks for another ``PYTHONPATH``, is started as ever.
"""

import atexit
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path

from dgal_bench.core import fork_server
from dgal_bench.core.fork_server import ForkServer
from dgal_bench.core.system import thread_environment

OWN_PATH = os.environ.get("PYTHONPATH")
CHAOS = Path(__file__).parent / "chaos"
COMMANDS = ("dgal_bench.cli.main", "dgal_bench.core.fork_server")
SLURM = ("submitit.local._local", "submitit.core._submit")
SBATCH = "sbatch"
IMPORTS = (
    *COMMANDS, *SLURM, "dgal_bench.engines.slurm", "dgal_bench.engines.worker", "dgal_bench.results.frame",
    "dgal_bench.report.page", "dgal_bench.results.wandb", "wandb.sdk.launch", __name__,
)  # fmt: skip


class WarmPopen(subprocess.Popen):
    """Popen, with three of its steps done by a fork server; CPython's private names, from 3.11 to 3.13."""

    server = None  # started when it is first needed
    starting = threading.Lock()
    forked = False

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        environment = dict(os.environ if env is None else env)
        words = [word for word in args if word != "-u"] if isinstance(args, list) else []
        if words[:2] == [sys.executable, "-m"]:
            words = words[2:]
        warm = words and words[0] in (*COMMANDS, *SLURM, SBATCH) and __name__ not in words
        if not warm or pass_fds or others_modules(environment):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[3:9]
        files = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        with self.starting:
            if WarmPopen.server is None:
                WarmPopen.server = ForkServer(thread_environment(1), *IMPORTS)
        request = {
            "words": words,
            "environment": environment,
            "folder": str(cwd or Path.cwd()),
            "session": rest[-2],
        }
        self.forked, self.server = True, WarmPopen.server
        self.pid = self.server.fork(__name__, [json.dumps(request)], {}, files)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _internal_poll(self, *args, **kwargs):
        if not self.forked:
            return super()._internal_poll(*args, **kwargs)
        if self.returncode is None:
            self.returncode = self.server.exit_code(self.pid)
        return self.returncode

    def _wait(self, timeout):
        if not self.forked:
            return super()._wait(timeout)
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self.returncode


def others_modules(environment):
    """Whether it may import other modules of the same names."""
    return environment.get("PYTHONPATH") not in (OWN_PATH, str(CHAOS))


class Twin(ForkServer):
    """A fork server that is a fork of this process."""

    def _launch(self, stdin):
        if pid := os.fork():
            return Child(pid)
        self._channel.close()
        os.dup2(stdin.fileno(), 0)
        for file in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file)
        sys.argv[1:] = []
        sys.exit(fork_server.main())


class Child:
    def __init__(self, pid):
        self.pid = pid

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        os.waitpid(self.pid, 0)


def main():
    """In a forked process: what a new interpreter would find, then the command."""
    from wandb.sdk.data_types._private import MEDIA_TMP

    request = json.loads(sys.argv[1])
    if request["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None  # it may have been asked for already, and $TMPDIR is another
    MEDIA_TMP._finalizer.detach()  # else the first process to end would remove wandb's folder of all
    MEDIA_TMP.__init__("wandb-media")
    WarmPopen.server = Twin({})
    subprocess.Popen = WarmPopen
    if "CHAOS_TOKENS" in os.environ:
        SourceFileLoader("chaos", str(CHAOS / "sitecustomize.py")).load_module()
    name, *arguments = request["words"]
    sys.argv = [name, *arguments]
    try:
        code = 0
        if name == SBATCH:
            runpy.run_path(shutil.which(name))
        elif name in SLURM:
            runpy.run_module(name, run_name="__main__")
        else:
            code = importlib.import_module(name).main() or 0
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an interpreter that ends looks at every object once more: seconds, for those that were imported
