"""Engines only schedule cells: the results folder is the only truth, and to resume is to look at it again."""

from collections.abc import Callable, Mapping, Sequence

from dgal_bench.engines import local
from dgal_bench.engines.base import Engine, Listener, Teller
from dgal_bench.engines.docket import Docket
from dgal_bench.engines.setup import compare, set_up
from dgal_bench.process import visible_gpus
from dgal_bench.record import CellLog
from dgal_bench.sweep import Job, Settings

Make = Callable[[Sequence[Job], Settings, Teller], Engine]


def _ray(jobs: Sequence[Job], settings: Settings, tell: Teller) -> Engine:
    from dgal_bench.engines.ray import Ray

    return Ray(jobs, settings, tell)


def _slurm(jobs: Sequence[Job], settings: Settings, tell: Teller) -> Engine:
    from dgal_bench.engines.slurm import Slurm

    return Slurm(jobs, settings, tell)


ENGINES: Mapping[str, Make] = {"local": local.Local, "ray": _ray, "slurm": _slurm}


def side_by_side(jobs: Sequence[Job], settings: Settings) -> tuple[int, int]:
    """How many cells would run at once, and on how many GPUs, as far as that can be told without an engine."""
    n_gpus = len(visible_gpus()) if settings.gpus is None else settings.gpus
    if settings.engine == "slurm":
        from dgal_bench.engines.sbatch import parallel

        return parallel(jobs, settings), settings.gpus or 0
    return local.lanes(jobs, settings, n_gpus), n_gpus


def execute(jobs: Sequence[Job], settings: Settings, listener: Listener, finished: Mapping[Job, CellLog]) -> list[Job]:
    """Set every data set up, then run the cells; a failed one is recorded and the others go on.

    ``finished``: cells that rest on a user's own files, of which only a set-up knows whether they are still the same.

    Returns:
        The cells that failed.

    Raises:
        UserError: data missing, a wrong setting, nothing that could be set up, a cell that asks more of the data than
            there is, a results folder that takes no more rows, or one cell after the other that cannot begin.
    """
    tell = Teller(listener)
    docket = Docket(jobs, tell)  # now: other runners may end some of them while the set-up goes on
    engine = ENGINES[settings.engine](jobs or list(finished)[:1], settings, tell)
    try:
        compare(finished, engine, tell)
        broken = set_up(jobs, engine, tell)
        docket.drop(broken)
        if not docket.over:
            engine.run(docket)
        if docket.fatal is not None:
            raise docket.fatal
        return [*broken, *docket.failed]
    finally:
        engine.close()
