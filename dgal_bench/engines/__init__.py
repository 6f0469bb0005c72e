"""Executes the runs of a sweep on an engine. The results folder is the only state: to resume is to read it again."""

from collections.abc import Callable, Mapping, Sequence

from dgal_bench.engines import local
from dgal_bench.engines.base import Engine, Listener, SynchronizedListener
from dgal_bench.engines.process import visible_gpus
from dgal_bench.engines.queue import RunQueue
from dgal_bench.engines.setup import compare_files, set_up
from dgal_bench.engines.sweep import PlannedRun, SweepSettings
from dgal_bench.results.rows import RunLog

EngineFactory = Callable[[Sequence[PlannedRun], SweepSettings, SynchronizedListener], Engine]


def _ray(jobs: Sequence[PlannedRun], settings: SweepSettings, notify: SynchronizedListener) -> Engine:
    from dgal_bench.engines.ray import RayEngine

    return RayEngine(jobs, settings, notify)


def _slurm(jobs: Sequence[PlannedRun], settings: SweepSettings, notify: SynchronizedListener) -> Engine:
    from dgal_bench.engines.slurm import SlurmEngine

    return SlurmEngine(jobs, settings, notify)


ENGINES: Mapping[str, EngineFactory] = {"local": local.LocalEngine, "ray": _ray, "slurm": _slurm}


def lanes_and_gpus(jobs: Sequence[PlannedRun], settings: SweepSettings) -> tuple[int, int]:
    """How many runs would execute at once, and on how many GPUs, estimated without starting an engine."""
    n_gpus = len(visible_gpus()) if settings.gpus is None else settings.gpus
    if settings.engine == "slurm":
        from dgal_bench.engines.slurm import parallel_runs

        return parallel_runs(jobs, settings), settings.gpus or 0
    return local.count_lanes(jobs, settings, n_gpus), n_gpus


def execute(
    jobs: Sequence[PlannedRun], settings: SweepSettings, listener: Listener, finished: Mapping[PlannedRun, RunLog]
) -> list[PlannedRun]:
    """Set up every data set, then execute the runs; a failed run is recorded and the others go on.

    ``finished``: runs on a user's own files, which are checked for changes.

    Returns:
        The runs that failed.

    Raises:
        UserError: data is missing, a setting is wrong, every setup failed, a run needs more points than the data
            has, the results folder cannot be written, or several runs in a row could not start.
    """
    notify = SynchronizedListener(listener)
    run_queue = RunQueue(jobs, notify)  # before the setup: other commands may finish runs during it
    engine = ENGINES[settings.engine](jobs or list(finished)[:1], settings, notify)
    try:
        compare_files(finished, engine, notify)
        broken = set_up(jobs, engine, notify)
        run_queue.drop(broken)
        if not run_queue.over:
            engine.run(run_queue)
        if run_queue.fatal is not None:
            raise run_queue.fatal
        return [*broken, *run_queue.failed]
    finally:
        engine.close()
