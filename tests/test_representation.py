"""Representations by name: brute-force truths of each, and what a user's own embeddings can get wrong."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from dgal_bench import representation as features
from dgal_bench.conformance import example_config, run_in_process
from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.data.image_data import Subset
from dgal_bench.experiment import open_experiment, prepare_features_and_graph
from dgal_bench.representation import REPRESENTATIONS, content_key, features_key, flat_pixels, principal_components
from tests.loading import load
from tests.test_backbones import weights_file

CPU = torch.device("cpu")


def silent(what, done, of):
    pass


def data():
    return load("digits", Path("unused"), 200, 60)


@pytest.fixture
def embeddings(tmp_path):
    """Random embeddings of the practice pool and test split, and their files."""
    rng = np.random.default_rng(0)
    arrays = {"path": rng.normal(size=(200, 7)), "test_path": rng.normal(size=(60, 7))}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path, arrays


def npy(folder, *overrides, test=True):
    given = [f"representation.path={folder}/path.npy"]
    given += [f"representation.test_path={folder}/test_path.npy"] if test else []
    return example_config("dgmg", "representation.kind=npy", *given, *overrides)


def test_ones_own_embeddings_are_the_latents(embeddings, cache_root):
    folder, arrays = embeddings
    config = npy(folder)
    setup = prepare_features_and_graph(config, data(), cache_root, CPU, silent)
    assert np.array_equal(setup.features.numpy(), arrays["path"].astype(np.float32))
    assert setup.ledger["representation"]["kind"] == "npy"
    near = torch.cdist(torch.tensor(arrays["test_path"]), torch.tensor(arrays["path"])).argmin(1)
    assert torch.equal(setup.attachment.ids[:, 0], near)


def test_without_embeddings_of_the_test_images_nothing_is_propagated_to_them(embeddings, tmp_path):
    config = npy(embeddings[0], test=False)
    experiment = open_experiment(config, Path("unused"), tmp_path / "cache", silent)
    assert experiment.prepared.attachment is None
    rows = run_in_process(experiment, tmp_path / "seed-0.jsonl", config)
    assert [row.propagated for row in rows] == [None] * 3
    assert all(len(row.indices) == 5 for row in rows[:-1])


def test_the_cache_knows_embeddings_by_their_content_not_by_their_place(embeddings, tmp_path):
    folder, arrays = embeddings
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, array in arrays.items():
        np.save(elsewhere / f"{name}.npy", array)
    key = features_key(npy(folder), data(), CPU)
    assert features_key(npy(elsewhere), data(), CPU) == key
    assert npy(elsewhere).hash == npy(folder).hash
    assert features_key(npy(folder, test=False), data(), CPU) != key
    np.save(elsewhere / "path.npy", arrays["path"] + 1)
    assert features_key(npy(elsewhere), data(), CPU) != key


def test_embeddings_of_the_whole_set_serve_its_subset(embeddings):
    folder, arrays = embeddings
    positions = torch.tensor([3, 50, 51, 199])
    part = replace(data(), images=data().images[positions], subset=Subset(positions, of=200))
    latents, _, _ = REPRESENTATIONS["npy"](part, npy(folder), CPU, silent)
    assert np.array_equal(latents.numpy(), arrays["path"][[3, 50, 51, 199]].astype(np.float32))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux where memory lies")
@pytest.mark.parametrize(("dtype", "whole", "mapped"), [("<f4", 1, True), ("<f4", 0, False), ("<f8", 1, False)])
def test_embeddings_too_large_for_memory_stay_on_disk(tmp_path, monkeypatch, dtype, whole, mapped):
    """As far as they can be used as they are; written to, the file stays as it is."""
    monkeypatch.setattr(features, "free_memory", lambda: 100)
    rows = np.random.default_rng(0).normal(size=(200, 7)).astype(dtype)
    np.save(tmp_path / "path.npy", rows)
    positions = torch.arange(0, 200, 1 if whole else 2)
    part = replace(data(), images=data().images[positions], subset=Subset(positions, of=200))
    latents, _, _ = REPRESENTATIONS["npy"](part, npy(tmp_path, test=False), CPU, silent)
    assert np.array_equal(latents.numpy(), rows[positions].astype(np.float32))
    maps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "path.npy" in line]
    bounds = [[int(end, 16) for end in each.split("-")] for each in maps]
    assert any(first <= latents.data_ptr() < last for first, last in bounds) == mapped
    latents[:] = 0
    assert np.array_equal(np.load(tmp_path / "path.npy"), rows)


def test_embeddings_of_a_set_that_was_split_hold_both_parts_in_its_order(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (90, 8, 8), dtype=np.uint8), np.arange(90) % 3
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    embeddings = images.reshape(90, -1)[:, :5].astype(np.float32)  # so that one can tell whose they are
    np.save(tmp_path / "path.npy", embeddings)
    whole = load("npz", Path("unused"), path=str(tmp_path / "set.npz"), cache=tmp_path / "cache")
    for sizes in ({}, {"pool_size": 20, "test_size": 7}):
        part = load("npz", Path("unused"), path=str(tmp_path / "set.npz"), cache=tmp_path / "cache", **sizes)
        latents, make_test, _ = REPRESENTATIONS["npy"](part, npy(tmp_path, test=False), CPU, silent)
        assert torch.equal(latents, part.images.flatten(1)[:, :5].float())
        assert torch.equal(make_test(), part.test_images.flatten(1)[:, :5].float())
    both = torch.cat([whole.subset.positions, whole.test_subset.positions])
    assert torch.equal(both.sort().values, torch.arange(90))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((199, 7)), "path.npy has 199 rows where the data set has 200 images (1,437 before they"),
        (np.zeros((200, 7), dtype=np.int64), "path.npy holds (200, 7) int64, not (N, d) floats"),
        (np.zeros((200, 7, 2)), "path.npy holds (200, 7, 2) float64, not (N, d) floats"),
        (np.array([["a"] * 7] * 200, dtype=object), "path.npy is no .npy file of numbers"),
    ],
    ids=["another length", "integers", "three axes", "pickled objects"],
)
def test_embeddings_that_do_not_fit_are_one_line(embeddings, array, message):
    folder, _ = embeddings
    np.save(folder / "path.npy", array)
    with pytest.raises(ConfigError) as caught:
        REPRESENTATIONS["npy"](data(), npy(folder), CPU, silent)
    assert message in str(caught.value)
    assert f"representation.path={folder}/path.npy" in str(caught.value)


def test_nan_in_embeddings_is_refused_with_its_count(embeddings):
    folder, arrays = embeddings
    arrays["path"][[4, 90], 1] = np.nan, np.inf
    np.save(folder / "path.npy", arrays["path"])
    with pytest.raises(ConfigError, match="2 of 200 rows hold NaN or infinity"):
        REPRESENTATIONS["npy"](data(), npy(folder), CPU, silent)
    arrays["test_path"][:, 0] = np.nan
    np.save(folder / "test_path.npy", arrays["test_path"])
    np.save(folder / "path.npy", np.zeros((200, 7)))
    _, make_test, _ = REPRESENTATIONS["npy"](data(), npy(folder), CPU, silent)
    with pytest.raises(ConfigError, match=r"representation.test_path=.*: 60 of 60 rows hold NaN"):
        make_test()


def test_missing_and_damaged_files_of_embeddings_are_one_line(embeddings):
    folder, _ = embeddings
    raw = (folder / "path.npy").read_bytes()
    for content in (b"", raw[:200], b"rubbish", raw[:60]):
        (folder / "path.npy").write_bytes(content)
        with pytest.raises(ConfigError, match=r"representation.path=.* is no .npy file of numbers"):
            REPRESENTATIONS["npy"](data(), npy(folder), CPU, silent)
    (folder / "path.npy").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        content_key(data(), npy(folder).representation)


def test_what_a_representation_needs_is_said_before_anything_runs():
    with pytest.raises(ConfigError, match=re.escape("needs your embeddings: representation.path=FILE.npy")):
        example_config("random", "representation.kind=npy")
    with pytest.raises(ConfigError, match=re.escape("needs the name of a network: representation.model=resnet18")):
        example_config("random", "representation.kind=timm")
    with pytest.raises(ConfigError, match=r"unknown representation.model 'resnet81'; did you mean"):
        example_config("random", "representation.kind=timm", "representation.model=resnet81")


def frozen(path, *overrides):
    return example_config(
        "dgmg", "representation.kind=timm", "representation.model=resnet18", "representation.input_size=32",
        f"representation.checkpoint_path={path}", *overrides,
    )  # fmt: skip


@pytest.mark.slow
def test_features_of_a_frozen_network_are_its_pooled_ones_on_its_own_scale(tmp_path):
    path, state = weights_file(tmp_path)
    few = replace(data(), images=data().images[:150], labels=data().labels[:150])
    told = []
    latents, make_test, _ = REPRESENTATIONS["timm"](few, frozen(path), CPU, lambda *what: told.append(what))
    net = timm.create_model("resnet18", num_classes=0).eval()
    net.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        pixels = (few.images[:5].float() / 16).expand(-1, 3, -1, -1)
        images = torch.nn.functional.interpolate((pixels - mean) / deviation, (32, 32), mode="bilinear", antialias=True)
        truth = net(images)
    assert latents.shape == (150, 512)
    assert torch.allclose(latents[:5], truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))
    assert make_test().shape == (60, 512)
    assert told[:2] == [("features of resnet18", 0, 150), ("features of resnet18", 128, 150)]


@pytest.mark.slow
def test_the_cache_knows_a_frozen_network_by_its_weights(tmp_path):
    path, _ = weights_file(tmp_path)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    key = features_key(frozen(path), data(), CPU)
    assert features_key(frozen(copy), data(), CPU) == key
    other, _ = weights_file(tmp_path / "..", kind="pth")
    assert features_key(frozen(other), data(), CPU) == key
    assert features_key(frozen(path, "representation.input_size=48"), data(), CPU) != key


def test_subspace_iteration_finds_what_the_whole_covariance_does(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(400, 30, generator=rng) * torch.linspace(5, 0.1, 30) + 2
    exact = principal_components(points, 6)(points)
    monkeypatch.setattr(features, "_EXACT_WIDTH", 10)
    monkeypatch.setattr(features, "SPARE", 5)
    found = principal_components(points, 6)(points)
    assert torch.allclose(found.var(0), exact.var(0), rtol=1e-4)  # the same variance in each direction
    distances, truth = torch.pdist(found), torch.pdist(exact)
    assert (distances - truth).abs().mean() < 0.01 * truth.mean()


def test_components_do_not_depend_on_the_size_of_a_block(monkeypatch):
    images = data()
    whole = principal_components(images.images, 5, images.maximum)(images.images)
    monkeypatch.setattr(features, "BLOCK", 64 * 7)
    blocks = principal_components(images.images, 5, images.maximum)(images.images)
    assert torch.allclose(whole.abs(), blocks.abs(), atol=1e-5)
    pixels = flat_pixels(images.images, images.maximum)
    assert torch.allclose(principal_components(pixels, 5)(pixels).abs(), whole.abs(), atol=1e-5)
