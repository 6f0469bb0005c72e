"""Engines only schedule runs: the results folder is the only truth, and to resume is to look at it again."""

from collections.abc import Callable, Mapping, Sequence

from dgal_bench.engines import local
from dgal_bench.engines.base import Engine, Listener, SynchronizedListener
from dgal_bench.engines.process import visible_gpus
from dgal_bench.engines.queue import RunQueue
from dgal_bench.engines.setup import compare_files, set_up
from dgal_bench.engines.sweep import PlannedRun, SweepSettings
from dgal_bench.results.rows import RunLog

Make = Callable[[Sequence[PlannedRun], SweepSettings, SynchronizedListener], Engine]


def _ray(jobs: Sequence[PlannedRun], settings: SweepSettings, tell: SynchronizedListener) -> Engine:
    from dgal_bench.engines.ray import RayEngine

    return RayEngine(jobs, settings, tell)


def _slurm(jobs: Sequence[PlannedRun], settings: SweepSettings, tell: SynchronizedListener) -> Engine:
    from dgal_bench.engines.slurm import SlurmEngine

    return SlurmEngine(jobs, settings, tell)


ENGINES: Mapping[str, Make] = {"local": local.LocalEngine, "ray": _ray, "slurm": _slurm}


def side_by_side(jobs: Sequence[PlannedRun], settings: SweepSettings) -> tuple[int, int]:
    """How many runs would run at once, and on how many GPUs, as far as that can be told without an engine."""
    n_gpus = len(visible_gpus()) if settings.gpus is None else settings.gpus
    if settings.engine == "slurm":
        from dgal_bench.engines.slurm import parallel_runs

        return parallel_runs(jobs, settings), settings.gpus or 0
    return local.count_lanes(jobs, settings, n_gpus), n_gpus


def execute(
    jobs: Sequence[PlannedRun], settings: SweepSettings, listener: Listener, finished: Mapping[PlannedRun, RunLog]
) -> list[PlannedRun]:
    """Set every data set up, then run the runs; a failed one is recorded and the others go on.

    ``finished``: runs that rest on a user's own files, of which only a set-up knows whether they are still the same.

    Returns:
        The runs that failed.

    Raises:
        UserError: data missing, a wrong setting, nothing that could be set up, a run that asks more of the data than
            there is, a results folder that takes no more rows, or one run after the other that cannot begin.
    """
    tell = SynchronizedListener(listener)
    run_queue = RunQueue(jobs, tell)  # now: other runners may end some of them while the set-up goes on
    engine = ENGINES[settings.engine](jobs or list(finished)[:1], settings, tell)
    try:
        compare_files(finished, engine, tell)
        broken = set_up(jobs, engine, tell)
        run_queue.drop(broken)
        if not run_queue.over:
            engine.run(run_queue)
        if run_queue.fatal is not None:
            raise run_queue.fatal
        return [*broken, *run_queue.failed]
    finally:
        engine.close()
