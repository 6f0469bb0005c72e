"""The W&B workspace: query time against accuracy first, then what a query costs, the graph, training.

A section has no filter of its own in W&B, only a saved view has: so there is a view of everything, and one for each
data set of a results folder.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from wandb_workspaces import expr, workspaces
from wandb_workspaces.reports.v2 import interface as panels

from dgal_bench.record import PHASES, CellLog
from dgal_bench.tracking.facts import names

GROUPS = 100
"""Drawn in a panel; W&B's own limit of 10 is below the twelve strategies of the paper."""

TITLES = {"labels": "labels", "query_seconds": "query seconds, cumulative", "round": "round"}


@dataclass(frozen=True)
class Shelf:
    """The runs that one view shows; profile and version are set where a suite's data set has several of them."""

    suite: str
    dataset: str
    profile: str | None = None
    algorithm_version: int | None = None

    @property
    def words(self) -> list[str]:
        version = None if self.algorithm_version is None else f"algorithm-{self.algorithm_version}"
        return [word for word in (self.suite, self.dataset, self.profile, version) if word is not None]


def shelves(logs: Iterable[CellLog]) -> list[Shelf]:
    """Those of a results folder, in its order."""
    known = (names(log) for log in logs)
    each = dict.fromkeys(Shelf(one.suite, one.dataset, one.profile, one.algorithm_version) for one in known)
    several = Counter((one.suite, one.dataset) for one in each)
    return [one if several[one.suite, one.dataset] > 1 else Shelf(one.suite, one.dataset) for one in each]


def views(project: str, entity: str, found: Sequence[Shelf] = ()) -> list[workspaces.Workspace]:
    """The view of everything, then one for each shelf. The same ids every time: a view pushed again is replaced."""
    return [_view(project, entity, shelf) for shelf in (None, *found)]


def _view(project: str, entity: str, shelf: Shelf | None) -> workspaces.Workspace:
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


def _runs(shelf: Shelf | None) -> workspaces.RunsetSettings:
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


def _of(shelf: Shelf) -> str:
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
