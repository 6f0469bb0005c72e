"""What queries meet in the field: confident networks, copies, one label, no room to choose, NaN, too little memory."""

from dataclasses import replace

import pytest
import torch

from dgal_bench import loop
from dgal_bench.conformance import BATCH, ExampleQuery, example_config, run_in_process
from dgal_bench.core.errors import UserError
from dgal_bench.engines import worker
from dgal_bench.engines.base import job_message
from dgal_bench.engines.sweep import PlannedRun
from dgal_bench.models.nets import Classifier
from dgal_bench.results.reader import read_run
from tests.test_cli import settings

ASKS_NO_NETWORK = {"random", "ganvae"}


def weights(asked, change):
    for parameter in asked.predict._module.net.parameters():
        change(parameter.data)


def test_a_saturated_softmax_still_gives_a_batch(experiment, strategy):
    asked = ExampleQuery(experiment, strategy)
    weights(asked, lambda parameter: parameter.mul_(1e3))
    batch = asked.select().indices
    asked.pool.check(batch, BATCH)
    if asked.run.config.strategy.acquire["kind"] == "badge":
        assert asked.predict(asked.pool.unlabeled).probs.amax() == 1
        assert asked.query.notes["indistinct"]() == BATCH  # no gradient at all


def test_one_image_many_times_still_gives_a_batch(experiment, strategy):
    same = experiment.data.images[:1].expand_as(experiment.data.images).contiguous()
    asked = ExampleQuery(replace(experiment, data=replace(experiment.data, images=same)), strategy)
    asked.pool.check(asked.select().indices, BATCH)


def test_a_batch_of_all_candidates_is_the_candidates(experiment, strategy):
    """As many left by the restriction as are picked: the criterion has no choice, whatever it is."""
    asked = ExampleQuery(experiment, strategy, n_labeled=experiment.data.size - BATCH)
    selection = asked.select()
    assert sorted(selection.indices.tolist()) == sorted(selection.candidates.tolist())
    assert sorted(selection.indices.tolist()) == asked.pool.unlabeled.tolist()


@pytest.mark.parametrize(
    "strategy", ["rsmg", "rslc", "rsbadge", "rscoreset", "dgmg", "dgent", "dgbadge", "seals_matched"]
)
def test_a_restriction_to_as_many_as_a_batch_is_the_batch(experiment, tmp_path, strategy):
    """restricted_size=batch_size, with most of the pool unlabeled: the restriction alone decides."""
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", example_config(strategy, f"restricted_size={BATCH}"))
    assert [row.n_candidates for row in rows[:-1]] == [BATCH, BATCH]
    for row in rows[:-1]:
        assert len(set(row.indices)) == BATCH
        assert "topped_up" not in row.extra


def test_one_label_of_one_class_is_enough_to_go_on(experiment, tmp_path, strategy):
    config = example_config(strategy, "initial_size=1", "rounds=1")
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", config)
    assert [row.n_labeled for row in rows] == [1, 6]
    assert rows[0].propagated["iterations"] > 0


def test_a_network_that_answers_nan_is_said_in_one_line(experiment, strategy):
    asked = ExampleQuery(experiment, strategy)
    weights(asked, lambda parameter: parameter.fill_(torch.nan))
    if strategy in ASKS_NO_NETWORK:
        asked.pool.check(asked.select().indices, BATCH)
        return
    with pytest.raises(UserError, match=r"the network answers NaN for \d+ of \d+ images: .*, lower training.lr"):
        asked.select()


@pytest.mark.parametrize(("strategy", "round_"), [("badge", 0), ("random", 1), ("ganvae", 0), ("margin", 2)])
def test_nan_costs_its_run_and_no_other(experiment, tmp_path, monkeypatch, strategy, round_):
    """The training's loss is finite and the weights are not; the failure is in the run's file, the next run runs.

    In whatever round, the last one without a query too, and where no strategy asks the network.
    """

    def break_in(trainer, module, data, fit=loop.fit):
        fitted = fit(trainer, module, data)
        if len(data.pool.labeled) == 10 + 5 * round_:
            next(module.net.parameters()).data[0] = torch.nan
        return fitted

    def job(strategy):
        run = PlannedRun(example_config(strategy), tmp_path / strategy / "seed-0.jsonl")
        return {**job_message("run", run, settings(tmp_path)), "setup_key": "practice"}

    told = []
    with monkeypatch.context() as broken:
        broken.setattr(loop, "fit", break_in)
        worker.handle(job(strategy), lambda event, **facts: told.append(event), {"practice": experiment})
    failed = read_run(tmp_path / strategy / "seed-0.jsonl")
    assert (failed.status, len(failed.records)) == ("failed", round_)
    assert failed.failure["error"].startswith("the network answers NaN for 60 of 60 images")
    worker.handle(job("coreset"), lambda event, **facts: told.append(event), {"practice": experiment})
    assert read_run(tmp_path / "coreset" / "seed-0.jsonl").status == "done"
    assert told == ["round"] * round_ + ["failed", "round", "round", "round", "done"]


@pytest.mark.parametrize("strategy", ["badge", "coreset", "seals", "margin"])
def test_features_whose_distances_overflow_are_said_in_one_line(experiment, strategy):
    """Finite, and no NaN among the probabilities: k-center would compare infinities, SEALS lose every neighbour."""
    asked = ExampleQuery(experiment, strategy)
    net = asked.predict._module.net
    net.features[0].weight.data.mul_(1e22)
    net.classify.weight.data.zero_()
    with pytest.raises(UserError, match=r"features reach .*, their distances overflow: .* lower training.lr"):
        asked.select()


class Tight:
    """A network with room for ``most`` images at a time: more, and memory runs out."""

    def __init__(self, monkeypatch, most):
        self.sizes = []
        forward = Classifier.forward

        def guarded(net, images):
            self.sizes.append(len(images))
            if len(images) > most and not net.training:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(net, images)

        monkeypatch.setattr(Classifier, "forward", guarded)


def test_out_of_memory_in_a_pool_pass_halves_the_batch_and_goes_on(experiment, monkeypatch):
    free = ExampleQuery(experiment, "margin")
    expected = free.predict(torch.arange(200))
    asked = ExampleQuery(experiment, "margin")
    tight = Tight(monkeypatch, most=70)
    outputs = asked.predict(torch.arange(200))
    assert torch.allclose(outputs.log_probs, expected.log_probs, atol=1e-6)
    assert tight.sizes == [200, 200, 128, 64, 64, 64, 8]  # 512 at a time, 256, 128, and then 64
    assert asked.predict.n_scored == 200


def test_out_of_memory_in_the_middle_of_a_pass_keeps_what_was_done(experiment, monkeypatch):
    asked = ExampleQuery(experiment, "margin")
    expected = asked.predict(torch.arange(200))
    again, calls, forward = ExampleQuery(experiment, "margin"), [], Classifier.forward
    again.predict._data.predict_batch_size = 60

    def once(net, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return forward(net, images)

    monkeypatch.setattr(Classifier, "forward", once)
    outputs = again.predict(torch.arange(200))
    assert calls == [60, 60, 60, 30, 30, 20]
    assert torch.allclose(outputs.log_probs, expected.log_probs, atol=1e-6)


@pytest.mark.parametrize("strategy", ["margin", "badge", "seals"])
def test_a_row_says_that_memory_ran_out(experiment, tmp_path, monkeypatch, strategy):
    """Test pass and pool pass alike; the picks are those of a machine with room."""
    config = example_config(strategy)
    roomy = run_in_process(experiment, tmp_path / "roomy" / "seed-0.jsonl", config)
    Tight(monkeypatch, most=30)
    rows = run_in_process(experiment, tmp_path / "tight" / "seed-0.jsonl", config)
    assert [row.halved_to for row in roomy] == [None] * 3
    assert [row.halved_to for row in rows] == [16] * 3  # 512 images at a time, halved five times
    assert [row.indices for row in rows] == [row.indices for row in roomy]
    assert [row.accuracy for row in rows] == [row.accuracy for row in roomy]


def test_no_room_for_a_single_image_is_said_with_the_knob(experiment, monkeypatch):
    asked = ExampleQuery(experiment, "margin")
    Tight(monkeypatch, most=0)
    with pytest.raises(UserError, match=r"a single image runs out of memory: use a smaller net or device=cpu"):
        asked.select()
