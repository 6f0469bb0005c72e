"""Laws of benchmarks/query.py and scaling.py: ratios are quotients, what is extrapolated says so, slopes are slopes."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import asking, inputs, query, scaling, scaling_figure, scaling_worker
from benchmarks.asking import Answer, ask, experiment_of, pool_of, remembered, sampled_pass, synthetic_outputs
from benchmarks.scaling_figure import apart, save_scaling
from dgal_bench.core.types import Outputs
from dgal_bench.experiment import Run
from dgal_bench.graph.knn import knn
from dgal_bench.graph.transition import transition
from dgal_bench.models.nets import MaxPool
from tests.measuring import answer_here

ROOT = Path(__file__).parent.parent
POINTS = 300


@pytest.fixture(autouse=True, scope="module")
def only_new_garbage() -> Iterator[None]:
    """Benchmarks collect it before each call, and in a process of all tests that takes half a second a time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def parts():
    """An experiment of 300 points, its network and synthetic outputs for all of them."""
    latents = torch.randn(POINTS, 5, generator=torch.Generator().manual_seed(0))
    data = inputs.generated(POINTS, 10)
    config = inputs.settings()
    experiment = experiment_of(config, data, latents, transition(knn(latents, 20)))
    return experiment, inputs.new_module(config, data).eval(), synthetic_outputs(POINTS, 10)


def run_of(experiment, strategy):
    return Run.of(inputs.settings("restricted_size=30", strategy=strategy), experiment)


def answer(seconds, picks=(1, 2), extrapolated=False, n_scored=100):
    phases = {phase: seconds / len(asking.PHASES) for phase in asking.PHASES}
    return Answer(seconds, phases, extrapolated, n_scored, n_scored, list(picks))


class Ticks:
    """A clock that moves by one second for every image that passes through the network."""

    def __init__(self, module):
        self.now = 0.0
        module.net.register_forward_hook(self.count)

    def count(self, net, inputs, outputs):
        self.now += len(inputs[0])

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("strategy", "n_passed"), [("margin", 190), ("coreset", 300), ("rsmg", 30), ("random", 0)])
@pytest.mark.parametrize("sample", [20, 1000])
def test_a_sampled_pass_counts_as_if_all_had_passed(parts, monkeypatch, strategy, n_passed, sample):
    experiment, module, answers = parts
    ticks = Ticks(module)
    monkeypatch.setattr("benchmarks.asking.perf_counter", ticks)
    monkeypatch.setattr("dgal_bench.core.clock.perf_counter", ticks)
    found = ask(run_of(experiment, strategy), pool_of(POINTS, 10, 110), 10, module, {}, sampled_pass(sample, answers))
    assert found.seconds == pytest.approx(n_passed)
    assert found.phases["pass"] == pytest.approx(n_passed)
    assert found.extrapolated == (sample < n_passed)
    assert found.n_scored == n_passed
    assert ticks.now == min(sample, n_passed)


def test_a_query_is_the_loops_and_what_is_remembered_changes_no_pick(parts, monkeypatch):
    experiment, module, answers = parts
    monkeypatch.setattr("dgal_bench.core.clock.perf_counter", Ticks(module))
    pool = pool_of(POINTS, 10, 110)
    for strategy in ("dgmg", "vae_seals", "margin"):
        run = run_of(experiment, strategy)
        memory = remembered(run, pool, 10, module, answers)
        first, later = (ask(run, pool, 10, module, given) for given in ({}, memory))
        assert first.picks == later.picks
        assert bool(memory) == (strategy != "margin")
        assert sum(first.phases.values()) == pytest.approx(first.seconds) == first.n_scored > 0


def test_fewer_labels_are_the_first_of_more():
    more, fewer = pool_of(5000, 10, 110), pool_of(5000, 10, 100)
    assert len(more.labeled.unique()) == 110
    assert fewer.labeled.equal(more.labeled[:100])
    assert fewer.labels.equal(more.labels[:100])


def summed(**answers):
    asked = {query.OURS: [answer(1.0), answer(2.0)], query.FIRST: [answer(2.0), answer(2.0)]}
    return query.summary(asked | answers, 0.001, (100, 150))


def test_ratios_are_quotients_by_repetition_and_goals_are_their_medians():
    found = summed(margin=[answer(80.0, extrapolated=True, n_scored=900), answer(280.0)])
    rows = {row["name"]: row for row in found["measurements"]}
    assert rows["margin"]["x_dgmg"] == {"median": 110.0, "min": 80.0, "max": 140.0}
    assert rows["margin"]["x_floor"] == 180.0 / (900 * 0.001)
    assert found["goals"] == [{"name": "margin", "least": 100, "wanted": 150, "found": 110.0, "reached": True}]
    assert not summed(margin=[answer(80.0), answer(80.0)])["goals"][0]["reached"]
    text = query.table(
        found | {"net": "CNN", "kind": "clustered", "image_shape": [1, 28, 28], "bare_image_seconds": 0.001}
    )
    assert "margin* " in text
    assert "dgmg* " not in text
    assert "goal: margin takes at least 100 times dgmg's seconds, better 150: 110, reached, but not 150" in text


def test_other_picks_are_no_equal_answer():
    assert summed()["equal"]
    assert not summed(badge=[answer(9.0, (1, 2)), answer(9.0, (1, 3))])["equal"]
    assert not summed(**{query.FIRST: [answer(2.0, (3, 4))] * 2})["equal"]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.3])
def test_the_slope_of_a_power_law_is_its_power(power):
    points = [10**4, 10**5, 10**6, 10**7]
    assert scaling.slope(points, [3e-5 * n**power for n in points]) == pytest.approx(power)
    assert scaling.slope(points[:1], [1.0]) is None


def size(kind, points, powers, steps=4):
    """What a worker answers, where dgmg's phases take N to a power each; margin's pass is extrapolated."""
    rows = [
        {
            "name": "dgmg", "how": how, "seconds": 1.0, "extrapolated": False, "touched": 1.0, "picks": [1, 2],
            "phases": {phase: 1e-6 * points ** powers[how, phase] for phase in scaling.PHASES},
        }
        for how in ("full", "incremental")
    ]  # fmt: skip
    margin = {"name": "margin", "how": "", "seconds": 50.0, "extrapolated": points > 10**4, "phases": {}}
    return {
        "kind": kind, "points": points, "steps": steps, "status": "measured", "queries": [*rows, margin],
        "right": True, "peak_mb": 15_900.0, "graph": {"peak_mb": 16_100.0},
    }  # fmt: skip


POWERS = {
    ("full", "diffuse"): 1.1, ("full", "select"): 1.0, ("incremental", "diffuse"): 0.7, ("incremental", "select"): 0.2,
}  # fmt: skip


def test_a_diffusions_slope_is_of_its_seconds_and_of_those_of_a_step():
    sizes = [size("clustered", n, POWERS, steps) for n, steps in ((10**4, 4), (10**6, 8))]
    full, selection = scaling.slopes(sizes)[:2]
    assert full["slope"] == pytest.approx(1.1)
    assert full["per_step"] == pytest.approx(1.1 - np.log(2) / np.log(100))
    assert not full["reached"]  # by the seconds of a query, whatever a step's
    assert "per_step" not in selection


def test_ten_million_points_have_a_goal_for_the_peaks_of_building_and_of_asking():
    sizes = [size("clustered", n, POWERS) for n in (10**6, 10**7)]
    found = scaling.memory_goals(sizes)
    assert [(one["points"], one["of"], one["reached"]) for one in found] == [
        (10**7, "graph", False), (10**7, "queries", True),
    ]  # fmt: skip
    text = scaling.table({"sizes": sizes, "slopes": [], "memory": found})
    assert "peak of graph, clustered, 10,000,000 points: 16.1 GB; goal: under 16, NOT reached" in text
    assert "peak of queries, clustered, 10,000,000 points: 15.9 GB; goal: under 16, reached" in text


def test_a_full_query_is_of_whole_products_and_picks_what_the_others_do():
    def rows(touched=1.0, picks=(1, 2)):
        full = {"name": "dgmg", "how": "full", "touched": touched, "picks": [1, 2]}
        return [full, {"name": "dgmg", "how": "incremental", "touched": 0.1, "picks": list(picks)}]

    assert scaling_worker.right(rows())
    assert not scaling_worker.right(rows(touched=0.9))
    assert not scaling_worker.right(rows(picks=(1, 3)))


def test_asked_in_full_all_edges_are_multiplied(parts):
    experiment, _, answers = parts
    asker = scaling_worker.Asker(experiment.prepared.features, experiment.prepared.graph, answers, 20, 1)
    found = {how: asker("dgmg", how, POINTS) for how in scaling_worker.HOWS}
    assert [one.touched for one in found["full"]] == [1]
    assert len({tuple(one.picks) for asked in found.values() for one in asked}) == 1


def test_every_strategy_is_asked_or_named_as_left_out():
    asked = {*scaling_worker.ON_GRAPH, *scaling_worker.BY_SIZE, *scaling_worker.ON_POOL}
    known = {path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml")}
    assert asked | set(scaling.LEFT_OUT) == known
    assert {name for name, _ in scaling_figure.LOOKS} == asked


def test_each_phase_has_a_slope_of_its_own_and_a_goal_where_the_issue_has_one():
    sizes = [size(kind, n, POWERS) for n in (10**4, 10**5) for kind in ("clustered", "manifold")]
    found = {(one["kind"], one["how"], one["phase"]): one for one in scaling.slopes(sizes)}
    assert len(found) == 8
    for (_, how, phase), one in found.items():
        assert one["slope"] == pytest.approx(POWERS[how, phase])
    reached = {key: one["reached"] for key, one in found.items() if one["goal"]}
    assert reached == {
        ("clustered", "full", "diffuse"): False,
        ("clustered", "full", "select"): True,
        ("manifold", "full", "diffuse"): False,
        ("manifold", "full", "select"): True,
        ("clustered", "incremental", "diffuse"): True,
    }
    lines = scaling.table({"sizes": sizes, "slopes": list(found.values()), "memory": []}).splitlines()
    margins = [line.split() for line in lines if line.startswith("margin")]
    assert margins == [["margin", "50.0", "50.0*"]] * 2


def test_a_query_of_fewer_points_is_scaled_and_marked():
    whole = scaling_worker.row("badge", "", [answer(3.0)], 1000, 1000)
    scaled = scaling_worker.row("badge", "", [answer(3.0)], 4000, 1000)
    assert (whole["seconds"], whole["extrapolated"]) == (pytest.approx(3.0), False)
    assert (scaled["seconds"], scaled["extrapolated"], scaled["n_scored"]) == (pytest.approx(12.0), True, 400)
    near = scaling_worker.row("vae_seals", "", [answer(3.0)], 4000, 1000)
    share = 1 / len(asking.PHASES)
    assert near["seconds"] == pytest.approx(3.0 * (share + 4 * (1 - share)))
    assert (near["extrapolated"], near["n_scored"]) == (True, 100)


def test_names_are_moved_apart_no_farther_than_needed():
    rng = np.random.default_rng(0)
    wanted = np.sort(rng.random(12))
    places = apart(wanted, 0.05)
    assert (np.diff(places) >= 0.05 - 1e-12).all()
    assert apart([0.1, 0.5, 0.9], 0.05) == [0.1, 0.5, 0.9]
    assert apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])


def test_hollow_markers_are_the_extrapolated_ones(tmp_path):
    sizes = [size(kind, n, POWERS) for n in (10**4, 10**5) for kind in ("clustered", "manifold")]
    results = {"sizes": sizes, "features": 64, "threads": 1, "provenance": {"machine": {"cpu": "a CPU"}}}
    png, svg = save_scaling(results, tmp_path / "scaling")
    assert png.stat().st_size > 10_000
    assert "<svg" in svg.read_text()
    for axes in scaling_figure.drawn(results).axes:
        markers = [line for line in axes.lines if len(line.get_xdata()) == 1]
        hollow = [(line.get_color(), line.get_xdata()[0]) for line in markers if line.get_markerfacecolor() == "white"]
        assert len(markers) == 6  # of three lines at two sizes
        assert hollow == [(scaling_figure.LOOKS["margin", ""]["color"], 10**5)]


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (3, 20, 7, 9), (1, 2, 2, 3), (2, 5, 8, 6)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_pooling_without_gradients_is_pooling(shape, layout):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # with ties
    images = images.contiguous(memory_format=layout)
    expected = nn.MaxPool2d(2)(images)
    with torch.inference_mode():
        assert MaxPool()(images).equal(expected)
    assert MaxPool()(images).equal(expected)


def test_relu_after_the_pooling_gives_the_values_and_gradients_of_relu_before_it():
    net = inputs.new_module(inputs.settings(), inputs.generated(20, 10)).net
    images = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(2))

    def outcome(body):
        net.zero_grad()
        logits = net.classify(net.features(body(images)))
        logits.square().sum().backward()
        return logits.detach(), [p.grad.clone() for p in net.parameters()]

    conv, pool, relu, *rest = net.body
    conv2, pool2, relu2, flat = rest
    usual = nn.Sequential(conv, relu, nn.MaxPool2d(2), conv2, relu2, nn.MaxPool2d(2), flat)
    (logits, grads), (expected, expected_grads) = outcome(net.body), outcome(usual)
    assert logits.equal(expected)
    assert all(one.equal(other) for one, other in zip(grads, expected_grads, strict=True))
    assert [type(layer) for layer in (pool, pool2)] == [MaxPool, MaxPool]


def test_a_quick_run_is_a_small_one():
    small, whole = query._options(["--quick"]), query._options([])
    assert (small.points, small.repeats, small.net, small.sample) == (2000, 2, "resnet10t", 120)
    assert (whole.points, whole.repeats, whole.net, whole.sample) == (60_000, 3, "resnet50", 300)
    small, whole = scaling._options(["--quick"]), scaling._options([])
    assert (small.points, small.sample, small.own_limit) == ([2_000, 4_000], 1000, 3_000)
    assert (whole.points, whole.sample, whole.own_limit) == (scaling.POINTS, 20_000, 10**6)


SMALLER = {
    query: ["--points", "1200", "--repeats", "2", "--net", "resnet10t", "--sample", "120"],
    scaling: ["--points", "1000", "1300", "--repeats", "1", "--sample", "400", "--own-limit", "1200"],
}
"""Than quick."""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["query", "scaling"])
def test_a_small_run_answers_for_every_strategy(script, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "answer", answer_here)
    out = tmp_path / f"{script}.json"
    asked = {"query": query, "scaling": scaling}[script]
    assert asked.main([*SMALLER[asked], "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["provenance"]["machine"]["cpu"]
    if script == "query":
        cnn, resnet, on_manifold = results["nets"]
        assert [net["kind"] for net in results["nets"]] == ["clustered", "clustered", "manifold"]
        assert not any(row["extrapolated"] for net in (cnn, on_manifold) for row in net["measurements"])
        marked = {row["name"] for row in resnet["measurements"] if row["extrapolated"]}
        assert marked == set(query.WHOLE)
        assert [one["name"] for one in cnn["goals"]] == list(query.WHOLE)
        return
    assert [(one["points"], one["status"]) for one in results["sizes"]] == [
        (n, "measured") for n in (1000, 1300) for _ in range(2)
    ]
    for one in results["sizes"]:
        # 100 points are passed whole, but at 1,300 points those of ON_POOL are asked for 1,200
        whole = {"vae_seals_matched"} if one["points"] <= 1_200 else set()
        assert {row["name"] for row in one["queries"] if row["extrapolated"]} == {*scaling_worker.ON_POOL} - whole
        assert one["peak_mb"] > 100
        assert one["right"]
        touched = {(row["name"], row["how"]): row["touched"] for row in one["queries"]}
        assert touched["dgmg", "full"] == 1
        assert 0 < touched["dgmg", "incremental"] <= 1
        assert touched["margin", ""] is None
    assert (len(results["slopes"]), results["memory"]) == (8, [])
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_setting_that_measures_nothing_is_refused(capsys):
    for main, words in ((query.main, ["--points", "500"]), (scaling.main, ["--points", "10"])):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert "--points" in capsys.readouterr().err


def test_outputs_that_stand_for_others_are_of_a_network():
    made = synthetic_outputs(50, 10)
    assert isinstance(made, Outputs)
    assert torch.allclose(made.probs.sum(1), torch.ones(50), atol=1e-5)


def test_a_size_is_asked_again_unless_this_machine_and_this_code_have_answered_it(tmp_path, monkeypatch):
    found, asked = {"status": "measured", "right": True}, []
    monkeypatch.setattr(scaling, "answer", lambda *words, **_: asked.append(words) or found)
    options = scaling._options(["--work", str(tmp_path)])
    here = {"machine": "this", "git": {"revision": "a", "dirty": False}}

    def measured(made_by):
        before = len(asked)
        answered = scaling.measured("clustered", 2000, tmp_path, options, made_by)
        assert answered == found | {"made_by": made_by}
        return len(asked) > before

    assert measured(here)
    assert not measured(here)
    options.repeats += 1
    assert measured(here)
    assert not measured(here)
    for other in ({"machine": "another"}, {"git": {"revision": "b", "dirty": False}}):
        assert measured(here | other)
    unknown = here | {"git": {"revision": "a", "dirty": True}}
    assert measured(unknown)
    assert measured(unknown)
