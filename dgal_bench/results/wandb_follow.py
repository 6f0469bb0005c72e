"""The process beside a sweep that mirrors its files to W&B: ``python -m dgal_bench.results.wandb_follow FD``.

FD is a file of one JSON object (``wandb_process`` writes it). The end of stdin says that the sweep is over,
for any reason. A line on stdout is a warning for the sweep's terminal.
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
from dgal_bench.results.wandb_process import Tracking

if TYPE_CHECKING:
    from dgal_bench.results.wandb import RunMirror


NICENESS = 10
"""Not to disturb timed queries. More would make wandb's own process miss its time limits beside a busy sweep."""

FINISH_SECONDS = 20.0
"""For a run's last rows; the sweep waits 30 s in all, which leaves time to write them offline."""

POLL_SECONDS = 2.0

LAST_SECONDS = 60
"""After the sweep: then an alarm ends this process, in case it hangs and the sweep was killed."""


class FileMirror:
    """Watches files, which may not exist yet, and updates their W&B runs."""

    def __init__(self, paths: Sequence[Path], mirror: "RunMirror", warn: Callable[[str], None]) -> None:
        self._paths = list(paths)
        self._mirror = mirror
        self._warn = warn
        self._sizes: dict[Path, int] = {}
        self._final_sizes: dict[Path, int] = {}  # of the files whose runs are finished
        self._logs: dict[Path, RunLog] = {}

    def look(self) -> None:
        """Mirror new rows. If W&B becomes unreachable, mirror all rows of unfinished W&B runs again, offline."""
        online = self._mirror.online
        for path in list(self._paths):
            self._look_at(path)
        if online and not self._mirror.online:
            self._sizes = dict(self._final_sizes)
            self.look()

    def close(self) -> None:
        """Finish the W&B runs that are still open; as in ``look`` if W&B becomes unreachable."""
        online = self._mirror.online
        for path, log in self._logs.items():
            if self._mirror.is_open(log):
                self._finish(path, log)
        if online and not self._mirror.online:
            self._sizes = dict(self._final_sizes)
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
            self._update(path, log)
        self._sizes[path] = size  # from before the read: later rows are seen next time

    def _update(self, path: Path, log: RunLog) -> None:
        self._logs[path] = log
        if not (self._mirror.online or self._mirror.is_open(log)) and self._mirror.has(log):
            return
        self._mirror.update(log)
        if log.status != "partial":
            self._finish(path, log)

    def _finish(self, path: Path, log: RunLog) -> None:
        self._mirror.finish(log)
        self._final_sizes[path] = log.length


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _over(seconds: float) -> bool:
    """Whether stdin has ended; waits up to ``seconds`` for it."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _warn(warning: str) -> None:
    """Without effect if the sweep was killed: the pipe is closed."""
    try:
        sys.stdout.write(warning + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    from dgal_bench.results.wandb import RunMirror  # not at the top: imports take seconds and must be nice

    with open(int(sys.argv[1]), encoding="utf-8") as file:
        request = json.load(file)
    mirror = RunMirror(Tracking.from_plain(request["tracking"]), _warn, finish_seconds=FINISH_SECONDS)
    follower = FileMirror([Path(path) for path in request["paths"]], mirror, _warn)
    try:
        while not _over(POLL_SECONDS):
            follower.look()
        signal.alarm(LAST_SECONDS)
        follower.look()
        follower.close()
    except UserError as error:
        _warn(f"W&B: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
