"""The VAE: its noise, its loss, its shapes, when it stops, and when it says that it has collapsed."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import kstest

from dgal_bench.config.schema import RepresentationConfig
from dgal_bench.core.errors import ConfigError, UserError
from dgal_bench.core.seeding import isolated, normals, seed_for
from dgal_bench.core.system import on_threads
from dgal_bench.data.image_data import ImageData
from dgal_bench.models.vae import Batch, VaeModule, as_float, encode, fit, posterior_means, train_vae
from dgal_bench.models.vae_nets import build_vae


def config(**settings):
    defaults = {
        "kind": "vae", "seed": 0, "encoder": "cnn", "latent_dim": 3, "recon_weight": 12.25, "lr": 5e-3,
        "train_batch_size": 16, "max_epochs": 30, "patience": 20, "holdout": 0.05, "threads": 1, "amp": False,
        "path": None, "test_path": None, "model": None, "pretrained": False, "checkpoint_path": None,
        "input_size": None,
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
        return train_vae(data, config(**settings), 0, CPU, lambda what, done, of: None)


CPU = torch.device("cpu")


def noise_of_epochs(n_ids=500, n_latents=20, n_epochs=20):
    """(epochs, ids, latents)."""
    ids = torch.arange(n_ids)
    return torch.stack([normals(seed_for(0, "noise", epoch), ids, n_latents) for epoch in range(n_epochs)]).double()


def test_noise_is_standard_normal():
    noise = noise_of_epochs().flatten()  # 200,000 of them
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / len(noise)) ** 0.5
    assert abs(noise.pow(3).mean()) < 4 * (15 / len(noise)) ** 0.5
    assert abs(noise.pow(4).mean() - 3) < 4 * (96 / len(noise)) ** 0.5
    assert kstest(noise.numpy(), "norm").pvalue > 1e-3
    assert 4.2 < noise.abs().max() < 6.8


@pytest.mark.parametrize("axis", ["epochs", "ids", "latents"])
def test_noise_is_uncorrelated_along_every_axis(axis):
    """Correlations of two rows of n samples are normal of deviation 1/sqrt(n), and so are those of their squares."""
    noise = noise_of_epochs(200).movedim({"epochs": 0, "ids": 1, "latents": 2}[axis], 0).flatten(1)
    for values in (noise, noise.square()):
        correlations = torch.corrcoef(values)
        pairs = correlations[torch.triu(torch.ones_like(correlations), 1) == 1] * noise.shape[1] ** 0.5
        assert abs(pairs.mean()) < 4 / len(pairs) ** 0.5
        assert abs(pairs.square().mean() - 1) < 6 * (2 / len(pairs)) ** 0.5
        assert pairs.abs().max() < 5.5


@pytest.mark.parametrize("n_latents", [1, 2, 7, 256])
def test_noise_belongs_to_the_image_whatever_its_batch(n_latents):
    ids = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    whole = normals(3, ids, n_latents)
    assert whole.shape == (200, n_latents)
    for size in (1, 3, 128, 199):
        assert torch.equal(torch.cat([normals(3, part, n_latents) for part in ids.split(size)]), whole)
    assert torch.equal(normals(3, ids.sort().values, n_latents)[ids], whole)
    assert torch.equal(normals(3, ids, n_latents + 3)[:, :n_latents], whole)
    assert not torch.isclose(normals(4, ids, n_latents), whole).any(dim=1).float().mean() > 0.1


def test_training_draws_from_no_generator_and_gives_every_image_its_own_noise():
    """The loss of a batch is that of its parts, and another where two images' noises are exchanged."""
    data = blobs()
    with isolated(0, "test"):
        module = VaeModule(build_vae((1, 8, 8), 3, "cnn"), config(max_epochs=3), seed=5)
    before = torch.get_rng_state()
    fit(module, data.images, 16, CPU, lambda what, done, of: None)
    assert torch.equal(torch.get_rng_state(), before)
    images, ids = as_float(data.images, 16), torch.arange(data.size)
    parts = [Batch(images[ids[i::3]], ids[i::3], weight=len(ids[i::3]) / data.size) for i in range(3)]
    with torch.no_grad():
        whole = float(module.training_step(Batch(images, ids, 1.0), 0))
        other = float(module.training_step(Batch(images, ids.flip(0), 1.0), 0))
        assert sum(float(module.training_step(part, 0)) for part in parts) == pytest.approx(whole, rel=1e-6)
    assert abs(other - whole) > 1e-3 * whole


@pytest.mark.parametrize(
    ("shape", "encoder"),
    [
        *((shape, "cnn") for shape in ((1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 84, 84), (1, 130, 225))),
        *((shape, encoder) for shape in ((3, 33, 47), (1, 5, 4)) for encoder in ("cnn", "resnet18")),
        ((1, 130, 225), "resnet18"),
    ],
)
def test_any_image_size_comes_back_whole_and_in_range(shape, encoder):
    vae = build_vae(shape, 7, encoder)
    mu, log_variance = vae.encode(torch.rand(2, *shape))
    assert mu.shape == log_variance.shape == (2, 7)
    images = vae.decode(mu)
    assert images.shape == (2, *shape)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        ((8, 8), [32, 64]),
        ((28, 28), [32, 64]),
        ((32, 32), [32, 64, 128]),
        ((64, 64), [32, 64, 128]),
        ((84, 84), [32, 64, 128]),
        ((127, 300), [32, 64, 128]),  # 15 pixels left
        ((128, 300), [32, 64, 128, 128]),  # 16 left, halved once more
        ((512, 512), [32, 64, 128, 128, 128, 128]),  # 32, 16, 8
    ],
)
def test_widths_are_the_specifications_and_large_images_get_further_stages(size, widths):
    with torch.device("meta"):  # without values
        vae = build_vae((3, *size), 5, "cnn")
    assert [m.out_channels for m in vae.encoder if isinstance(m, torch.nn.Conv2d)] == widths
    up = [m.in_channels for m in vae.decoder.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert up == widths[::-1]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in vae.modules())
    assert vae.mu.in_features == 256


@pytest.mark.parametrize(("size", "stem"), [(8, (3, 1)), (64, (3, 1)), (65, (7, 2)), (224, (7, 2))])
def test_the_resnet18_is_timms_with_groupnorm_and_a_stem_for_small_images(size, stem):
    """Parameters: He et al.'s 11.2 million without the classifier."""
    with torch.device("meta"):  # without values
        vae, cnn = (build_vae((3, size, size), 5, encoder) for encoder in ("resnet18", "cnn"))
    kinds = [type(m) for m in vae.encoder.modules()]
    assert sum(issubclass(kind, torch.nn.GroupNorm) for kind in kinds) == 20
    assert not any(issubclass(kind, torch.nn.BatchNorm2d) for kind in kinds)
    assert (vae.encoder.conv1.kernel_size[0], vae.encoder.conv1.stride[0]) == stem
    assert (torch.nn.MaxPool2d in kinds) == (size > 64)
    assert sum(p.numel() for p in vae.encoder.parameters()) == 11_176_512 - 3 * 64 * (49 - stem[0] ** 2)
    assert [p.shape for p in vae.decoder.parameters()] == [p.shape for p in cnn.decoder.parameters()]


def test_a_resnet18s_latents_do_not_depend_on_the_batch():
    vae = build_vae((3, 16, 16), 5, "resnet18").train()
    images = torch.rand(6, 3, 16, 16)
    with torch.no_grad():
        alone = torch.cat([vae.encode(image[None])[0] for image in images])
        assert torch.allclose(vae.encode(images)[0], alone, atol=1e-4 * float(alone.abs().max()))
    assert alone.std(dim=0).min() > 0


@pytest.mark.parametrize("shape", [(1, 3, 28), (3, 28, 2)])
def test_images_too_small_for_a_vae_are_refused(shape):
    with pytest.raises(ConfigError, match=f"at least 4 pixels a side, these have {shape[1]}x{shape[2]}: set dataset"):
        build_vae(shape, 5, "cnn")


def test_an_unknown_encoder_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown encoder 'resnet34'; did you mean 'resnet18'"):
        build_vae((1, 8, 8), 5, "resnet34")


@pytest.mark.parametrize("images", [torch.zeros(9, 20, 1, 1), torch.zeros(9, 3, 8, 8), torch.zeros(9, 20, 1, 1).byte()])
def test_embeddings_are_refused(images):
    with pytest.raises(ConfigError, match=r"these are embeddings: set representation=pixels .*pca or npy"):
        train(replace(blobs(9), images=images))


@pytest.mark.slow
def test_amp_trains_and_encodes_in_bfloat16_and_gives_float32():
    """Where the work is done in bfloat16, what comes out is close and float32, and means have digits beyond it."""
    data = blobs()
    module, _ = train(data, max_epochs=15, amp=True)
    seen = set()
    module.vae.decoder[0].register_forward_hook(lambda layer, given, output: seen.add(output.dtype))
    module.vae.encoder[0].register_forward_hook(lambda layer, given, output: seen.add(output.dtype))
    images, noise = as_float(data.images, 16), normals(0, torch.arange(data.size), 3)
    with torch.no_grad():
        outcome = module.losses(images, noise)
        means = posterior_means(module, data.images, 16)
        assert seen == {torch.bfloat16}
        exact = module.vae.losses(images, noise)
    assert seen == {torch.bfloat16, torch.float32}
    for half, full in zip((*outcome, means), (*exact, exact[2]), strict=True):
        assert half.dtype == torch.float32
        assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()
    assert encode(module, data)[1]["explained_variance"] > 0.4
    # From float32's, whose first weights are off by bfloat16's digits, it is 2 % away after 3 epochs, 10 % after 15.
    half, full = (train(data, max_epochs=3, amp=amp)[1]["holdout_loss"] for amp in (True, False))
    assert half == pytest.approx(full, rel=0.1)


def test_the_loss_sums_over_pixels_and_over_latents():
    """Against the Gaussian formulas, term by term."""
    module = VaeModule(build_vae((1, 8, 8), 3, "cnn"), config(), seed=0)
    images, noise = torch.rand(5, 1, 8, 8), torch.randn(5, 3)
    with torch.no_grad():
        error, kl, _ = module.losses(images, noise)
        mu, log_variance = module.vae.encode(images)
        decoded = module.vae.decode(mu + noise * torch.exp(log_variance / 2))
    posterior = torch.distributions.Normal(mu, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(kl, divergence, atol=1e-5)
    for i in range(5):
        assert float(error[i]) == pytest.approx(
            sum((decoded[i] - images[i]).flatten().tolist()[j] ** 2 for j in range(64)), rel=1e-4
        )


@pytest.fixture(scope="module")
def trained():
    with on_threads(1):
        return train(blobs())


@pytest.mark.slow
def test_it_finds_the_structure_of_four_blobs(trained):
    data = blobs()
    module, facts = trained
    latents, quality = encode(module, data)
    assert latents.shape == (200, 3)
    assert quality["active_latents"] >= 1
    assert quality["explained_variance"] > 0.5
    # Images of one kind are closer to their own centre than to any other.
    centres = torch.stack([latents[data.labels == c].mean(0) for c in range(4)])
    assert (torch.cdist(latents, centres).argmin(1) == data.labels).float().mean() > 0.95
    assert facts["best_epoch"] <= facts["epochs"] <= 30


@pytest.mark.slow
def test_explained_variance_is_one_minus_the_unexplained_share(trained):
    data = blobs()
    module, _ = trained
    _, quality = encode(module, data, batch_size=17)
    pixels = data.images.double() / 16
    with torch.no_grad():
        decoded = module.vae.decode(module.vae.encode(pixels.float())[0]).double()
    unexplained = (decoded - pixels).square().sum() / (pixels - pixels.mean(0)).square().sum()
    assert quality["explained_variance"] == pytest.approx(1 - float(unexplained), abs=1e-4)


def test_any_image_is_encoded_as_the_pools_are():
    """The posterior mean, whatever the batch; a test split may be empty."""
    data = blobs()
    module, _ = train(data, max_epochs=4)
    latents = encode(module, data)[0]
    assert torch.equal(posterior_means(module, data.images, 16), latents)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(posterior_means(module, data.images[order], 16, batch_size=17), latents[order], atol=1e-5)
    assert posterior_means(module, data.test_images, 16).shape == (0, 3)


def test_the_same_seed_gives_the_same_latents_and_global_generators_stay():
    before = torch.get_rng_state()
    first, second = (encode(train(blobs(), max_epochs=4)[0], blobs())[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_stops_patience_epochs_after_the_best_and_goes_back_to_it():
    """A huge learning rate: the loss is best early on, and what comes after must not be kept."""
    _, facts = train(blobs(100), lr=0.05, max_epochs=60, patience=3)
    assert facts["epochs"] < 60
    assert facts["epochs"] == facts["best_epoch"] + 3
    assert math.isfinite(facts["holdout_loss"])


def test_a_loss_that_is_never_finite_is_an_error_with_the_knob():
    with pytest.raises(UserError, match=r"^the VAE's loss was never finite: lower representation.lr$"):
        train(blobs(), lr=1e30, max_epochs=2)


def test_a_collapsed_latent_is_an_error_that_says_so():
    data = blobs(100)
    module, _ = train(data, recon_weight=1e-4, max_epochs=6)
    with pytest.raises(UserError, match=r"0 active latents of 3.*raise representation.recon_weight"):
        encode(module, data)
