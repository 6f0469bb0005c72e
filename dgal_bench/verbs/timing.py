"""The verb that times queries again: ``replay``."""

from dgal_bench.arguments import Command
from dgal_bench.verbs.saying import say


def replay(command: Command) -> int:
    from dgal_bench.progress import new_progress
    from dgal_bench.request import replay_of
    from dgal_bench.retiming import plan, work

    wanted = replay_of(command)
    todo = plan.plan(wanted)
    progress = new_progress({item.job: len(item.rounds) for item in todo.items})
    try:
        outcome = work.execute(todo, wanted, progress)
    finally:
        progress.close()
    if outcome.timings:
        say(work.told(outcome, todo))
    return 1 if outcome.trouble else 0
