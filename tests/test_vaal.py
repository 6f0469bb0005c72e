"""GANVAE: the discriminator tells a labeled set from a shifted unlabeled one, and the picks look unlabeled."""

import pytest
import torch

from dgal_bench.config.schema import AdversarySettings
from dgal_bench.conformance import BATCH, ExampleQuery, example_config, run_in_process
from dgal_bench.core.errors import ConfigError, UserError
from dgal_bench.core.seeding import isolated
from dgal_bench.models.vaal import PairLoader, VaalModule, train_vaal
from dgal_bench.models.vae_nets import Vae, build_vae

CPU = torch.device("cpu")
SETTINGS = AdversarySettings(latent_dim=4, recon_weight=1.0, vae_lr=2e-3, lr=2e-3, train_batch_size=16)


def two_kinds(n_points=120):
    """Images bright on the left or on the right, half each; all labeled ones are of the first kind."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 4, (n_points, 1, 8, 8), generator=rng, dtype=torch.uint8)
    left = torch.arange(n_points) % 2 == 0
    images[left, :, :, :4] += 12
    images[~left, :, :, 4:] += 12
    return images, left


def trained(images, labeled, unlabeled, steps, seed=0, settings=SETTINGS):
    return train_vaal(images, 16, labeled, unlabeled, settings, seed, CPU, steps)


@pytest.mark.slow
def test_it_separates_a_labeled_set_from_a_shifted_unlabeled_one_and_ranks_the_shifted_lowest():
    """Half of the unlabeled look like the labeled; the other half must get the lowest D(mu)."""
    images, left = two_kinds()
    labeled = torch.nonzero(left).flatten()[:20]
    unlabeled = torch.tensor([i for i in range(len(images)) if i not in labeled.tolist()])
    scores = trained(images, labeled, unlabeled, steps=60).score(images[unlabeled], 16)[0]
    shifted = ~left[unlabeled]
    assert scores[shifted].max() < scores[~shifted].min()
    assert not left[unlabeled[scores.argsort()[:20]]].any()


@pytest.mark.parametrize("n_labeled", [1, 2, 100])
def test_any_number_of_labels_ends_and_the_same_seed_gives_the_same_scores(n_labeled):
    images, _ = two_kinds()
    labeled, unlabeled = torch.arange(n_labeled), torch.arange(n_labeled, 120)
    before = torch.get_rng_state()
    scores = [trained(images, labeled, unlabeled, 3, seed).score(images, 16)[0] for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_the_losses_are_those_of_the_specification():
    """ELBO(L) + ELBO(U) + BCE(D(mu_L), 1) + BCE(D(mu_U), 1), and BCE(D(mu_L), 1) + BCE(D(mu_U), 0), set by set."""
    torch.manual_seed(0)
    settings = AdversarySettings(latent_dim=4, recon_weight=3.0)
    module = VaalModule(build_vae((1, 8, 8), 4, "cnn"), settings)
    labeled, unlabeled = torch.rand(5, 1, 8, 8), torch.rand(5, 1, 8, 8)
    both = torch.cat([labeled, unlabeled])
    torch.manual_seed(1)
    noise = torch.randn(10, 4)
    expected = 0.0
    for images, drawn in ((labeled, noise[:5]), (unlabeled, noise[5:])):
        mu, log_variance = module.vae.encode(images)
        rebuilt = module.vae.decode(mu + drawn * (log_variance / 2).exp())
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(mu, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
        )
        elbo = 3.0 * (rebuilt - images).square().sum() / 5 + kl.sum() / 5
        told = torch.sigmoid(module.discriminator(mu))
        expected += elbo + torch.nn.functional.binary_cross_entropy(told, torch.ones(5, 1))
    torch.manual_seed(1)
    assert module.vae_loss(both).item() == pytest.approx(expected.item(), rel=1e-5)
    told = [torch.sigmoid(module.discriminator(module.vae.encode(images)[0])) for images in (labeled, unlabeled)]
    expected = -told[0].log().mean() - (1 - told[1]).log().mean()
    assert module.discriminator_loss(both).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_encoder_is_the_settings():
    images, _ = two_kinds()
    settings = AdversarySettings(latent_dim=4, recon_weight=1.0, encoder="resnet18", train_batch_size=4)
    module = trained(images, torch.arange(5), torch.arange(5, 120), 1, settings=settings)
    assert sum(p.numel() for p in module.vae.encoder.parameters()) > 11_000_000
    assert module.score(images[:7], 16)[0].shape == (7,)


@pytest.mark.parametrize("images", [torch.zeros(9, 20, 1, 1), torch.zeros(9, 1, 8, 8)])
def test_embeddings_are_refused(images):
    with pytest.raises(ConfigError, match="these are embeddings: choose another strategy than ganvae"):
        trained(images, torch.arange(5), torch.arange(5, 9), 1)


def test_a_discriminator_step_leaves_the_vae_alone_and_the_other_way_round():
    module = VaalModule(build_vae((1, 8, 8), 4, "cnn"), AdversarySettings(latent_dim=4, recon_weight=1.0))
    images = torch.rand(6, 1, 8, 8)
    module.discriminator_loss(images).backward()
    assert all(p.grad is None for p in module.vae.parameters())
    vae_optimizer, optimizer = module.configure_optimizers()
    groups = [{id(p) for group in o.param_groups for p in group["params"]} for o in (vae_optimizer, optimizer)]
    assert groups[0] == {id(p) for p in module.vae.parameters()}
    assert groups[1] == {id(p) for p in module.discriminator.parameters()}
    assert [o.param_groups[0]["lr"] for o in (vae_optimizer, optimizer)] == [5e-4, 1e-4]


def test_steps_without_unused_gradients_end_at_the_same_bits():
    """Against both losses' whole gradients, the discriminator's in the VAE's steps included."""
    images, _ = two_kinds()
    labeled, unlabeled = torch.arange(7), torch.arange(7, 120)

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with isolated(5, "adversary"):
        plain = VaalModule(build_vae((1, 8, 8), 4, "cnn"), SETTINGS)
        vae_optimizer, optimizer = plain.configure_optimizers()
        draws = PairLoader(images, 16, labeled, unlabeled, 16, 3, 2, torch.Generator().manual_seed(5))
        for batches in draws.draw_steps():
            for batch in batches:
                step(vae_optimizer, plain.vae_loss(batch))
            step(optimizer, plain.discriminator_loss(batch))
    found = trained(images, labeled, unlabeled, steps=3, seed=5).state_dict()
    assert all(torch.equal(found[name], expected) for name, expected in plain.state_dict().items())


def test_a_step_is_two_batches_of_labeled_and_unlabeled_halves():
    images, _ = two_kinds()
    images[:7] = 16
    draws = PairLoader(images, 16, torch.arange(7), torch.arange(7, 120), 8, 5, 2, torch.Generator().manual_seed(0))
    steps = list(draws.draw_steps())
    assert [len(batches) for batches in steps] == [2] * 5
    for batch in (batch for batches in steps for batch in batches):
        assert batch.shape == (16, 1, 8, 8)
        white = (batch == 1).flatten(1).all(dim=1)
        assert white[:8].all()
        assert not white[8:].any()


def test_steps_are_epochs_of_the_unlabeled_with_a_cap():
    assert AdversarySettings(4, 1.0).steps(60_000) == 100 * 469
    assert AdversarySettings(4, 1.0, max_steps=200).steps(60_000) == 200
    assert AdversarySettings(4, 1.0, max_steps=200).steps(100) == 100


def test_scores_do_not_depend_on_what_else_is_in_the_batch():
    images, _ = two_kinds()
    module = trained(images, torch.arange(5), torch.arange(5, 120), 2)
    assert torch.allclose(module.score(images, 16)[0], module.score(images, 16, batch_size=7)[0], atol=1e-6)
    assert not module.training


def test_out_of_memory_while_scoring_halves_the_batch_and_goes_on(experiment, monkeypatch):
    expected = ExampleQuery(experiment, "ganvae").select().indices
    encode = Vae.encode

    def tight(vae, images):
        if len(images) > 50 and not vae.training:
            raise torch.OutOfMemoryError
        return encode(vae, images)

    monkeypatch.setattr(Vae, "encode", tight)
    asked = ExampleQuery(experiment, "ganvae")
    assert asked.select().indices.tolist() == expected.tolist()
    assert asked.query.notes["aux_halved_to"]() == 32  # 1,024, and halved five times
    assert asked.query.notes["aux_scored"]() == 188


def test_losses_that_are_not_finite_are_an_error_with_the_knob():
    images, _ = two_kinds()
    wild = AdversarySettings(latent_dim=4, recon_weight=1.0, vae_lr=1e6, train_batch_size=16)
    with pytest.raises(UserError, match=r"lower strategy.acquire.vae_lr"):
        trained(images, torch.arange(5), torch.arange(5, 120), 10, settings=wild)


@pytest.mark.slow
def test_the_default_rates_separate_them_too_if_slower():
    images, left = two_kinds()
    labeled = torch.nonzero(left).flatten()[:20]
    module = trained(images, labeled, torch.arange(20, 120), 50, settings=AdversarySettings(4, 1.0))
    lowest = module.score(images, 16)[0].argsort()[:20]
    assert not left[lowest].any()


def test_its_row_says_what_it_cost(experiment, tmp_path):
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", example_config("ganvae", "initial_size=1"))
    first = rows[0]
    assert first.n_scored == 0
    assert first.extra == {"aux_scored": 199, "aux_steps": 2}
    assert first.seconds["aux_train"] > first.seconds["infer"] > 0
    assert sum(first.seconds.values()) <= first.query_seconds


def test_the_picks_have_the_lowest_scores(experiment):
    asked = ExampleQuery(experiment, "ganvae")
    batch = asked.select().indices
    again = ExampleQuery(experiment, "ganvae")
    seed, pool, settings = int(again.query.rng.integers(2**62)), again.pool, again.run.strategy.acquire
    module = train_vaal(experiment.data.images, 16, pool.labeled, pool.unlabeled, settings, seed, CPU, 2)
    scores, _ = module.score(experiment.data.images[pool.unlabeled], 16)
    assert batch.tolist() == pool.unlabeled[scores.argsort()[:BATCH]].tolist()
