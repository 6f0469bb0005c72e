"""The views of the dashboard as files, or saved on W&B's server by a process that can be ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports would go out over the network
import wandb
from wandb_workspaces.workspaces import Workspace
from wandb_workspaces.workspaces.internal import View

from dgal_bench.errors import ConfigError, ResultsError, UserError
from dgal_bench.tracking.dashboard import Shelf, views
from dgal_bench.tracking.settings import SERVER, has_key

ANSWER_SECONDS = 10
"""For a server to answer at all."""

SAVE_SECONDS = 60
"""For all views; wandb's own process would wait for ever on a server that falls silent."""


class NotSavedError(UserError):
    """The server is silent, or refuses."""

    exit_code = 1


def write(file: Path, project: str, entity: str, found: Sequence[Shelf]) -> list[Path]:
    """The model of each view as JSON: ``spec.json`` is of everything, ``spec-SUITE-DATASET.json`` of a shelf.

    Raises:
        ResultsError: a file cannot be written.
    """
    beside = [file.with_stem(f"{file.stem}-{'-'.join(one.words).replace('/', '-')}") for one in found]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for path, view in zip((file, *beside), views(project, entity, found), strict=True):
            path.write_text(_json(view), encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{file} cannot be written: {error.strerror}: name another --dry-run FILE") from error
    return [file, *beside]


def _json(view: Workspace) -> str:
    return json.dumps(view._to_model().model_dump(by_alias=True, exclude_none=True), indent=2) + "\n"


def push(project: str, entity: str, found: Sequence[Shelf]) -> list[str]:
    """Save the views on the server, in place of those of an earlier push; returns their addresses.

    Raises:
        ConfigError: no entity or no key.
        NotSavedError: the server does not answer in time, or refuses.
    """
    server = os.environ.get("WANDB_BASE_URL") or SERVER
    if not entity:
        raise ConfigError("--push needs whose project it is: set wandb.entity=NAME or $WANDB_ENTITY")
    if not has_key():
        raise ConfigError(f"--push needs a key for {server}: run 'wandb login', or set WANDB_API_KEY")
    _check_answers(server)
    asked = {"project": project, "entity": entity, "shelves": [astuple(one) for one in found]}
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+", errors="replace") as trouble:
        try:
            code = _ended(json.dumps(asked), told, trouble)
        except subprocess.TimeoutExpired as error:
            raise NotSavedError(f"{server} does not answer within {SAVE_SECONDS} s: try again") from error
        for file in (told, trouble):
            file.seek(0)
        if code:
            last = (trouble.read().split("\n")[-1] or f"exit code {code}")[:300]
            raise NotSavedError(f"{server} has not saved it ({last}): see WANDB_API_KEY and WANDB_BASE_URL")
        return told.read().split()


def _check_answers(server: str) -> None:
    """Whatever it says; through the user's proxy if there is one."""
    try:
        urlopen(server, timeout=ANSWER_SECONDS).close()  # noqa: S310 - the user's own address
    except HTTPError:
        return
    except (OSError, ValueError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise NotSavedError(
            f"{server} cannot be reached ({reason}): set WANDB_BASE_URL, or use --dry-run FILE"
        ) from error


def _ended(asked: str, told: Any, trouble: Any) -> int:
    """The exit code of a process that saves. It and wandb's own beside it are gone when this returns."""
    child = subprocess.Popen(
        [sys.executable, "-m", "dgal_bench.tracking.saving", asked],
        stdin=subprocess.DEVNULL, stdout=told, stderr=trouble, start_new_session=True,
    )  # fmt: skip
    try:
        return child.wait(SAVE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def save(asked: str) -> int:
    """In the process that saves: addresses to stdout, trouble as the last line of stderr."""
    request = json.loads(asked)
    try:
        for view in views(request["project"], request["entity"], [Shelf(*one) for one in request["shelves"]]):
            view._internal_id = _id_on_server(view)
            view.save()
            sys.stdout.write(f"{view.url}\n")
    except (wandb.Error, OSError) as error:
        sys.stderr.write("\n" + " ".join(str(error).split()))
        return 1
    return 0


def _id_on_server(view: Workspace) -> str:
    try:
        return View.from_name(view.entity, view.project, view._internal_name).id
    except ValueError:  # how it says that there is none
        return ""


if __name__ == "__main__":
    ending = save(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ending)  # wandb's handlers at exit wait for a process of theirs that may wait for the server
