"""How W&B is told, and where: nothing that a result depends on. Needs neither wandb nor torch."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dgal_bench.doctor.surroundings import key_place
from dgal_bench.errors import ConfigError, choose

WANDB = ("wandb.mode", "wandb.project", "wandb.entity", "wandb.images")
"""Keys of tracking=wandb, and of the verb push."""

MODES = ("auto", "online", "offline")

SERVER = "https://api.wandb.ai"
"""Where nobody says another."""

# What $WANDB_MODE may say for auto; wandb itself still knows the two old words.
_SAID = {"online": "online", "offline": "offline", "run": "online", "dryrun": "offline"}


@dataclass(frozen=True)
class Tracking:
    """A project of W&B and how to reach it. ``images``: rounds whose picks are shown; they need the data set."""

    mode: str = "auto"
    project: str = "dgal_bench"
    entity: str | None = None
    images: tuple[int, ...] = ()
    data: str = "data"
    cache: str = ""

    @property
    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> "Tracking":
        return cls(**{**values, "images": tuple(values["images"])})


def decided(tracking: Tracking, offline: bool) -> Tracking:
    """With ``auto`` decided: as $WANDB_MODE says, else online where there is a key.

    Raises:
        ConfigError: no such mode, or one that contradicts ``offline``, never to touch the network; or what wandb
            itself would refuse, offline too.
    """
    choose(dict.fromkeys(MODES), tracking.mode, "wandb.mode")
    _check_server()
    if offline and tracking.mode == "online":
        raise ConfigError("wandb.mode=online contradicts offline=true (also in $DGAL_OFFLINE): leave one of them out")
    if tracking.mode == "online" and not has_key():
        raise ConfigError(
            "wandb.mode=online needs a key: run 'wandb login', set WANDB_API_KEY, or use wandb.mode=offline"
        )
    if tracking.mode != "auto":
        return tracking
    said = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    if said not in _SAID:
        raise ConfigError(f"WANDB_MODE={said}: set wandb.mode=online or wandb.mode=offline, or track nothing")
    return replace(tracking, mode="offline" if offline else _SAID[said])


def check_project(project: str) -> None:
    """Raises ConfigError for a name that W&B would refuse."""
    if found := set(project) & set("/\\#?%:"):
        raise ConfigError(f"wandb.project={project}: W&B takes no {''.join(sorted(found))} in a name: use another one")
    if len(project) > 128:
        raise ConfigError(f"wandb.project= is a name of {len(project)} characters: W&B takes at most 128")


def _check_server() -> None:
    server, key = os.environ.get("WANDB_BASE_URL") or SERVER, os.environ.get("WANDB_API_KEY", "")
    if not re.match(r"https?://[^/]", server):
        raise ConfigError(f"WANDB_BASE_URL={server}: begin it with https:// or http://")
    if re.search(r"wandb\.ai[^.]*$", server) and not re.match(r"https://.*api\.", server):
        raise ConfigError(f"WANDB_BASE_URL={server}: W&B's own server is {SERVER}")
    if key != key.strip():
        raise ConfigError("WANDB_API_KEY begins or ends with a blank: set it without")


def has_key() -> bool:
    """For the server of $WANDB_BASE_URL; who has an identity token needs none."""
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return key_place(urlsplit(os.environ.get("WANDB_BASE_URL") or SERVER).netloc) is not None


def runs_folder(results: Path) -> Path:
    """Where the runs of a results folder lie: ``RESULTS/wandb``, or where $WANDB_DIR says."""
    return Path(os.environ.get("WANDB_DIR") or results).absolute() / "wandb"
