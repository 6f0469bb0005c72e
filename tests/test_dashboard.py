"""The dashboard shows what the mirror logs, each against its own axis; pushed to a server of our own, or one line."""

import json
import socket
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from wandb_workspaces.workspaces import Workspace
from wandb_workspaces.workspaces.internal import View

from benchmarks.generated import generate
from dgal_bench.cli.main import main
from dgal_bench.results import dashboard as saving
from dgal_bench.results import wandb as facts
from dgal_bench.results.dashboard import GROUPS, ViewScope, view_scopes, views
from dgal_bench.results.reader import read_results
from dgal_bench.results.rows import PHASES

SHELVES = [ViewScope("paper", "svhn"), ViewScope("paper", "digits"), ViewScope("my 'own' \"suite\"", "dir\\x")]
SHELVES.append(ViewScope("paper", "svhn", "smoke", 7))
KEY = "0123456789012345678901234567890123456789"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    generate(folder, strategies=("dgmg",), seeds=[0], rounds=3)
    return next(one for one in read_results(folder) if facts.run_names(one).strategy == "dgmg")


@pytest.fixture
def keyed(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ENTITY", "me")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("DGAL_OFFLINE", raising=False)


def spec(view):
    return json.loads(saving._json(view))["spec"]["section"]


def panels(kind, found=()):
    every = [panel for view in views("p", "me", found) for section in spec(view)["panelBankConfig"]["sections"]
             for panel in section["panels"]]  # fmt: skip
    return [panel["config"] for panel in every if panel["viewType"] == kind]


def test_a_curve_is_drawn_against_the_axis_that_its_metric_is_logged_with(log):
    logged = {name for row in facts.logged_rows(log) for name in row} | {f"query/phase/{phase}" for phase in PHASES}
    for panel in panels("Run History Line Plot"):
        (metric,) = panel["metrics"]
        (axis,) = {axis for pattern, axis in facts.DEFINITIONS if fnmatch(metric, pattern)}
        assert panel["xAxis"] == axis
        assert {metric, axis} <= logged


def test_every_phase_has_a_curve():
    drawn = {metric for panel in panels("Run History Line Plot") for metric in panel["metrics"]}
    assert {f"query/phase/{phase}" for phase in PHASES} <= drawn


def test_points_and_bars_are_of_the_summary(log):
    scatters, bars = panels("Scatter Plot"), panels("Bar Chart", SHELVES)
    shown = {panel[axis].removeprefix("summary:") for panel in scatters for axis in ("xAxis", "yAxis")}
    shown |= {metric for panel in bars for metric in panel["metrics"]}
    assert shown == {"mean_query_seconds", "mean_points_scored", "final_accuracy", "area"}
    assert shown <= facts.run_summary(log).keys()
    assert {panel["groupBy"] for panel in bars} == {"strategy_name.value"}


def test_bars_by_strategy_are_of_one_data_set():
    assert panels("Bar Chart") == []
    assert len(panels("Bar Chart", SHELVES)) == 2 * len(SHELVES)


def test_query_time_against_accuracy_comes_first_and_logarithmic():
    first = spec(views("p", "me")[0])["panelBankConfig"]["sections"][0]["panels"][0]["config"]
    assert (first["xAxis"], first["metrics"]) == ("query_seconds", ["accuracy/by_query_seconds"])
    assert first["xLogScale"]
    assert all(panel["xAxisLogScale"] for panel in panels("Scatter Plot"))


def test_seeds_are_averaged_and_no_strategy_is_left_out(log):
    section = spec(views("p", "me")[0])
    (runs,) = section["runSets"]
    grouped = [key["name"].removesuffix(".value") for key in runs["grouping"]]
    assert grouped == ["suite", "dataset_name", "strategy_name", "algorithm_version"]
    columns = {name.partition(":")[2] for name in runs["runFeed"]["columnOrder"]} - {"displayName"}
    assert {*grouped, *columns} <= {*facts.run_config(log), *facts.run_summary(log)}
    for panel in panels("Run History Line Plot"):
        assert (panel["groupAgg"], panel["groupArea"], panel["smoothingType"]) == ("mean", "stderr", "none")
        assert panel["limit"] == section["settings"]["maxRuns"] == GROUPS


def test_each_shelf_has_a_view_of_its_runs_alone():
    everything, *filtered = views("p", "me", SHELVES)
    assert spec(everything)["runSets"][0]["filters"]["filters"] == []
    for view, shelf in zip(filtered, SHELVES, strict=True):
        said = spec(view)["runSets"][0]["filters"]["filters"]
        assert [(one["key"]["name"], one["op"], one["value"]) for one in said] == [
            ("suite", "=", shelf.suite),
            ("dataset_name", "=", shelf.dataset),
            *([("profile", "=", "smoke"), ("algorithm_version", "=", 7)] if shelf.profile else []),
        ]


def test_the_shelves_are_those_of_the_folder_in_its_order(tmp_path):
    for suite in ("paper", "ablation"):
        generate(tmp_path, ("svhn", "digits"), ("random", "dgmg"), [0, 1], rounds=2, suite=suite)
    wanted = [ViewScope(suite, dataset) for suite in ("ablation", "paper") for dataset in ("digits", "svhn")]
    assert view_scopes(read_results(tmp_path)) == wanted


def test_several_versions_or_profiles_of_one_data_set_have_a_shelf_each(log):
    said = log.header["fingerprint"]
    newer = replace(log, header={**log.header, "fingerprint": said | {"algorithm_version": 99}})
    short = replace(log, header={**log.header, "profile": "smoke"})
    version, profile = said["algorithm_version"], log.header["profile"]
    first = ViewScope("paper", "digits", profile, version)
    assert view_scopes([log, newer, short]) == [
        first,
        replace(first, algorithm_version=99),
        replace(first, profile="smoke"),
    ]
    told = facts.run_config(short)
    assert (told["profile"], told["algorithm_version"]) == ("smoke", version)


def test_a_view_is_the_same_every_time_and_no_two_share_an_id():
    first, second = ([saving._json(view) for view in views("p", "me", SHELVES)] for _ in range(2))
    assert first == second
    ids = [panel._id for view in views("p", "me", SHELVES) for section in view.sections for panel in section.panels]
    assert len(ids) == len(set(ids))
    assert len({view._internal_name for view in views("p", "me", SHELVES)}) == len(SHELVES) + 1


def test_a_dry_run_writes_what_wandb_reads_back(log, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    file = tmp_path / "new" / "spec.json"
    assert main(["dashboard", str(log.path.parents[2]), "--dry-run", str(file), "wandb.entity=me"]) == 0
    written = [file, file.with_name("spec-paper-digits.json")]
    assert capsys.readouterr().out.strip() == f"Written: {written[0]}, {written[1]}"
    for path, view in zip(written, views("elsewhere", "me", [ViewScope("paper", "digits")]), strict=True):
        read = View.model_validate_json(path.read_text())
        assert saving._json(Workspace._from_model(read)) == path.read_text() == saving._json(view)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--dry-run FILE, or --push"),
        (["--push", "--dry-run", "spec.json"], "--dry-run FILE, or --push"),
        (["--dry-run"], "needs a file"),
        (["one", "two", "--push"], "[RESULTS]"),
        (["--push", "offline=true"], "offline=true"),
        (["--push", "wandb.team=us"], "wandb.project, wandb.entity"),
        (["--push", "wandb.entity="], "wandb.entity"),
        (["--dry-run", "/dev/null/spec.json"], "cannot be written"),
        (["--dry-run", "/dev/null/spec.json", "wandb.project=a/b"], "W&B takes no / in a name"),
        (["--dry-run", "/dev/null/spec.json", "wandb.project="], "wandb.project= is empty: leave it out"),
    ],
)
def test_a_mistake_is_one_line(words, says, keyed, capsys):
    assert main(["dashboard", *words]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_for_bench_a_dry_run_still_takes_no_value(capsys):
    assert main(["bench", "--dry-run=spec.json"]) == 2
    assert "takes no value" in capsys.readouterr().err


def test_without_the_extra_it_is_named(monkeypatch, capsys):
    for module in [
        name for name in sys.modules if name.startswith(("wandb_workspaces", "dgal_bench.results.dashboard"))
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["dashboard", "--dry-run", "spec.json"]) == 2
    assert "pip install 'dgal-bench[dashboard]'" in capsys.readouterr().err


def test_without_a_key_nothing_is_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("DGAL_OFFLINE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(saving, "urlopen", None)
    assert main(["dashboard", "--push", "wandb.entity=me"]) == 2
    assert "WANDB_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize("listens", [False, True], ids=["dead", "silent"])
def test_a_server_that_does_not_answer_is_not_waited_for(listens, keyed, monkeypatch, capsys):
    monkeypatch.setattr(saving, "ANSWER_SECONDS", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert main(["dashboard", "--push"]) == 1
    told = capsys.readouterr().err
    assert "WANDB_BASE_URL" in told
    assert told.count("\n") == 1


@contextmanager
def wandb_server(monkeypatch, saved):
    """What W&B's answers to the four questions of a push; ``saved``: views by name, None where the key is refused."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps(answer(asked["query"], asked.get("variables") or {})).encode()
            self.send_response(200 if saved is not None else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    def answer(query, variables):
        if saved is None:
            return {"errors": [{"message": "no such key"}]}
        if "allViews" in query:
            view = saved.get(variables["viewName"])
            known = [{"node": {"id": view["id"], "displayName": "", "spec": view["spec"]}}] if view else []
            return {"data": {"project": {"allViews": {"edges": known}}}}
        if "upsertView" in query:
            name = variables["name"]
            saved[name] = {"id": f"id of {name}", **variables, "times": saved.get(name, {}).get("times", 0) + 1}
            return {"data": {"upsertView": {"view": {"id": saved[name]["id"], "name": name}, "inserted": True}}}
        return {
            "data": {"viewer": {"id": "1", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}}
        }

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_what_is_pushed_is_what_a_dry_run_shows_and_pushed_again_it_is_replaced(keyed, monkeypatch):
    saved = {}
    with wandb_server(monkeypatch, saved):
        addresses = saving.push_workspaces("p", "me", SHELVES[:1])
        assert saving.push_workspaces("p", "me", SHELVES[:1]) == addresses
    wanted = views("p", "me", SHELVES[:1])
    assert [name for name, _ in saved.items()] == [view._internal_name for view in wanted]
    for address, view in zip(addresses, wanted, strict=True):
        kept = saved[view._internal_name]
        assert kept["times"] == 2
        assert kept["id"] == f"id of {view._internal_name}"
        assert json.loads(kept["spec"])["section"] == spec(view)
        assert address.endswith(f"/me/p?nw={view._internal_name[3:-2]}")


@pytest.mark.slow
def test_a_key_that_is_refused_is_one_line(keyed, monkeypatch, capsys):
    with wandb_server(monkeypatch, None):
        assert main(["dashboard", "--push"]) == 1
    told = capsys.readouterr().err
    assert "WANDB_API_KEY" in told
    assert told.count("\n") == 1
