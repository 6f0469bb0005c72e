"""Processes forked from one that has imported what they run: they are what new interpreters would be, only sooner."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dgal_bench.core.fork_server import ForkServer
from tests.sweeping import is_alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every process imports for itself")

MODULE = """
import os, sys
IMPORTED_BY = os.getpid()
def main():
    print(os.getpid() == IMPORTED_BY, os.environ["EARLY"], os.environ["LATE"], *sys.argv[1:], flush=True)
    print("on stderr", file=sys.stderr)
    return int(sys.stdin.read())
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "forked_module.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("raise ImportError('no such library')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    servers = []

    def start(*modules):
        servers.append(ForkServer({"EARLY": "1"}, *modules))
        return servers[-1]

    yield start
    for one in servers:
        one.close()


@pytest.fixture
def stderr():
    with tempfile.TemporaryFile("w+") as file:
        yield file


def start(server, stderr, *arguments, module="forked_module"):
    return server.start(module, *arguments, environment={"LATE": "2"}, stderr=stderr)


def finish(process, text=""):
    process.stdin.write(text)
    process.stdin.close()
    with process.stdout:
        return process.stdout.read(), process.wait()


def test_a_process_has_its_arguments_environment_streams_and_exit_code(server, stderr):
    """And imports nothing."""
    process = start(server("forked_module"), stderr, "a", "b c")
    assert process.poll() is None
    assert finish(process, "7") == ("False 1 2 a b c\n", 7)
    assert process.poll() == 7
    stderr.seek(0)
    assert stderr.read() == "on stderr\n"


def test_many_side_by_side_end_each_with_its_own_code(server, stderr):
    """The pipes of one are in no other: each ends when its own stdin does."""
    one = server("forked_module")
    processes = [start(one, stderr) for _ in range(5)]
    assert [finish(process, str(code))[1] for code, process in enumerate(processes)] == list(range(5))


def test_a_killed_one_says_the_signal(server, stderr):
    process = start(server("forked_module"), stderr)
    process.kill()
    assert finish(process)[1] == -signal.SIGKILL


def test_where_an_import_fails_each_process_says_so_itself(server, stderr):
    one = server("broken_module")
    assert finish(start(one, stderr, module="broken_module"))[1] == 1
    stderr.seek(0)
    assert stderr.read().endswith("ImportError: no such library\n")
    assert finish(start(one, stderr, "x"), "3") == ("True 1 2 x\n", 3)


def test_a_killed_server_takes_its_processes_along_and_is_replaced(server, stderr):
    one = server("forked_module")
    process = start(one, stderr)
    parent = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    while is_alive(parent):
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()
    assert finish(start(one, stderr), "4") == ("False 1 2\n", 4)


def test_a_closed_server_ends_and_may_be_closed_again(server, stderr):
    one = server("forked_module")
    process = start(one, stderr)
    parent = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
    finish(process, "0")
    one.close()
    one.close()
    assert not is_alive(parent)
