"""The mirror as the driver of a sweep sees it: a process that watches the files, and that no sweep waits long for."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import IO

from tqdm import tqdm

from dgal_bench.tracking.settings import Tracking

PATIENCE = 30.0
"""Seconds for what is left to be told when a sweep is over; a sweep that is stopped has less."""

STOPPED_PATIENCE = 1.0

QUIET = 2.0
"""Seconds after which whoever watches is told what he waits for."""

LISTENED = 1.0
"""Seconds for the last warnings of a mirror that is over."""

INCOMPLETE = "W&B has not taken everything: 'dgal-bench push {results}' completes it"


@contextmanager
def mirrored(
    tracking: Tracking | None, results: Path, paths: Sequence[Path], warn: Callable[[str], None]
) -> Iterator[None]:
    """Mirror the files at ``paths`` while in here; whatever becomes of that, the sweep is as it would be without."""
    if tracking is None or not paths:
        yield
        return
    mirror = _Mirroring(tracking, results, paths, warn)
    patience = STOPPED_PATIENCE
    try:
        yield
        patience = PATIENCE
    except Exception:
        patience = PATIENCE
        raise
    finally:
        mirror.close(patience)


class _Mirroring:
    """The process, in a session of its own: Ctrl-C is not for it, and killed it takes its children along."""

    def __init__(self, tracking: Tracking, results: Path, paths: Sequence[Path], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._incomplete = INCOMPLETE.format(results=results)
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the process
        self._process = _started(
            {"tracking": tracking.plain, "paths": [str(p.absolute()) for p in paths]}, self._stderr
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._warn(line.rstrip("\n"))

    def close(self, patience: float) -> None:
        """Say that the sweep is over, and wait so long for the mirror to be; stopped meanwhile, it waits no more."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = None
        try:
            code = self._ended(patience)
        finally:  # a second Ctrl-C included
            if code is None:
                code = self._kill()
            self._listener.join(LISTENED)
            if code != 0:
                self._warn(self._incomplete + self._epitaph())
            self._stderr.close()

    def _ended(self, patience: float) -> int:
        start = monotonic()
        if not self._over(min(QUIET, patience)) and patience > QUIET:
            tqdm.write(f"W&B: waiting up to {patience:.0f} s for the last rows to be taken", file=sys.stderr)
        return self._process.returncode if self._over(start + patience - monotonic()) else self._kill()

    def _over(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))
        return self._process.returncode is not None

    def _kill(self) -> int:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _epitaph(self) -> str:
        self._stderr.seek(0)
        last = self._stderr.read().strip().rpartition("\n")[2]
        return f" ({last[:200]})" if last else ""


def _started(told: dict[str, object], stderr: IO[str]) -> "subprocess.Popen[str]":
    """The list may be longer than a pipe holds, and nobody waits for its reader: it is in a file without a name."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        json.dump(told, file)
        file.flush()
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-m", "dgal_bench.tracking.follow", str(file.fileno())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace",
            pass_fds=[file.fileno()], start_new_session=True,
        )  # fmt: skip
