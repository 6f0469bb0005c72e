"""Options of W&B, and the process beside a sweep that mirrors its files. Needs neither wandb nor torch."""

import json
import netrc
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import IO, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from dgal_bench.core.errors import ConfigError, choose

WANDB = ("wandb.mode", "wandb.project", "wandb.entity", "wandb.images")
"""Keys of tracking=wandb, and of the verb push."""

MODES = ("auto", "online", "offline")

SERVER = "https://api.wandb.ai"
"""The default."""

# Values of $WANDB_MODE, for auto; wandb itself still accepts the two old words.
_MODES = {"online": "online", "offline": "offline", "run": "online", "dryrun": "offline"}


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
    def from_plain(cls, values: Mapping[str, Any]) -> "Tracking":
        return cls(**{**values, "images": tuple(values["images"])})


def decide_mode(tracking: Tracking, offline: bool) -> Tracking:
    """Replaces ``auto`` by $WANDB_MODE, else by online if there is a key.

    Raises:
        ConfigError: the mode is unknown or contradicts ``offline`` (never use the network), or wandb itself would
            refuse the server or the key, offline too.
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
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    if mode not in _MODES:
        raise ConfigError(f"WANDB_MODE={mode}: set wandb.mode=online or wandb.mode=offline, or track nothing")
    return replace(tracking, mode="offline" if offline else _MODES[mode])


def check_project(project: str) -> None:
    """Raises ConfigError for a name that W&B would refuse."""
    if wrong := set(project) & set("/\\#?%:"):
        raise ConfigError(f"wandb.project={project}: W&B takes no {''.join(sorted(wrong))} in a name: use another one")
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
    """Whether there is a key for the server of $WANDB_BASE_URL, or an identity token, which replaces it."""
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return key_place(urlsplit(os.environ.get("WANDB_BASE_URL") or SERVER).netloc) is not None


def key_place(host: str) -> str | None:
    """The variable or file that holds a key, searched as wandb does but without importing it."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    with suppress(OSError, netrc.NetrcParseError):
        entry = netrc.netrc(file).authenticators(host)
        return str(file) if entry and entry[2] else None
    return None


def runs_folder(results: Path) -> Path:
    """The folder of a results folder's offline runs: ``RESULTS/wandb``, or ``$WANDB_DIR/wandb``."""
    return Path(os.environ.get("WANDB_DIR") or results).absolute() / "wandb"


PATIENCE = 30.0
"""Seconds for the last rows when a sweep is over."""

STOPPED_PATIENCE = 1.0
"""The same for a sweep that was interrupted."""

MESSAGE_AFTER = 2.0
"""Seconds of waiting after which the terminal says why."""

LAST_WARNINGS = 1.0
"""Seconds for the last warnings of a mirror process that has ended."""

INCOMPLETE = "W&B has not taken everything: 'dgal-bench push {results}' completes it"


@contextmanager
def mirror_sweep(
    tracking: Tracking | None, results: Path, paths: Sequence[Path], warn: Callable[[str], None]
) -> Iterator[None]:
    """Mirror the files at ``paths`` during the block. No failure of the mirror changes the sweep."""
    if tracking is None or not paths:
        yield
        return
    mirror = _MirrorProcess(tracking, results, paths, warn)
    patience = STOPPED_PATIENCE
    try:
        yield
        patience = PATIENCE
    except Exception:
        patience = PATIENCE
        raise
    finally:
        mirror.close(patience)


class _MirrorProcess:
    """The process, in a session of its own: Ctrl-C does not reach it, and ``_kill`` ends its children too."""

    def __init__(self, tracking: Tracking, results: Path, paths: Sequence[Path], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._incomplete = INCOMPLETE.format(results=results)
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the process
        self._process = _start_process(
            {"tracking": tracking.plain, "paths": [str(p.absolute()) for p in paths]}, self._stderr
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._warn(line.rstrip("\n"))

    def close(self, patience: float) -> None:
        """End the mirror process: wait ``patience`` seconds for it, then kill it; an interrupt kills it at once."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = None
        try:
            code = self._wait_for_end(patience)
        finally:  # a second Ctrl-C included
            if code is None:
                code = self._kill()
            self._listener.join(LAST_WARNINGS)
            if code != 0:
                self._warn(self._incomplete + self._exit_message())
            self._stderr.close()

    def _wait_for_end(self, patience: float) -> int:
        start = monotonic()
        if not self._over(min(MESSAGE_AFTER, patience)) and patience > MESSAGE_AFTER:
            tqdm.write(f"W&B: waiting up to {patience:.0f} s for the last rows to be taken", file=sys.stderr)
        return self._process.returncode if self._over(start + patience - monotonic()) else self._kill()

    def _over(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))
        return self._process.returncode is not None

    def _kill(self) -> int:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _exit_message(self) -> str:
        self._stderr.seek(0)
        last = self._stderr.read().strip().rpartition("\n")[2]
        return f" ({last[:200]})" if last else ""


def _start_process(request: dict[str, object], stderr: IO[str]) -> "subprocess.Popen[str]":
    """The request is in a file without a name: it may be longer than a pipe holds, and writing must not wait."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        json.dump(request, file)
        file.flush()
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-m", "dgal_bench.results.wandb_follow", str(file.fileno())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace",
            pass_fds=[file.fileno()], start_new_session=True,
        )  # fmt: skip
