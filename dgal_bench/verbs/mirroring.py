"""Verbs that bring a results folder to W&B: ``push`` its runs, and a ``dashboard`` to look at them."""

from pathlib import Path

from dgal_bench.arguments import Command
from dgal_bench.errors import ConfigError
from dgal_bench.verbs.saying import say, warn


def push(command: Command) -> int:
    from dgal_bench.request import only_flags, only_places, wandb_of
    from dgal_bench.tracking.push import push as pushed
    from dgal_bench.tracking.settings import WANDB

    if len(command.words) != 1:
        raise ConfigError("push takes one results folder: dgal-bench push RESULTS")
    only_flags(command)
    only_places(command, *WANDB, "data", "cache", "offline")
    strict = command.one("wandb.mode", "auto") == "online"
    done = pushed(Path(command.words[0]), wandb_of(command), strict, warn)
    say(done.text)
    return done.exit_code


def dashboard(command: Command) -> int:
    from dgal_bench.record import read_results
    from dgal_bench.request import offline, only_flags, only_places, project_of

    only_flags(command, "--dry-run", "--push")
    only_places(command, "wandb.project", "wandb.entity", "offline")
    if len(command.flags) != 1 or len(command.words) > 1:
        raise ConfigError("dashboard takes one of two: dgal-bench dashboard [RESULTS] --dry-run FILE, or --push")
    if "--push" in command.flags and offline(command):
        raise ConfigError("--push contradicts offline=true (also in $DGAL_OFFLINE): use --dry-run FILE")
    try:
        from dgal_bench.tracking import saving
        from dgal_bench.tracking.dashboard import shelves
    except ImportError as error:
        if "wandb_workspaces" not in (error.name or ""):
            raise
        raise ConfigError("dashboard needs wandb-workspaces: pip install 'dgal-bench[dashboard]'") from error
    project, entity = project_of(command)
    found = [shelf for results in command.words for shelf in shelves(read_results(Path(results)))]
    if "--push" in command.flags:
        say("Saved: " + ", ".join(saving.push(project, entity, found)))
    else:
        files = saving.write(Path(command.flags["--dry-run"]), project, entity, found)
        say("Written: " + ", ".join(map(str, files)))
    return 0
