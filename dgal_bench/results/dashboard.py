"""The W&B workspace: query time against accuracy first, then what a query costs, the graph, training.

A section has no filter of its own in W&B, only a saved view has: so there is a view of everything, and one for each
data set of a results folder.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import wandb
from wandb_workspaces import expr, workspaces
from wandb_workspaces.reports.v2 import interface as panels
from wandb_workspaces.workspaces import Workspace
from wandb_workspaces.workspaces.internal import View

from dgal_bench.core.errors import ConfigError, ResultsError, UserError
from dgal_bench.results.rows import PHASES, RunLog
from dgal_bench.results.tracking import SERVER, has_key
from dgal_bench.results.wandb import run_names

GROUPS = 100
"""Drawn in a panel; W&B's own limit of 10 is below the twelve strategies of the paper."""

TITLES = {"labels": "labels", "query_seconds": "query seconds, cumulative", "round": "round"}


@dataclass(frozen=True)
class ViewScope:
    """The runs that one view shows; profile and version are set where a suite's data set has several of them."""

    suite: str
    dataset: str
    profile: str | None = None
    algorithm_version: int | None = None

    @property
    def words(self) -> list[str]:
        version = None if self.algorithm_version is None else f"algorithm-{self.algorithm_version}"
        return [word for word in (self.suite, self.dataset, self.profile, version) if word is not None]


def view_scopes(logs: Iterable[RunLog]) -> list[ViewScope]:
    """Those of a results folder, in its order."""
    known = (run_names(log) for log in logs)
    each = dict.fromkeys(ViewScope(one.suite, one.dataset, one.profile, one.algorithm_version) for one in known)
    several = Counter((one.suite, one.dataset) for one in each)
    return [one if several[one.suite, one.dataset] > 1 else ViewScope(one.suite, one.dataset) for one in each]


def views(project: str, entity: str, found: Sequence[ViewScope] = ()) -> list[workspaces.Workspace]:
    """The view of everything, then one for each shelf. The same ids every time: a view pushed again is replaced."""
    return [_view(project, entity, shelf) for shelf in (None, *found)]


def _view(project: str, entity: str, shelf: ViewScope | None) -> workspaces.Workspace:
    name = f"dgal-bench: {', '.join(shelf.words)}" if shelf else "dgal-bench"
    view = workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections(by_strategy=shelf is not None),
        settings=workspaces.WorkspaceSettings(x_axis="round", max_runs=GROUPS),
        runset_settings=_runs(shelf),
    )
    view._internal_name = f"nw-{_id(entity, project, name)}-v"
    view._internal_runset_id = _id(name)
    for section in view.sections:
        drawn: list[Any] = section.panels  # of many types, most of which have no title
        for panel in drawn:
            panel._id = _id(name, section.name, panel.title)
    return view


def _id(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:11]


def _runs(shelf: ViewScope | None) -> workspaces.RunsetSettings:
    """A group is a strategy on a suite's data set, by one version of the algorithms; what is in it are its seeds."""
    keys = ("suite", "dataset_name", "strategy_name", "algorithm_version")
    columns = ("config:suite", "config:seed", *(f"summary:{name}" for name in ("final_accuracy", "area")))
    costs = ("summary:mean_query_seconds", "summary:mean_points_scored")
    return workspaces.RunsetSettings(
        filters=_of(shelf) if shelf else "",
        groupby=[expr.Config(key) for key in keys],
        order=[expr.Ordering(expr.Summary("mean_query_seconds"), ascending=True)],
        pinned_columns=["run:displayName", *columns, *costs],
    )


def _of(shelf: ViewScope) -> str:
    """As text, which W&B parses as Python: its own filter objects leave a quote in a name as it is."""
    said: dict[str, str | int | None] = {"suite": shelf.suite, "dataset_name": shelf.dataset}
    said |= {"profile": shelf.profile, "algorithm_version": shelf.algorithm_version}
    return " and ".join(f"Config({key!r}) == {value!r}" for key, value in said.items() if value is not None)


def sections(by_strategy: bool) -> list[workspaces.Section]:
    """Every section is open and three panels wide.

    ``by_strategy``: with bars, which know no other group: of several data sets they would be a mean.
    """
    contents = {
        "Query time against accuracy": _accuracy(by_strategy),
        "What a query costs": _cost(by_strategy),
        "The graph": _graph(),
        "Training": [_line("train/seconds", "Training seconds"), _line("train/loss", "Training loss")],
    }
    return [
        workspaces.Section(name=name, panels=drawn, is_open=True, layout_settings=_layout(len(drawn)))
        for name, drawn in contents.items()
    ]


def _layout(n_panels: int) -> workspaces.SectionLayoutSettings:
    return workspaces.SectionLayoutSettings(columns=3, rows=-(-n_panels // 3))


def _accuracy(by_strategy: bool) -> list[Any]:
    return [
        _line("accuracy/by_query_seconds", "Accuracy against query time", x="query_seconds", log_x=True),
        _line("accuracy/by_labels", "Accuracy against labels", x="labels"),
        *([_bars("mean_query_seconds", "Mean query seconds")] if by_strategy else []),
        _scatter("mean_query_seconds", "final_accuracy", "Final accuracy against mean query time"),
        _scatter("mean_query_seconds", "area", "Area under the curve against mean query time"),
    ]


def _cost(by_strategy: bool) -> list[Any]:
    return [
        _line("query/seconds", "Query seconds", log_y=True),
        _line("query/points_scored", "Points scored", log_y=True),
        _line("query/candidates", "Candidates", log_y=True),
        *([_bars("mean_points_scored", "Mean points scored")] if by_strategy else []),
        *(_line(f"query/phase/{phase}", f"Seconds of {phase}") for phase in sorted(PHASES)),
    ]


def _graph() -> list[Any]:
    return [
        _line("graph/reach", "Reach: share of points that the diffusion gets to"),
        _line("graph/boundary_share", "Boundary share: differently labeled neighbours of the batch"),
        _line("propagated/accuracy", "Accuracy of labels propagated over the graph alone"),
    ]


def _line(metric: str, title: str, x: str = "round", log_x: bool = False, log_y: bool = False) -> panels.LinePlot:
    """Mean and standard error over the seeds of a group; nothing is smoothed."""
    return panels.LinePlot(
        title=title, x=x, y=[metric], title_x=TITLES[x], log_x=log_x, log_y=log_y, max_runs_to_show=GROUPS,
        groupby_aggfunc="mean", groupby_rangefunc="stderr", smoothing_type="none",
    )  # fmt: skip


def _scatter(x: str, y: str, title: str) -> panels.ScatterPlot:
    return panels.ScatterPlot(title=title, x=panels.SummaryMetric(x), y=panels.SummaryMetric(y), log_x=True)


def _bars(metric: str, title: str) -> panels.BarPlot:
    return panels.BarPlot(
        title=title, metrics=[metric], groupby=panels.Config("strategy_name"), max_runs_to_show=GROUPS,
        max_bars_to_show=GROUPS, groupby_aggfunc="mean", groupby_rangefunc="stderr",
    )  # fmt: skip


# The views of the dashboard as files, or saved on W&B's server by a process that can be ended.


os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports would go out over the network

ANSWER_SECONDS = 10
"""For a server to answer at all."""

SAVE_SECONDS = 60
"""For all views; wandb's own process would wait for ever on a server that falls silent."""


class NotSavedError(UserError):
    """The server is silent, or refuses."""

    exit_code = 1


def write_workspaces(file: Path, project: str, entity: str, found: Sequence[ViewScope]) -> list[Path]:
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


def push_workspaces(project: str, entity: str, found: Sequence[ViewScope]) -> list[str]:
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
            code = _wait_for_end(json.dumps(asked), told, trouble)
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


def _wait_for_end(asked: str, told: Any, trouble: Any) -> int:
    """The exit code of a process that saves. It and wandb's own beside it are gone when this returns."""
    child = subprocess.Popen(
        [sys.executable, "-m", "dgal_bench.results.dashboard", asked],
        stdin=subprocess.DEVNULL, stdout=told, stderr=trouble, start_new_session=True,
    )  # fmt: skip
    try:
        return child.wait(SAVE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def save_workspaces(asked: str) -> int:
    """In the process that saves: addresses to stdout, trouble as the last line of stderr."""
    request = json.loads(asked)
    try:
        for view in views(request["project"], request["entity"], [ViewScope(*one) for one in request["shelves"]]):
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
    ending = save_workspaces(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ending)  # wandb's handlers at exit wait for a process of theirs that may wait for the server
