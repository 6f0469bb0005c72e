"""Shows progress and time left on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Mapping
from time import perf_counter
from typing import TextIO

from tqdm import tqdm

from dgal_bench.engines.sweep import PlannedRun


def duration(seconds: float) -> str:
    """``7 s``, ``3:05`` or ``1:02:45``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def new_progress(to_do: Mapping[PlannedRun, int]) -> "LineProgress | BarProgress":
    """A Listener on stderr; ``to_do``: the evaluations that each run still lacks."""
    stream = sys.stderr
    return BarProgress(to_do, stream) if stream.isatty() else LineProgress(to_do, stream)


class LineProgress:
    """One line per finished run, and some lines during a setup."""

    def __init__(self, to_do: Mapping[PlannedRun, int], stream: TextIO) -> None:
        self._to_do = dict(to_do)
        self._runs = len(to_do)
        self._finished = self._evaluated = 0
        self._stream = stream
        self._start = perf_counter()
        self._timing = False  # whether ``_start`` is the first run's
        self._accuracy: dict[str, float] = {}
        self._step = "", "", 0, self._start  # data set, what, how much was done at the start, start

    def setting_up(self, name: str, what: str, done: int, of: int) -> None:
        if (name, what) != self._step[:2] or done < self._step[2]:
            self._step = name, what, done, perf_counter()
        if done == self._step[2] or of <= 1 or done % max(1, of // 5) == 0:
            self._say(f"[set-up] {name}: {what}" + (f" {done}/{of}{self._step_left(done, of)}" if of > 1 else ""))

    def _step_left(self, done: int, of: int) -> str:
        """Time left, from the speed of this command: an earlier one may have done a part of the step."""
        _, _, first, start = self._step
        left = (perf_counter() - start) / (done - first) * (of - done) if done > first else 0
        return f", about {duration(left)} left" if left >= 1 else ""

    def drawing(self, done: int, of: int) -> None:
        """``done`` of ``of`` groups of a report are drawn."""
        if done == 0:
            self._start = perf_counter()
        elif of > 1:
            left = (perf_counter() - self._start) / done * (of - done)
            self._say(f"[report] {done} of {of} drawn" + (f", about {duration(left)} left" if left else ""))

    def begun(self, job: PlannedRun) -> None:
        if not self._timing:
            self._start = perf_counter()  # the setup does not count for the time left
        self._timing = True

    def round(self, job: PlannedRun, accuracy: float) -> None:
        self._evaluated += 1
        self._to_do[job] -= 1
        self._accuracy[job.name] = accuracy

    def done(self, job: PlannedRun, seconds: float) -> None:
        self._finish(job)
        # without a round: another command has finished the run
        what = f"{self._accuracy[job.name]:.1%}" if job.name in self._accuracy else "done already"
        self._say(f"{self._place()} {job.name}: {what} in {duration(seconds)}{self._eta()}")

    def skipped(self, job: PlannedRun, why: str) -> None:
        self._finish(job)
        self._say(f"{self._place()} {job.name}: skipped: {why}{self._eta()}")

    def failed(self, job: PlannedRun, error: str) -> None:
        self._finish(job)
        self._say(f"{self._place()} {job.name}: FAILED: {error}{self._eta()}")

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def close(self) -> None:
        pass

    def _finish(self, job: PlannedRun) -> None:
        self._finished += 1
        self._to_do[job] = 0

    def _place(self) -> str:
        return f"[{self._finished:>{len(str(self._runs))}}/{self._runs}]"

    def _eta(self) -> str:
        left = sum(self._to_do.values())
        if not self._evaluated or left <= 0:
            return ""
        return f", about {duration((perf_counter() - self._start) / self._evaluated * left)} left"

    def _say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class BarProgress:
    """A tqdm bar of evaluations; another one during a setup."""

    def __init__(self, to_do: Mapping[PlannedRun, int], stream: TextIO) -> None:
        tqdm.monitor_interval = 0  # its thread would be in the way of forks, and updates no bar here
        self._stream = stream
        self._to_do = dict(to_do)
        self._rounds = sum(to_do.values())
        self._bar: tqdm | None = None
        self._what = ""

    def _show(self, what: str, total: int, unit: str, done: int = 0) -> tqdm:
        """The bar ``what``; ``done``: how much was done before it is shown."""
        if self._bar is None or self._what != what:
            self.close()
            style = {"dynamic_ncols": True, "leave": False, "mininterval": 0}
            self._bar = tqdm(total=total, unit=unit, file=self._stream, desc=what, initial=done, **style)
            self._what = what
        return self._bar

    def setting_up(self, name: str, what: str, done: int, of: int) -> None:
        unit = next((word for word in ("epoch", "MB") if word in what), "step")
        bar = self._show(f"set-up {name}: {what}", of, unit, done)
        bar.update(done - bar.n)

    def drawing(self, done: int, of: int) -> None:
        bar = self._show("report", of, "data set")
        bar.update(done - bar.n)

    def _runs(self) -> tqdm:
        return self._show("runs", self._rounds, "round")

    def begun(self, job: PlannedRun) -> None:
        self._runs()

    def round(self, job: PlannedRun, accuracy: float) -> None:
        self._to_do[job] -= 1
        self._runs().set_postfix_str(f"{job.name} {accuracy:.1%}")
        self._runs().update()

    def done(self, job: PlannedRun, seconds: float) -> None:
        """Counts the evaluations that another command has done as well."""
        self._runs().update(self._to_do.pop(job, 0))

    def skipped(self, job: PlannedRun, why: str) -> None:
        self.done(job, 0.0)
        tqdm.write(f"{job.name}: skipped: {why}", file=self._stream)

    def failed(self, job: PlannedRun, error: str) -> None:
        self.done(job, 0.0)
        tqdm.write(f"{job.name}: FAILED: {error}", file=self._stream)

    def warn(self, text: str) -> None:
        tqdm.write(f"warning: {text}", file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
