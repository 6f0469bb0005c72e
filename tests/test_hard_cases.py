"""What queries meet in the field: confident networks, copies, one label, no room to choose, NaN, too little memory."""

from dataclasses import replace

import pytest
import torch

from dgal_bench import loop, worker
from dgal_bench.compose import group_names
from dgal_bench.engines.base import message
from dgal_bench.errors import UserError
from dgal_bench.laws import BATCH, Asked, practice, run_here
from dgal_bench.models.nets import Classifier
from dgal_bench.record import read_cell
from dgal_bench.sweep import Job
from tests.test_cli import settings

STRATEGIES = group_names("strategy")
ASKS_NO_NETWORK = {"random", "ganvae"}


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return request.param


def weights(asked, change):
    for parameter in asked.predict._module.net.parameters():
        change(parameter.data)


def test_a_saturated_softmax_still_gives_a_batch(lab, strategy):
    asked = Asked(lab, strategy)
    weights(asked, lambda parameter: parameter.mul_(1e3))
    batch = asked.select().indices
    asked.pool.check(batch, BATCH)
    if asked.cell.config.strategy.acquire["kind"] == "badge":
        assert asked.predict(asked.pool.unlabeled).probs.amax() == 1
        assert asked.query.notes["indistinct"]() == BATCH  # no gradient at all


def test_one_image_many_times_still_gives_a_batch(lab, strategy):
    same = lab.data.images[:1].expand_as(lab.data.images).contiguous()
    asked = Asked(replace(lab, data=replace(lab.data, images=same)), strategy)
    asked.pool.check(asked.select().indices, BATCH)


def test_a_batch_of_all_candidates_is_the_candidates(lab, strategy):
    """As many left by the restriction as are picked: the criterion has no choice, whatever it is."""
    asked = Asked(lab, strategy, n_labeled=lab.data.size - BATCH)
    selection = asked.select()
    assert sorted(selection.indices.tolist()) == sorted(selection.candidates.tolist())
    assert sorted(selection.indices.tolist()) == asked.pool.unlabeled.tolist()


@pytest.mark.parametrize(
    "strategy", ["rsmg", "rslc", "rsbadge", "rscoreset", "dgmg", "dgent", "dgbadge", "seals_matched"]
)
def test_a_restriction_to_as_many_as_a_batch_is_the_batch(lab, tmp_path, strategy):
    """restricted_size=batch_size, with most of the pool unlabeled: the restriction alone decides."""
    rows = run_here(lab, tmp_path / "seed-0.jsonl", practice(strategy, f"restricted_size={BATCH}"))
    assert [row.n_candidates for row in rows[:-1]] == [BATCH, BATCH]
    for row in rows[:-1]:
        assert len(set(row.indices)) == BATCH
        assert "topped_up" not in row.extra


def test_one_label_of_one_class_is_enough_to_go_on(lab, tmp_path, strategy):
    rows = run_here(lab, tmp_path / "seed-0.jsonl", practice(strategy, "initial_size=1"))
    assert [row.n_labeled for row in rows] == [1, 6, 11]
    assert rows[0].propagated["iterations"] > 0


def test_a_network_that_answers_nan_is_said_in_one_line(lab, strategy):
    asked = Asked(lab, strategy)
    weights(asked, lambda parameter: parameter.fill_(torch.nan))
    if strategy in ASKS_NO_NETWORK:
        asked.pool.check(asked.select().indices, BATCH)
        return
    with pytest.raises(UserError, match=r"the network answers NaN for \d+ of \d+ images: .*, lower training.lr"):
        asked.select()


@pytest.mark.parametrize(("strategy", "round_"), [("badge", 0), ("random", 1), ("ganvae", 0), ("margin", 2)])
def test_nan_costs_its_cell_and_no_other(lab, tmp_path, monkeypatch, strategy, round_):
    """The training's loss is finite and the weights are not; the failure is in the cell's file, the next cell runs.

    In whatever round, the last one without a query too, and where no strategy asks the network.
    """

    def break_in(trainer, module, data, fit=loop.fit):
        fitted = fit(trainer, module, data)
        if len(data.pool.labeled) == 10 + 5 * round_:
            next(module.net.parameters()).data[0] = torch.nan
        return fitted

    def job(strategy):
        cell = Job(practice(strategy), tmp_path / strategy / "seed-0.jsonl")
        return {**message("cell", cell, settings(tmp_path)), "setup_key": "practice"}

    told = []
    with monkeypatch.context() as broken:
        broken.setattr(loop, "fit", break_in)
        worker.handle(job(strategy), lambda event, **facts: told.append(event), {"practice": lab})
    failed = read_cell(tmp_path / strategy / "seed-0.jsonl")
    assert (failed.status, len(failed.records)) == ("failed", round_)
    assert failed.failure["error"].startswith("the network answers NaN for 60 of 60 images")
    worker.handle(job("coreset"), lambda event, **facts: told.append(event), {"practice": lab})
    assert read_cell(tmp_path / "coreset" / "seed-0.jsonl").status == "done"
    assert told == ["round"] * round_ + ["failed", "round", "round", "round", "done"]


@pytest.mark.parametrize("strategy", ["badge", "coreset", "seals", "margin"])
def test_features_whose_distances_overflow_are_said_in_one_line(lab, strategy):
    """Finite, and no NaN among the probabilities: k-center would compare infinities, SEALS lose every neighbour."""
    asked = Asked(lab, strategy)
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


def test_out_of_memory_in_a_pool_pass_halves_the_batch_and_goes_on(lab, monkeypatch):
    free = Asked(lab, "margin")
    expected = free.predict(torch.arange(200))
    asked = Asked(lab, "margin")
    tight = Tight(monkeypatch, most=70)
    outputs = asked.predict(torch.arange(200))
    assert torch.allclose(outputs.log_probs, expected.log_probs, atol=1e-6)
    assert tight.sizes == [200, 200, 128, 64, 64, 64, 8]  # 512 at a time, 256, 128, and then 64
    assert asked.predict.n_scored == 200


def test_out_of_memory_in_the_middle_of_a_pass_keeps_what_was_done(lab, monkeypatch):
    asked = Asked(lab, "margin")
    expected = asked.predict(torch.arange(200))
    again, calls, forward = Asked(lab, "margin"), [], Classifier.forward
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
def test_a_row_says_that_memory_ran_out(lab, tmp_path, monkeypatch, strategy):
    """Test pass and pool pass alike; the picks are those of a machine with room."""
    config = practice(strategy)
    roomy = run_here(lab, tmp_path / "roomy" / "seed-0.jsonl", config)
    Tight(monkeypatch, most=30)
    rows = run_here(lab, tmp_path / "tight" / "seed-0.jsonl", config)
    assert [row.halved_to for row in roomy] == [None] * 3
    assert [row.halved_to for row in rows] == [16] * 3  # 512 images at a time, halved five times
    assert [row.indices for row in rows] == [row.indices for row in roomy]
    assert [row.accuracy for row in rows] == [row.accuracy for row in roomy]


def test_no_room_for_a_single_image_is_said_with_the_knob(lab, monkeypatch):
    asked = Asked(lab, "margin")
    Tight(monkeypatch, most=0)
    with pytest.raises(UserError, match=r"a single image runs out of memory: use a smaller net or device=cpu"):
        asked.select()
