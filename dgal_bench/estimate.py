"""How long a sweep would take, reckoned from rows of before; where there are none, nothing is assumed."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgal_bench.past import Guess, Past, on_gpu
from dgal_bench.progress import duration
from dgal_bench.record import CellLog
from dgal_bench.sweep import Job


def makespan(seconds: Iterable[float], n_lanes: int) -> float:
    """When the last of them ends, if each in turn goes to the lane that is free first."""
    free = [0.0] * n_lanes
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


@dataclass(frozen=True, eq=False)
class Estimate:
    """Of the cells to run, a guess each or None; of the set-ups they need, seconds or None.

    ``rows_of``: the machines whose rows it rests on. ``foreign``: some are of the other kind of device.
    """

    guesses: Mapping[Job, Guess | None]
    set_ups: Mapping[str, float | None]
    n_lanes: int
    n_gpus: int
    rows_of: Sequence[str]
    foreign: bool

    @property
    def known(self) -> list[Guess]:
        return [guess for guess in self.guesses.values() if guess is not None]

    @property
    def set_up_seconds(self) -> float:
        return sum(seconds or 0.0 for seconds in self.set_ups.values())

    @property
    def seconds(self) -> float | None:
        """Set-ups one after the other, then the cells side by side; None: nothing is known of any cell."""
        if not self.known:
            return None
        return self.set_up_seconds + makespan((guess.seconds for guess in self.known), self.n_lanes)


def estimated(
    todo: Sequence[Job], logs: Mapping[Path, CellLog | None], past: Sequence[CellLog], n_lanes: int, n_gpus: int = 0
) -> Estimate:
    """Reckon the cells ``todo``, of which ``logs`` has the rows that are there already, by the cells ``past``."""
    rows = Past(past)
    guesses: dict[Job, Guess | None] = {}
    set_ups: dict[str, float | None] = {}
    rows_of, foreign = set(), False
    for job in todo:
        gpu = n_gpus > 0 and job.config.device != "cpu"
        log = logs[job.path]
        guess = guesses[job] = rows.guess(job, len(log.records) if log else 0, gpu)
        used = list(guess.logs) if guess else []
        if job.setup_key not in set_ups and not job.config.full_supervision:
            seconds, of = rows.set_up(job, gpu) or (None, [])
            set_ups[job.setup_key] = seconds
            used += of
        rows_of |= {_machine(one) for one in used}
        foreign |= any(on_gpu(one) != gpu for one in used)
    return Estimate(guesses, set_ups, n_lanes, n_gpus, sorted(rows_of), foreign)


def _machine(log: CellLog) -> str:
    device = str(log.header["fingerprint"]["device"])
    return f"{log.header['provenance']['machine']['cpu']}, cpu" if device == "cpu" else device


def lines(jobs: Sequence[Job], logs: Mapping[Path, CellLog | None], estimate: Estimate) -> list[str]:
    """The cells counted, by data set too where there are several, and about how long those to run would take."""
    gpus = f" ({_count(estimate.n_gpus, 'GPU')})" if estimate.n_gpus else ""
    told = [f"{_counted(jobs, logs, estimate)}, {estimate.n_lanes} side by side{gpus}"]
    by_name: dict[str, list[Job]] = {}
    for job in jobs:
        by_name.setdefault(job.config.dataset.name, []).append(job)
    if len(by_name) > 1:
        width = max(map(len, by_name))
        told += [
            f"  {name:{width}}  {_counted(one, logs, estimate)}{_work(one, estimate)}" for name, one in by_name.items()
        ]
    return told + (_reckoning(estimate) if estimate.guesses else [])


def _counted(jobs: Sequence[Job], logs: Mapping[Path, CellLog | None], estimate: Estimate) -> str:
    statuses = [log.status for job in jobs if (log := logs[job.path]) is not None and job not in estimate.guesses]
    aside = "".join(f", {n} {status}" for status in ("failed", "skipped") if (n := statuses.count(status)))
    n_todo = sum(job in estimate.guesses for job in jobs)
    return f"{_count(len(jobs), 'cell')}: {statuses.count('done')} done{aside}, {n_todo} to run"


def _work(jobs: Sequence[Job], estimate: Estimate) -> str:
    """The seconds of a data set's cells, one after the other."""
    todo = [estimate.guesses[job] for job in jobs if job in estimate.guesses]
    known = [guess.seconds for guess in todo if guess is not None]
    if not known:
        return ", no past rows" if todo else ""
    of = "" if len(known) == len(todo) else f" for {len(known)} of them"
    return f", about {duration(sum(known))} of work{of}"


def _reckoning(estimate: Estimate) -> list[str]:
    if estimate.seconds is None:
        return ["how long is not known: past=DIR,... names no results of these data sets and networks"]
    known, n_todo = estimate.known, len(estimate.guesses)
    other = f", not of {'the GPUs' if estimate.n_gpus else 'a machine without GPU, as'} asked for"
    told = [
        f"about {duration(estimate.seconds)} for {len(known)} of {_count(n_todo, 'cell')}, by rows of "
        f"{'; '.join(estimate.rows_of)}{other if estimate.foreign else ''}"
    ]
    if n_like := sum(guess.like for guess in known):
        told.append(f"  {n_like} by rows like theirs, all but the seed")
    if rough := [guess for guess in known if not guess.like]:
        blind = sum(not guess.with_queries for guess in rough)
        told.append(
            f"  {len(rough)} roughly, by rows of the same data set and network"
            + (f"; {blind} of them without queries: none was ever timed" if blind else "")
        )
    if len(known) < n_todo:
        told.append(f"  {n_todo - len(known)} have no past rows and are not in it")
    if estimate.set_ups:
        told.append(_set_up_line(list(estimate.set_ups.values()), estimate.set_up_seconds))
    return told


def _set_up_line(set_ups: Sequence[float | None], seconds: float) -> str:
    n_known = sum(one is not None for one in set_ups)
    whole = f"about {duration(seconds)} of it, less what the cache has already"
    known = [whole if n_known == len(set_ups) else f"{n_known} {whole}"] if n_known else []
    missing = [f"{len(set_ups) - n_known} not known"] if n_known < len(set_ups) else []
    return f"  {_count(len(set_ups), 'set-up')}: {'; '.join(known + missing)}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
