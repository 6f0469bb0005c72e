"""The W&B workspace: query time against accuracy, the costs of a query, the graph, training; as files or on the server.

In W&B only a saved view has a filter, a section has none: so there is a view of everything, and one for each data set
of a results folder.
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

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # before the import: crash reports go over the network
import wandb
from wandb_workspaces import expr, workspaces
from wandb_workspaces.reports.v2 import interface as panels
from wandb_workspaces.workspaces import Workspace
from wandb_workspaces.workspaces.internal import View

from dgal_bench.core.errors import ConfigError, ResultsError, UserError
from dgal_bench.results.rows import PHASES, RunLog
from dgal_bench.results.wandb import run_names
from dgal_bench.results.wandb_process import SERVER, has_key

GROUPS = 100
"""Maximum in a panel; W&B's default of 10 is below the twelve strategies of the paper."""

TITLES = {"labels": "labels", "query_seconds": "query seconds, cumulative", "round": "round"}


@dataclass(frozen=True)
class ViewScope:
    """The runs that one view shows; profile and version are set where a suite's data set has several of them."""

    suite: str
    dataset: str
    profile: str | None = None
    algorithm_version: int | None = None

    @property
    def labels(self) -> list[str]:
        version = None if self.algorithm_version is None else f"algorithm-{self.algorithm_version}"
        return [label for label in (self.suite, self.dataset, self.profile, version) if label is not None]


def view_scopes(logs: Iterable[RunLog]) -> list[ViewScope]:
    """The scopes of a results folder, in its order."""
    names = map(run_names, logs)
    scopes = dict.fromkeys(ViewScope(run.suite, run.dataset, run.profile, run.algorithm_version) for run in names)
    counts = Counter((scope.suite, scope.dataset) for scope in scopes)
    return [s if counts[s.suite, s.dataset] > 1 else ViewScope(s.suite, s.dataset) for s in scopes]


def views(project: str, entity: str, scopes: Sequence[ViewScope] = ()) -> list[workspaces.Workspace]:
    """The view of everything, then one for each scope. Ids are constant: a view pushed again is replaced."""
    return [_view(project, entity, scope) for scope in (None, *scopes)]


def _view(project: str, entity: str, scope: ViewScope | None) -> workspaces.Workspace:
    name = f"dgal-bench: {', '.join(scope.labels)}" if scope else "dgal-bench"
    view = workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections(by_strategy=scope is not None),
        settings=workspaces.WorkspaceSettings(x_axis="round", max_runs=GROUPS),
        runset_settings=_runset(scope),
    )
    view._internal_name = f"nw-{_id(entity, project, name)}-v"
    view._internal_runset_id = _id(name)
    for section in view.sections:
        section_panels: list[Any] = section.panels  # of many types, most of which declare no title
        for panel in section_panels:
            panel._id = _id(name, section.name, panel.title)
    return view


def _id(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:11]


def _runset(scope: ViewScope | None) -> workspaces.RunsetSettings:
    """A group is a strategy on a suite's data set, of one algorithm version; its members are the seeds."""
    keys = ("suite", "dataset_name", "strategy_name", "algorithm_version")
    columns = ("config:suite", "config:seed", *(f"summary:{name}" for name in ("final_accuracy", "area")))
    costs = ("summary:mean_query_seconds", "summary:mean_points_scored")
    return workspaces.RunsetSettings(
        filters=_filter(scope) if scope else "",
        groupby=[expr.Config(key) for key in keys],
        order=[expr.Ordering(expr.Summary("mean_query_seconds"), ascending=True)],
        pinned_columns=["run:displayName", *columns, *costs],
    )


def _filter(scope: ViewScope) -> str:
    """As text, which W&B parses as Python: its own filter objects do not escape a quote in a name."""
    values: dict[str, str | int | None] = {"suite": scope.suite, "dataset_name": scope.dataset}
    values |= {"profile": scope.profile, "algorithm_version": scope.algorithm_version}
    return " and ".join(f"Config({key!r}) == {value!r}" for key, value in values.items() if value is not None)


def sections(by_strategy: bool) -> list[workspaces.Section]:
    """Every section is open and three panels wide.

    ``by_strategy``: with bars. They group by strategy alone: over several data sets they would show a mean.
    """
    contents = {
        "Query time against accuracy": _accuracy(by_strategy),
        "What a query costs": _cost(by_strategy),
        "The graph": _graph(),
        "Training": [_line("train/seconds", "Training seconds"), _line("train/loss", "Training loss")],
    }
    return [
        workspaces.Section(name=name, panels=plots, is_open=True, layout_settings=_layout(len(plots)))
        for name, plots in contents.items()
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


ANSWER_SECONDS = 10
"""Time limit for the server's first answer."""

SAVE_SECONDS = 60
"""Time limit for all views: wandb's own process would wait for ever for a server that stops answering."""


class NotSavedError(UserError):
    """The server does not answer, or refuses."""

    exit_code = 1


def write_workspaces(file: Path, project: str, entity: str, scopes: Sequence[ViewScope]) -> list[Path]:
    """Each view as JSON: ``spec.json`` shows everything, ``spec-SUITE-DATASET.json`` a scope.

    Raises:
        ResultsError: a file cannot be written.
    """
    files = [file, *(file.with_stem(f"{file.stem}-{'-'.join(s.labels).replace('/', '-')}") for s in scopes)]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for path, view in zip(files, views(project, entity, scopes), strict=True):
            path.write_text(_json(view), encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{file} cannot be written: {error.strerror}: name another --dry-run FILE") from error
    return files


def _json(view: Workspace) -> str:
    return json.dumps(view._to_model().model_dump(by_alias=True, exclude_none=True), indent=2) + "\n"


def push_workspaces(project: str, entity: str, scopes: Sequence[ViewScope]) -> list[str]:
    """Save the views on the server, replacing those of an earlier push; returns their addresses.

    Raises:
        ConfigError: no entity or no key.
        NotSavedError: the server does not answer in time, or refuses.
    """
    server = os.environ.get("WANDB_BASE_URL") or SERVER
    if not entity:
        raise ConfigError("--push needs the owner of the project: set wandb.entity=NAME or $WANDB_ENTITY")
    if not has_key():
        raise ConfigError(f"--push needs a key for {server}: run 'wandb login', or set WANDB_API_KEY")
    _check_answers(server)
    request = {"project": project, "entity": entity, "scopes": [astuple(scope) for scope in scopes]}
    with tempfile.TemporaryFile("w+") as addresses, tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            code = _wait_for_end(json.dumps(request), addresses, errors)
        except subprocess.TimeoutExpired as error:
            raise NotSavedError(f"{server} does not answer within {SAVE_SECONDS} s: try again") from error
        for file in (addresses, errors):
            file.seek(0)
        if code:
            last = (errors.read().split("\n")[-1] or f"exit code {code}")[:300]
            raise NotSavedError(f"{server} has not saved it ({last}): see WANDB_API_KEY and WANDB_BASE_URL")
        return addresses.read().split()


def _check_answers(server: str) -> None:
    """Any HTTP answer will do; through the user's proxy if there is one."""
    try:
        urlopen(server, timeout=ANSWER_SECONDS).close()  # noqa: S310 - the user's own address
    except HTTPError:
        return
    except (OSError, ValueError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise NotSavedError(
            f"{server} cannot be reached ({reason}): set WANDB_BASE_URL, or use --dry-run FILE"
        ) from error


def _wait_for_end(request: str, stdout: Any, stderr: Any) -> int:
    """The exit code of a process that saves the views. It and its child, wandb's own process, have ended then."""
    child = subprocess.Popen(
        [sys.executable, "-m", "dgal_bench.results.dashboard", request],
        stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
    )  # fmt: skip
    try:
        return child.wait(SAVE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def save_workspaces(request: str) -> int:
    """In the process that saves: addresses to stdout, an error as the last line of stderr."""
    options = json.loads(request)
    try:
        for view in views(options["project"], options["entity"], [ViewScope(*scope) for scope in options["scopes"]]):
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
    except ValueError:  # raised if there is none
        return ""


if __name__ == "__main__":
    exit_code = save_workspaces(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # wandb's handlers at exit wait for its own process, which may wait for the server
