"""BADGE: the factorised seeding is the dense one, pick for pick, and what is degenerate is drawn uniformly and said."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgal_bench.conformance import BATCH, ExampleQuery
from dgal_bench.core.seeding import TieBreak
from dgal_bench.core.types import Outputs
from dgal_bench.strategies.badge import draw, gradient_errors, seed_batch
from tests import reference


def outputs(n_points, n_classes, n_features, seed, sharpness=2.0):
    rng = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n_points, n_classes, generator=rng)
    return Outputs(torch.log_softmax(logits, dim=1), torch.randn(n_points, n_features, generator=rng).relu())


def picked(log_probs, features, batch_size, seed=0):
    ids = torch.arange(len(features))
    errors = gradient_errors(log_probs)
    return seed_batch(errors, features, batch_size, ids, TieBreak(seed, len(ids)), np.random.default_rng(seed))


@given(
    st.integers(1, 60), st.integers(2, 12), st.integers(1, 20), st.integers(0, 10_000), st.sampled_from([0.1, 2.0, 8.0])
)
def test_it_equals_the_dense_one_pick_for_pick_on_the_same_draws(n_points, n_classes, n_features, seed, sharpness):
    made = outputs(n_points, n_classes, n_features, seed, sharpness)
    batch_size = min(n_points, 15)
    places, n_uniform = picked(made.log_probs, made.features, batch_size, seed)
    errors, features = gradient_errors(made.log_probs).double().numpy(), made.features.double().numpy()
    norms = np.linalg.norm(errors, axis=1) * np.linalg.norm(features, axis=1)
    if (norms == 0).sum() <= 1 and n_uniform == 0:  # several points without gradient are one point: see below
        assert places.tolist() == reference.badge(errors, features, batch_size, np.random.default_rng(seed))
    assert len(set(places.tolist())) == batch_size


@pytest.mark.parametrize("seed", range(2))
def test_it_equals_the_dense_one_on_many_points(seed):
    made = outputs(3000, 10, 50, seed)
    places, n_uniform = picked(made.log_probs, made.features, 50, seed)
    errors, features = gradient_errors(made.log_probs).double().numpy(), made.features.double().numpy()
    assert places.tolist() == reference.badge(errors, features, 50, np.random.default_rng(seed))
    assert n_uniform == 0


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5])
def test_it_equals_the_dense_one_for_gradients_much_nearer_to_each_other_than_to_0(spread):
    rng = torch.Generator().manual_seed(2)
    log_probs = torch.log_softmax(torch.tensor([1.0, 0.5, 0.0]) + spread * torch.randn(200, 3, generator=rng), dim=1)
    features = 5.0 + 5 * spread * torch.randn(200, 20, generator=rng)
    places, n_uniform = picked(log_probs, features, 12, seed=4)
    errors, features = gradient_errors(log_probs).double().numpy(), features.double().numpy()
    assert places.tolist() == reference.badge(errors, features, 12, np.random.default_rng(4))
    assert n_uniform == 0


def test_the_gradient_is_autograds():
    """Of the cross-entropy at the predicted class, in the output layer's weights and without its bias; sign apart."""
    torch.manual_seed(0)
    features, layer = torch.randn(7, 5), torch.nn.Linear(5, 4)
    logits = layer(features)
    errors = gradient_errors(torch.log_softmax(logits, dim=1))
    for point in range(7):
        layer.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(features[point, None]), logits[point, None].argmax(dim=1))
        loss.backward()
        assert torch.allclose(layer.weight.grad, -torch.outer(errors[point], features[point]).detach(), atol=1e-6)


def test_a_confident_networks_errors_keep_their_digits():
    """p = 1 - 4e-9 rounds to 1 in float32; the error of the predicted class must still be the sum of the others."""
    errors = gradient_errors(torch.log_softmax(torch.tensor([[20.0, 0.0, 0.0]]), dim=1))
    assert errors[0, 0] == pytest.approx(-float(errors[0, 1:].sum()), rel=1e-5)
    assert errors[0, 0] > 0


def test_the_first_pick_has_the_longest_gradient_and_the_rest_follow_squared_distances():
    """Three points at distances 1 and 2 from the first: drawn with 1/5 and 4/5; 500 draws, within 5 deviations."""
    log_probs = torch.log(torch.full((3, 2), 0.5))
    features = torch.tensor([[8.0, 0.0], [8.0 - 2**0.5, 0.0], [8.0 - 8**0.5, 0.0]])  # |q|^2 = 1/2
    second = [picked(log_probs, features, 2, seed)[0].tolist() for seed in range(500)]
    assert {first for first, _ in second} == {0}
    assert np.mean([pick == 2 for _, pick in second]) == pytest.approx(0.8, abs=5 * (0.16 / 500) ** 0.5)


def test_a_draw_is_in_proportion_to_weights_and_never_of_a_zero():
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(weights, rng) for _ in range(4000)], minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    assert counts[3] / 4000 == pytest.approx(0.75, abs=0.04)
    assert draw(torch.zeros(5), rng) is None

    class Highest:
        def random(self):
            return np.nextafter(1.0, 0.0)

    assert draw(weights, Highest()) == 3


@pytest.mark.parametrize("what", ["saturated softmax", "no features", "one image many times"])
def test_where_no_gradient_differs_distinct_points_are_drawn_uniformly(what):
    made = outputs(40, 5, 6, seed=1)
    log_probs, features = {
        "saturated softmax": (torch.log_softmax(1e4 * made.log_probs.exp(), dim=1), made.features),
        "no features": (made.log_probs, torch.zeros(40, 6)),
        "one image many times": (made.log_probs[:1].repeat(40, 1), made.features[:1].repeat(40, 1)),
    }[what]
    expected = 10 if what != "one image many times" else 9  # the first has a gradient, the others are where it is
    firsts = set()
    for seed in range(20):
        places, n_uniform = picked(log_probs, features, 10, seed)
        assert len(set(places.tolist())) == 10
        assert n_uniform == expected
        firsts.add(int(places[0]))
    assert len(firsts) > 10  # by the seeded hash, not by place


def test_copies_of_a_pick_are_not_picked_while_others_are_left():
    """Rounding leaves duplicates a little apart in the factorised form; they must still be at distance 0."""
    made = outputs(30, 10, 50, seed=2, sharpness=6.0)
    copies = torch.arange(30).repeat_interleave(20)
    for seed in range(10):
        places, n_uniform = picked(made.log_probs[copies], 100 * made.features[copies], 30, seed)
        assert sorted((places // 20).tolist()) == list(range(30))
        assert n_uniform == 0


def test_the_row_says_how_many_picks_were_indistinct(experiment):
    asked = ExampleQuery(experiment, "badge")
    asked.select()
    assert asked.query.notes["indistinct"]() == 0
    blind = ExampleQuery(experiment, "badge")
    for parameter in blind.predict._module.net.parameters():
        parameter.data.zero_()
    blind.pool.check(blind.select().indices, BATCH)
    assert blind.query.notes["indistinct"]() == BATCH
