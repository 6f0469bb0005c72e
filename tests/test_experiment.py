"""Set-up: what its cache key covers, what its ledger says, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dgal_bench.config.compose import compose
from dgal_bench.conformance import example_config
from dgal_bench.core.errors import UserError
from dgal_bench.core.seeding import rng_for
from dgal_bench.experiment import open_experiment, prepare_features_and_graph
from dgal_bench.graph import knn
from dgal_bench.graph.transition import attach, diagnostics, transition
from dgal_bench.models import vae
from dgal_bench.representation import REPRESENTATIONS, features_key, flat_pixels, label_share, principal_components
from tests.loading import load

CPU = torch.device("cpu")


def silent(what, done, of):
    pass


def data():
    return load("digits", Path("unused"), 200, 60)


@pytest.mark.parametrize(
    "override",
    ["representation.seed=1", "representation.latent_dim=5", "representation.threads=2", "representation.lr=0.1"],
)
def test_the_key_covers_the_recipe(override):
    assert features_key(example_config("random"), data(), CPU) != features_key(
        example_config("random", override), data(), CPU
    )


def test_the_key_covers_the_pixels_of_both_splits_and_not_the_labels():
    images, test_images = data().images.clone(), data().test_images.clone()
    images[0, 0, 0, 0] += 1
    test_images[0, 0, 0, 0] += 1
    key = features_key(example_config("random"), data(), CPU)
    assert features_key(example_config("random"), replace(data(), images=images), CPU) != key
    assert features_key(example_config("random"), replace(data(), test_images=test_images), CPU) != key
    assert features_key(example_config("random"), replace(data(), test_labels=data().test_labels.flip(0)), CPU) == key
    assert features_key(example_config("random"), replace(data(), labels=data().labels.flip(0)), CPU) == key
    assert (
        features_key(example_config("dgmg", "seed=3", "rounds=1"), data(), CPU) == key
    )  # shared by all strategies and seeds
    per_seed = [
        features_key(example_config("random", f"seed={s}", "representation.seed=cell"), data(), CPU) for s in (0, 1)
    ]
    assert per_seed[0] == key != per_seed[1]


def test_corrected_labels_are_judged_anew_on_the_same_latents(tmp_path):
    config, corrected = example_config("random"), replace(data(), labels=data().labels.flip(0))
    first, second = (
        prepare_features_and_graph(config, images, tmp_path, CPU, silent) for images in (data(), corrected)
    )
    shares = [setup.ledger["representation"].pop("label_share") for setup in (first, second)]
    assert first.ledger["representation"] == second.ledger["representation"]
    sample = torch.from_numpy(rng_for(0, "label share").permutation(200))
    assert shares[0] != shares[1]
    assert shares[1]["latents"] == label_share(second.features, flat_pixels, corrected.labels, sample)


def test_another_graph_reuses_the_latents(cache_root):
    first = prepare_features_and_graph(example_config("random"), data(), cache_root, CPU, silent)
    other = prepare_features_and_graph(example_config("random", "graph.graph_k=4"), data(), cache_root, CPU, silent)
    assert first.features_sha256 == other.features_sha256
    assert first.graph_sha256 != other.graph_sha256
    assert other.ledger["graph"]["graph_k"] == 4


@pytest.mark.parametrize("kind", [pytest.param("vae", marks=pytest.mark.slow), "pca", "pixels"])
def test_test_images_never_influence_the_graph(tmp_path, monkeypatch, kind):
    """Other test images, more of them and brighter: the same latents and graph to the bit, other attachments."""
    monkeypatch.setattr(vae, "MIN_EXPLAINED_VARIANCE", -1.0)  # of ten epochs, which are enough to be influenced
    brighter = replace(data(), test_images=16 - load("digits", Path("unused"), 200, 90).test_images)
    config = example_config("random", f"representation.kind={kind}", "representation.max_epochs=10")
    one, other = (prepare_features_and_graph(config, images, tmp_path, CPU, silent) for images in (data(), brighter))
    assert torch.equal(one.features, other.features)
    for name in ("indptr", "indices", "weights", "degrees"):
        assert torch.equal(getattr(one.graph, name), getattr(other.graph, name))
    assert (len(one.attachment.ids), len(other.attachment.ids)) == (60, 90)
    assert not torch.equal(one.attachment.ids, other.attachment.ids[:60])


def test_test_images_are_tied_to_the_graph_in_the_same_space(tmp_path):
    """Test images that are the pool's own: each is nearest to itself."""
    twins = replace(data(), test_images=data().images[:60], test_labels=data().labels[:60])
    for kind in ("pca", "pixels"):
        setup = prepare_features_and_graph(
            example_config("random", f"representation.kind={kind}"), twins, tmp_path, CPU, silent
        )
        assert torch.equal(setup.attachment.ids[:, 0], torch.arange(60))


def test_a_setup_from_the_cache_is_the_one_that_was_made(tmp_path):
    config = example_config("random", "representation.kind=pixels")
    made, found = (prepare_features_and_graph(config, data(), tmp_path, CPU, silent) for _ in range(2))
    pixels, test_pixels = (flat_pixels(images, 16) for images in (data().images, data().test_images))
    neighbors = knn.knn(pixels, config.graph.graph_k)
    graph, attachment = transition(neighbors), attach(neighbors, pixels, test_pixels)
    for setup in (made, found):
        assert torch.equal(setup.features, pixels)
        for name in ("indptr", "indices", "weights", "degrees"):
            assert torch.equal(getattr(setup.graph, name), getattr(graph, name))
        assert setup.graph.symmetric
        assert torch.equal(setup.attachment.ids, attachment.ids)
        assert torch.equal(setup.attachment.weights, attachment.weights)
    directed = prepare_features_and_graph(
        example_config("random", "graph.symmetrize=none"), data(), tmp_path, CPU, silent
    )
    assert not directed.graph.symmetric


def test_principal_components_keep_the_most_variance():
    features = torch.randn(300, 6) @ torch.diag(torch.tensor([5.0, 4.0, 3.0, 0.1, 0.1, 0.1]))
    reduced = principal_components(features, 3)(features)
    assert reduced.shape == (300, 3)
    singular = torch.linalg.svdvals(features - features.mean(0))
    assert torch.allclose(reduced.norm(dim=0), singular[:3], rtol=1e-4)


def test_other_points_are_projected_with_the_mean_and_the_directions_of_the_first():
    features, others = torch.randn(300, 6) + 3, torch.randn(40, 6)
    project = principal_components(features, 6)
    both = torch.cat([features, others])
    assert torch.equal(project(both)[300:], project(others))
    # All components kept: a rotation, so that distances between and within the two stay.
    assert torch.allclose(torch.pdist(project(both)), torch.pdist(both), atol=1e-4)
    assert project(features).mean(0).abs().max() < 1e-5


def test_label_share_by_brute_force():
    images = data()
    pixels = flat_pixels(images.images, images.maximum)
    distances = torch.cdist(pixels.double(), pixels.double())
    distances.fill_diagonal_(torch.inf)
    near = distances.topk(20, dim=1, largest=False).indices
    truth = (images.labels[near] == images.labels[:, None]).double().mean()
    assert label_share(pixels, flat_pixels, images.labels, torch.arange(200)) == pytest.approx(float(truth), abs=2e-3)


def test_the_ledger_says_what_it_cost_and_how_good_it_is(experiment):
    representation, graph = experiment.prepared.ledger["representation"], experiment.prepared.ledger["graph"]
    assert representation["seconds"] > 0
    assert graph["seconds"] > 0
    # What only the evaluation needs is no cost of a query's.
    assert representation["test_seconds"] > 0
    assert graph["test_seconds"] > 0
    assert set(representation["label_share"]) == {"latents", "pca", "pixels"}
    assert 0.3 < representation["label_share"]["latents"] <= 1
    assert graph["exact"]
    assert graph["n_points"] == 200


@pytest.mark.parametrize("kind", ["vae", "pca", "pixels"])
def test_an_identical_pool_is_an_error_of_the_representation(tmp_path, kind):
    same = replace(data(), images=torch.full_like(data().images, 7))
    with pytest.raises(UserError, match="all 200 images of the pool of digits are identical: no representation can"):
        prepare_features_and_graph(example_config("random", f"representation.kind={kind}"), same, tmp_path, CPU, silent)


def test_a_representation_that_tells_nothing_apart_has_no_graph(tmp_path, monkeypatch):
    monkeypatch.setitem(
        REPRESENTATIONS, "pixels", lambda data, *rest: (torch.ones(data.size, 3), lambda: torch.ones(60, 3), {})
    )
    with pytest.raises(UserError, match="all 200 images have the same representation: there is no graph"):
        prepare_features_and_graph(
            example_config("random", "representation.kind=pixels"), data(), tmp_path, CPU, silent
        )


def test_the_torch_backend_needs_no_faiss_at_all(tmp_path, monkeypatch, caplog):
    """Two packages that own its module, or none: what the messages advise must work."""
    config = example_config("random", "graph.backend=torch")
    monkeypatch.setattr("dgal_bench.graph.knn.faiss_packages", lambda: ("faiss-cpu", "faiss-gpu"))
    prepare_features_and_graph(config, data(), tmp_path / "two", CPU, silent)
    monkeypatch.setattr("dgal_bench.graph.knn.importlib.util.find_spec", lambda name: None)
    prepare_features_and_graph(config, data(), tmp_path / "none", CPU, silent)
    assert caplog.records == []


def test_nan_in_features_is_refused_with_its_count(tmp_path, monkeypatch):
    def broken(data, *rest):
        features = torch.randn(data.size, 3, generator=torch.Generator().manual_seed(0))
        features[[4, 90], 1] = torch.tensor([torch.nan, torch.inf])
        return features, lambda: features[:60], {}

    monkeypatch.setitem(REPRESENTATIONS, "pixels", broken)
    with pytest.raises(UserError, match="2 of 200 feature rows hold NaN or infinity"):
        prepare_features_and_graph(
            example_config("random", "representation.kind=pixels"), data(), tmp_path, CPU, silent
        )


def test_asking_for_a_missing_gpu_is_an_error(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="torch sees no GPU"):
        open_experiment(example_config("random", "device=cuda"), Path("unused"), tmp_path, silent)


@pytest.mark.slow
def test_the_latents_of_digits_carry_the_labels(tmp_path):
    """The line of the issue: above 0.85 under profile cpu, and that long before its 150 epochs are over."""
    choices = {"dataset": "digits", "representation": "vae", "profile": "cpu", "strategy": "random"}
    config = compose(choices, ["representation.threads=1", "representation.max_epochs=60"])
    experiment = open_experiment(config, Path("unused"), tmp_path, silent)
    facts = experiment.prepared.ledger["representation"]
    assert facts["label_share"]["latents"] > 0.85
    assert facts["active_latents"] >= 8
    assert experiment.prepared.ledger["graph"]["components"] == 1


def test_a_large_graph_is_that_of_the_approximate_search_and_told_of(tmp_path):
    config = example_config("random", "representation.kind=pixels", "graph.exact_limit=150", "graph.recall_target=0.8")
    told = []
    found = prepare_features_and_graph(config, data(), tmp_path, CPU, lambda *how: told.append(how))
    assert found.ledger["graph"]["search"].startswith("lists ")
    assert 0.8 <= found.ledger["graph"]["recall"] <= 1
    assert [how for how in told if how[0] == "neighbours"] == [("neighbours", 0, 1), ("neighbours", 1, 1)]
    whole = transition(knn.knn(found.features, config.graph.graph_k, exact_limit=150, recall_target=0.8))
    assert torch.equal(found.graph.indices, whole.indices)
    assert torch.equal(found.graph.weights, whole.weights)


@pytest.mark.parametrize(
    ("method", "exact"),
    [("tiles", True), ("faiss", True), ("lists 8/8", True), ("lists 18/8", False), ("faiss-ivf", False)],
)
def test_a_search_is_exact_by_its_method_and_not_by_a_sample_without_a_miss(method, exact):
    ring = torch.arange(1, 11)[:, None] % 10
    neighbors = knn.Neighbors(ring, torch.ones(10, 1), method, recall=1.0)
    assert diagnostics(neighbors, transition(neighbors))["exact"] is exact


@pytest.mark.parametrize("rows", [7, 150, 1000])
def test_images_are_tied_to_a_mapped_pool_a_block_at_a_time(tmp_path, monkeypatch, rows):
    """Ties among duplicates, in other blocks too, as for a pool in memory."""
    pool = torch.from_numpy(rng_for(0, "pool").normal(size=(300, 6))).float() + 20
    pool[250:255] = pool[3]
    images = torch.cat([pool[:40], pool[:20] + 0.1])
    neighbors = knn.knn(pool, 9)
    truth = attach(neighbors, pool, images)
    np.save(tmp_path / "pool.npy", pool.numpy())
    monkeypatch.setattr("dgal_bench.graph.exact_knn._BLOCK", rows * 6)
    found = attach(neighbors, torch.from_numpy(np.load(tmp_path / "pool.npy", mmap_mode="c")), images)
    assert torch.equal(found.ids, truth.ids)
    assert torch.equal(found.weights, truth.weights)
    assert truth.ids[3, :6].tolist() == [3, 250, 251, 252, 253, 254]
