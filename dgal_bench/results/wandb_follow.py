"""The process beside a sweep that mirrors its files: ``python -m dgal_bench.tracking.follow FD``.

FD is a file of one JSON object (see driver.py). stdin says nothing but that it ends: then the sweep is over, however
it ended. A line on stdout is a warning for whoever watches the sweep.
"""

import json
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dgal_bench.core.errors import ResultsError, UserError
from dgal_bench.results.reader import read_run
from dgal_bench.results.rows import RunLog
from dgal_bench.results.tracking import Tracking

if TYPE_CHECKING:
    from dgal_bench.results.wandb import RunMirror


NICENESS = 10
"""Beside timed queries. Not more: beside a busy sweep wandb's own process would miss its time limits."""

FINISH_SECONDS = 20.0
"""For a run's last rows; the driver waits 30 s in all, and there must be time to write them offline."""

POLL_SECONDS = 2.0

LAST_SECONDS = 60
"""After the sweep is over: nobody may be left to end a process that hangs."""


class FileMirror:
    """Looks at files that may not be there yet, and brings their runs up to them."""

    def __init__(self, paths: Sequence[Path], mirror: "RunMirror", warn: Callable[[str], None]) -> None:
        self._paths = list(paths)
        self._mirror = mirror
        self._warn = warn
        self._sizes: dict[Path, int] = {}
        self._ended: dict[Path, int] = {}  # sizes of the files whose runs are finished
        self._logs: dict[Path, RunLog] = {}

    def look(self) -> None:
        """Tell what is new; all of it again once W&B is found to be gone, which leaves the runs of now unfinished."""
        online = self._mirror.online
        for path in list(self._paths):
            self._look_at(path)
        if online and not self._mirror.online:
            self._sizes = dict(self._ended)
            self.look()

    def close(self) -> None:
        """Finish the runs of runs that have not come to an end; as in ``look`` if W&B is found to be gone."""
        online = self._mirror.online
        for path, log in self._logs.items():
            if self._mirror.is_open(log):
                self._finish(path, log)
        if online and not self._mirror.online:
            self._sizes = dict(self._ended)
            self.look()
            self.close()

    def _look_at(self, path: Path) -> None:
        size = _size(path)
        if size == self._sizes.get(path, 0):
            return
        try:
            log = read_run(path)
        except ResultsError as error:
            self._paths.remove(path)
            self._warn(f"W&B: {error}")
            return
        if log is not None and log.begun:
            self._tell(path, log)
        self._sizes[path] = size  # of before the read: what came meanwhile is seen next time

    def _tell(self, path: Path, log: RunLog) -> None:
        self._logs[path] = log
        if not (self._mirror.online or self._mirror.is_open(log)) and self._mirror.has(log):
            return
        self._mirror.update(log)
        if log.status != "partial":
            self._finish(path, log)

    def _finish(self, path: Path, log: RunLog) -> None:
        self._mirror.finish(log)
        self._ended[path] = log.length


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _over(seconds: float) -> bool:
    """Whether stdin has ended; waits so long for it."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _say(warning: str) -> None:
    """Nobody listens any more where the sweep was killed."""
    try:
        sys.stdout.write(warning + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    from dgal_bench.results.wandb import RunMirror  # not above: torch and wandb take seconds, which are to be nice

    with open(int(sys.argv[1]), encoding="utf-8") as file:
        told = json.load(file)
    mirror = RunMirror(Tracking.restored(told["tracking"]), _say, finish_seconds=FINISH_SECONDS)
    follower = FileMirror([Path(path) for path in told["paths"]], mirror, _say)
    try:
        while not _over(POLL_SECONDS):
            follower.look()
        signal.alarm(LAST_SECONDS)
        follower.look()
        follower.close()
    except UserError as error:
        _say(f"W&B: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
