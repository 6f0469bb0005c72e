"""What a command says of W&B: whether it is told, and how it is reached."""

import os

from dgal_bench.arguments import Command
from dgal_bench.errors import ConfigError, choose
from dgal_bench.request.places import cache_root, data_root, offline
from dgal_bench.request.words import whole
from dgal_bench.tracking.settings import WANDB, Tracking, check_project, decided


def tracking_of(command: Command) -> Tracking | None:
    """How W&B is told of a sweep; None: not at all."""
    tracking = command.one("tracking", "off")
    choose(dict.fromkeys(("off", "wandb")), tracking, "tracking")
    if tracking == "wandb":
        return wandb_of(command)
    if given := [key for key in WANDB if key in command.values]:
        raise ConfigError(f"{given[0]}= is for tracking=wandb, this one is off")
    return None


def wandb_of(command: Command) -> Tracking:
    """The project and how to reach it, with wandb.mode=auto decided."""
    project, entity = project_of(command)
    return decided(
        Tracking(
            mode=command.one("wandb.mode", "auto"),
            project=project,
            entity=entity or None,
            images=tuple(whole("wandb.images", text) for text in command.values.get("wandb.images", [])),
            data=str(data_root(command).absolute()),
            cache=str(cache_root(command).absolute()),
        ),
        offline(command),
    )


def project_of(command: Command) -> tuple[str, str]:
    """The project, and whose it is: an empty name is W&B's own default of whoever has the key."""
    if empty := [key for key in WANDB if command.values.get(key) == []]:
        raise ConfigError(f"{empty[0]}= is empty: leave it out")
    project = command.one("wandb.project", os.environ.get("WANDB_PROJECT") or "dgal_bench")
    check_project(project)
    return project, command.one("wandb.entity", os.environ.get("WANDB_ENTITY") or "")
