"""Starts processes by fork from one that has imported what they run: 0.05 s of CPU each, where the imports take 5.

``python -m dgal_bench.core.fork_server MODULE ...`` is that one. It imports, forks and waits, and does nothing else: a
fork is safe as long as a process has neither threads nor an open GPU. Its requests come through its stdin, a socket.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

_MOST_BYTES = 1 << 16


class ForkServer:
    """Runs ``MODULE.main()`` in processes of one environment, any of ``modules`` at little cost.

    The server ends with ``close``, or when this process does; processes that it has started go on.
    """

    def __init__(self, environment: Mapping[str, str], *modules: str) -> None:
        self.environment = environment
        self._modules = modules
        self._lock = threading.Lock()
        self._connect()

    def _connect(self) -> None:
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._server = self._launch(theirs)

    def _launch(self, stdin: socket.socket) -> "subprocess.Popen[bytes] | ForkedProcess":
        words = [sys.executable, "-m", "dgal_bench.core.fork_server", *self._modules]
        return subprocess.Popen(
            words,
            stdin=stdin.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **self.environment},
        )

    def start(self, module: str, *arguments: str, environment: Mapping[str, str], stderr: IO[str]) -> "ForkedProcess":
        """Start a process with pipes as stdin and stdout; ``environment``: variables that no import reads."""
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        try:
            pid = self.fork(module, arguments, environment, (theirs_in, theirs_out, stderr.fileno()))
        except BaseException:
            os.close(ours_in)
            os.close(ours_out)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        return ForkedProcess(self, pid, os.fdopen(ours_in, "w"), os.fdopen(ours_out))

    def fork(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], files: tuple[int, int, int]
    ) -> int:
        """Start a process with these open files as stdin, stdout and stderr; returns its id."""
        request = {"module": module, "arguments": arguments, "environment": dict(environment)}
        return self._ask(request, files)  # type: ignore[no-any-return]

    def exit_code(self, pid: int) -> int | None:
        """Of a process that this server started, as ``subprocess`` has it; None: it runs.

        When the server was killed nobody can tell how its processes end: they are killed too.
        """
        try:
            return self._ask({"pid": pid})  # type: ignore[no-any-return]
        except ConnectionError:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return -signal.SIGKILL

    def _ask(self, request: Mapping[str, Any], files: Sequence[int] = ()) -> Any:
        with self._lock:
            answer = self._exchange(request, files)
            if not answer and files:  # the server was killed, and another can start processes just as well
                self.close()
                self._connect()
                answer = self._exchange(request, files)
        if not answer:
            raise ConnectionError("the fork server has ended")
        return json.loads(answer)

    def _exchange(self, request: Mapping[str, Any], files: Sequence[int]) -> bytes:
        with suppress(OSError):  # its end is gone, or ours is closed
            socket.send_fds(self._channel, [json.dumps(request).encode()], files)
            return self._channel.recv(_MOST_BYTES)
        return b""

    def close(self) -> None:
        """End the server, not what it has started; may be called again."""
        self._channel.close()
        self._server.kill()
        self._server.wait()


class ForkedProcess:
    """A process that a ForkServer started, with the methods of ``subprocess.Popen``."""

    def __init__(self, server: ForkServer, pid: int, stdin: IO[str], stdout: IO[str]) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.exit_code(self.pid)
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        if self.poll() is None:  # so the number is still its own
            os.kill(self.pid, signal.SIGKILL)


def main() -> int:
    """Import the modules, then serve until the parent is gone. In a forked process: run its module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    channel = socket.socket(fileno=os.dup(0))
    forks = _import(sys.argv[1:])
    codes: dict[int, int] = {}
    while True:
        message, files, _, _ = socket.recv_fds(channel, _MOST_BYTES, 3)
        if not message:
            os._exit(0)  # to take all that was imported apart would cost seconds
        request = json.loads(message)
        if "pid" in request:
            answer = _exit_code(request["pid"], codes)
        elif not forks:
            answer = _spawn(request, files)
        elif not (answer := os.fork()):
            channel.close()
            return _run(request, files)
        for file in files:
            os.close(file)
        channel.send(json.dumps(answer).encode())


def _import(modules: Sequence[str]) -> bool:
    """Whether processes may be forked after it. If not, each imports for itself, and says itself what is wrong."""
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception:  # noqa: BLE001 - whatever a module raises
        return False
    gc.freeze()  # else a process's first collection would touch, and so copy, all that was imported
    torch = sys.modules.get("torch")
    # OpenBLAS has threads by now, but ends them before a fork; OpenMP has none before its first work.
    return sys.platform == "linux" and threading.active_count() == 1 and not (torch and torch.cuda.is_initialized())


def _run(request: Mapping[str, Any], files: Sequence[int]) -> int:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["environment"])
    sys.argv[1:] = request["arguments"]
    return importlib.import_module(request["module"]).main() or 0


def _spawn(request: Mapping[str, Any], files: Sequence[int]) -> int:
    words = [sys.executable, "-m", request["module"], *request["arguments"]]
    places = [(os.POSIX_SPAWN_DUP2, file, number) for number, file in enumerate(files)]
    return os.posix_spawn(sys.executable, words, os.environ | request["environment"], file_actions=places)


def _exit_code(pid: int, codes: dict[int, int]) -> int | None:
    if pid not in codes:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            return None
        codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


if __name__ == "__main__":
    sys.exit(main())
