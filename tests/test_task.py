"""The classifier: its shapes, the rule that stops it, and what a round's training depends on."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dgal_bench.config.compose import compose
from dgal_bench.conformance import example_config
from dgal_bench.core.errors import ConfigError, UserError
from dgal_bench.core.seeding import isolated
from dgal_bench.data.pool import Pool, initial_set
from dgal_bench.experiment import Run
from dgal_bench.models.nets import build_net, cost
from dgal_bench.models.task import StopWhenFlat, fit, measure_accuracy, new_trainer


def config(dataset):
    return compose({"dataset": dataset, "representation": "vae", "profile": "paper", "strategy": "random"})


@pytest.mark.parametrize(
    ("dataset", "shape", "parameters"),
    [
        # conv 16x(1x9)+16, conv 32x(16x9)+32, linear 32x2x2x50+50, linear 50x10+10
        ("digits", (1, 8, 8), 160 + 4640 + 6450 + 510),
        # conv 20x25+20, conv 50x(20x25)+50, linear 50x4x4x50+50, linear 50x10+10
        ("mnist", (1, 28, 28), 520 + 25_050 + 40_050 + 510),
    ],
)
def test_the_cnn_is_the_specifications(dataset, shape, parameters):
    net = build_net(shape, 10, config(dataset).net)
    logits, features = net(torch.zeros(3, *shape))
    assert logits.shape == (3, 10)
    assert features.shape == (3, 50)
    assert features.min() >= 0
    assert cost(net, shape)["parameters"] == parameters
    assert torch.allclose(net.classify(features), logits)


def test_flops_are_two_per_multiplication():
    """digits: 36x9x16 + 16x144x32 + 128x50 + 50x10 multiply-adds."""
    net = build_net((1, 8, 8), 10, config("digits").net)
    assert cost(net, (1, 8, 8))["flops_per_image"] == 2 * (36 * 9 * 16 + 16 * 144 * 32 + 128 * 50 + 50 * 10)


def test_a_net_too_deep_for_its_images_is_refused():
    with pytest.raises(ConfigError, match="leave nothing of a 8x8 image"):
        build_net((1, 8, 8), 10, config("mnist").net)


def epochs_run(losses, **settings):
    """After how many epochs the rule stops, given the epoch losses."""
    defaults = {"patience": 3, "min_delta": 0.1, "min_epochs": 1}
    stop = StopWhenFlat(SimpleNamespace(**{**defaults, **settings}), chance=2.0)
    for epochs, loss in enumerate(losses, start=1):
        if stop(loss, epochs):
            return epochs
    return len(losses)


def test_training_stops_after_patience_epochs_without_min_delta():
    assert (
        epochs_run([0.9, 0.5, 0.45, 0.42, 0.41, 0.40]) == 5
    )  # 0.5 was the last improvement by 0.1: three stale after it
    assert (
        epochs_run([0.9, 0.5, 0.45, 0.42, 0.3, 0.29, 0.28, 0.27]) == 8
    )  # 0.3 improves on 0.5 and starts the count again


def test_it_is_not_armed_at_chance_nor_before_min_epochs():
    assert epochs_run([2.0] * 9) == 9  # flat, but above half of chance
    assert epochs_run([2.0] * 5 + [0.99] * 6) == 9  # armed below 1.0: the drop counts as an improvement, then three
    assert epochs_run([0.5] * 9, min_epochs=7) == 7


def one_round(experiment, n_labeled=40, seed=0, round_=0, **overrides):
    run = Run.of(
        example_config("random", f"seed={seed}", *[f"training.{k}={v}" for k, v in overrides.items()]), experiment
    )
    first = initial_set(experiment.data.labels, 10, n_labeled, seed)
    pool = Pool(experiment.data.size, 10, first, experiment.data.labels[first])
    module, data = run.new_module(round_), run.datamodule(pool, round_)
    with isolated(seed, "training", round_):
        trainer = new_trainer(run.config, experiment.device)
        fitted = fit(trainer, module, data)
        return fitted, measure_accuracy(trainer, module, data), module


def test_a_round_is_the_same_bits_again(experiment):
    (fitted, accuracy, module), again = one_round(experiment), one_round(experiment)
    assert (fitted, accuracy) == again[:2]
    for a, b in zip(module.parameters(), again[2].parameters(), strict=True):
        assert torch.equal(a, b)


def test_initial_weights_differ_by_seed_and_round_only(experiment):
    def weights(strategy, seed, round_):
        run = Run.of(example_config(strategy, f"seed={seed}"), experiment)
        return next(run.new_module(round_).parameters())

    assert torch.equal(weights("random", 0, 1), weights("dgmg", 0, 1))
    assert not torch.equal(weights("random", 0, 1), weights("random", 0, 2))
    assert not torch.equal(weights("random", 0, 1), weights("random", 1, 1))


def test_it_learns_and_says_when_it_did_not(experiment):
    learned, accuracy, _ = one_round(experiment, n_labeled=150, max_epochs=60)
    assert not learned.underfit
    assert learned.train_loss < 0.5
    assert accuracy > 0.7
    short, _, _ = one_round(experiment, max_epochs=1)
    assert short.underfit
    assert short.train_loss >= math.log(10) / 2


def test_the_loss_is_the_mean_over_points_of_the_last_epoch(experiment):
    """With a learning rate of 0 every epoch's loss is that of the initial weights."""
    fitted, _, module = one_round(experiment, n_labeled=41, lr=0.0, max_epochs=2)
    first = initial_set(experiment.data.labels, 10, 41, 0)
    with torch.no_grad():
        logits, _ = module.net(experiment.transform(experiment.data.images[first]))
    assert fitted.train_loss == pytest.approx(
        float(nn.functional.cross_entropy(logits, experiment.data.labels[first])), abs=1e-5
    )


def test_accuracy_is_the_share_of_right_answers(experiment):
    _, accuracy, module = one_round(experiment, n_labeled=150)
    module.eval()
    with torch.no_grad():
        logits, _ = module.net(experiment.transform(experiment.data.test_images))
    assert accuracy == pytest.approx(float((logits.argmax(1) == experiment.data.test_labels).float().mean()))


def test_one_label_trains(experiment):
    fitted, accuracy, _ = one_round(experiment, n_labeled=1, max_epochs=3)
    assert fitted.epochs == 3
    assert 0 <= accuracy <= 1


def test_a_diverged_training_says_which_knob(experiment):
    with pytest.raises(UserError, match=r"lower training.lr"):
        one_round(experiment, lr=1e20, max_epochs=3)
