"""The VAE: its loss, its shapes, when it stops, and when it says that it has collapsed."""

import math

import pytest
import torch

from dgal_bench.config import RepresentationConfig
from dgal_bench.data.datasets import ImageData
from dgal_bench.errors import UserError
from dgal_bench.models.vae import VaeCNN, VaeModule, encode, posterior_means, train_vae
from dgal_bench.seeding import isolated


def config(**settings):
    defaults = {
        "kind": "vae", "seed": 0, "latent_dim": 3, "recon_weight": 12.25, "lr": 5e-3, "train_batch_size": 16,
        "max_epochs": 30, "patience": 20, "holdout": 0.05, "threads": 1,
    }  # fmt: skip
    return RepresentationConfig(**{**defaults, **settings})


def blobs(n=200):
    """A bright square at one of four places, with a little noise."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 2, (n, 1, 8, 8), generator=rng, dtype=torch.uint8)
    for i in range(n):
        images[i, 0, 4 * (i % 2) : 4 * (i % 2) + 3, 4 * (i // 2 % 2) : 4 * (i // 2 % 2) + 3] += 14
    return ImageData("blobs", images, torch.arange(n) % 4, images[:0], torch.zeros(0), 4, maximum=16)


def train(data, **settings):
    with isolated(0, "test"):
        return train_vae(data, config(**settings), 0, torch.device("cpu"), lambda what, done, of: None)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 33, 47), (1, 5, 4)])
def test_any_image_size_comes_back_whole_and_in_range(shape):
    vae = VaeCNN(shape, 7)
    mu, log_variance = vae.encode(torch.rand(2, *shape))
    assert mu.shape == log_variance.shape == (2, 7)
    images = vae.decode(mu)
    assert images.shape == (2, *shape)
    assert images.min() >= 0
    assert images.max() <= 1


def test_widths_are_the_specifications():
    small, large = VaeCNN((1, 28, 28), 5), VaeCNN((3, 32, 32), 5)
    assert [m.out_channels for m in small.encoder if isinstance(m, torch.nn.Conv2d)] == [32, 64]
    assert [m.out_channels for m in large.encoder if isinstance(m, torch.nn.Conv2d)] == [32, 64, 128]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in large.modules())


def test_the_loss_sums_over_pixels_and_over_latents():
    """Against the Gaussian formulas, term by term."""
    module = VaeModule(VaeCNN((1, 8, 8), 3), config())
    images, noise = torch.rand(5, 1, 8, 8), torch.randn(5, 3)
    with torch.no_grad():
        error, kl = module.losses(images, noise)
        mu, log_variance = module.vae.encode(images)
        decoded = module.vae.decode(mu + noise * torch.exp(log_variance / 2))
    posterior = torch.distributions.Normal(mu, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(kl, divergence, atol=1e-5)
    for i in range(5):
        assert float(error[i]) == pytest.approx(
            sum((decoded[i] - images[i]).flatten().tolist()[j] ** 2 for j in range(64)), rel=1e-4
        )


def test_it_finds_the_structure_of_four_blobs():
    data = blobs()
    module, facts = train(data)
    latents, quality = encode(module, data)
    assert latents.shape == (200, 3)
    assert quality["active_latents"] >= 1
    assert quality["explained_variance"] > 0.5
    # Images of one kind are closer to their own centre than to any other.
    centres = torch.stack([latents[data.labels == c].mean(0) for c in range(4)])
    assert (torch.cdist(latents, centres).argmin(1) == data.labels).float().mean() > 0.95
    assert facts["best_epoch"] <= facts["epochs"] <= 30


def test_explained_variance_is_one_minus_the_unexplained_share():
    data = blobs()
    module, _ = train(data)
    _, quality = encode(module, data, batch_size=17)
    pixels = data.images.double() / 16
    with torch.no_grad():
        decoded = module.vae.decode(module.vae.encode(pixels.float())[0]).double()
    unexplained = (decoded - pixels).square().sum() / (pixels - pixels.mean(0)).square().sum()
    assert quality["explained_variance"] == pytest.approx(1 - float(unexplained), abs=1e-4)


def test_any_image_is_encoded_as_the_pools_are():
    """The posterior mean, whatever the batch; a test split may be empty."""
    data = blobs()
    module, _ = train(data, max_epochs=8)
    latents = encode(module, data)[0]
    assert torch.equal(posterior_means(module, data.images, 16), latents)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(posterior_means(module, data.images[order], 16, batch_size=17), latents[order], atol=1e-5)
    assert posterior_means(module, data.test_images, 16).shape == (0, 3)


def test_the_same_seed_gives_the_same_latents_and_global_generators_stay():
    before = torch.get_rng_state()
    first, second = (encode(train(blobs(), max_epochs=8)[0], blobs())[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_stops_patience_epochs_after_the_best_and_goes_back_to_it():
    """A huge learning rate: the loss is best early on, and what comes after must not be kept."""
    _, facts = train(blobs(), lr=0.05, max_epochs=60, patience=3)
    assert facts["epochs"] < 60
    assert facts["epochs"] == facts["best_epoch"] + 3
    assert math.isfinite(facts["holdout_loss"])


def test_a_collapsed_latent_is_an_error_that_says_so():
    data = blobs()
    module, _ = train(data, recon_weight=1e-4, max_epochs=10)
    with pytest.raises(UserError, match=r"0 active latents of 3.*raise representation.recon_weight"):
        encode(module, data)
