"""Every data set and net of the paper's Table 1: a round of one epoch, on small files in the published formats."""

import numpy as np
import pytest
import torch
from PIL import Image

from dgal_bench.config.compose import compose
from dgal_bench.conformance import run_in_process
from dgal_bench.experiment import open_experiment
from dgal_bench.models import vae
from dgal_bench.results.reader import read_run
from tests.test_mini_imagenet import shrink
from tests.test_torchvision import CLASSES, GREY, Split, publish, server  # noqa: F401 - the fixtures

pytestmark = pytest.mark.slow

TABLE_1 = {
    "mnist": ("cnn", "cnn", 50),
    "emnist": ("resnet18", "cnn", 256),
    "svhn": ("resnet50", "cnn", 100),
    "cifar10": ("resnet50", "cnn", 100),
    "cifar100": ("vit_small", "resnet18", 100),
    "mini_imagenet": ("vit_small", "resnet18", 100),
}
"""Network, the VAE's encoder and latent_dim."""

# The preset as it is but for what profile smoke says and these: from scratch, on 32 pixels, on 24 images. The VAE
# takes a few steps, after which it is not yet a good one.
SMOKE = (
    "net.pretrained=false", "net.input_size=32", "dataset.pool_size=24", "dataset.test_size=8", "rounds=1",
    "restricted_size=10", "training.max_epochs=1", "representation.train_batch_size=4", "representation.threads=1",
    "representation.max_epochs=1",
)  # fmt: skip


def class_images(labels, shape, rng):
    """Images that a VAE can say something of: a few smooth patterns, and a little noise."""
    channels, side, _ = shape
    coarse = torch.from_numpy(rng.uniform(0, 255, (4, channels, 4, 4)))
    patterns = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").numpy()
    noise = rng.normal(0, 12, (len(labels), *shape))
    return np.clip(patterns[np.asarray(labels) % 4] + noise, 0, 255).astype(np.uint8)


def split_of(name, n, rng):
    labels = np.arange(n) % CLASSES[name]
    return Split(class_images(labels, (1, 28, 28) if name in GREY else (3, 32, 32), rng), labels)


def mini_imagenet(root, rng):
    """100 folders of 6 images: 40 different files, linked."""
    images = class_images(range(40), (3, 84, 84), rng)
    originals = []
    for number, image in enumerate(images):
        originals.append(root / f"{number}.png")
        Image.fromarray(image.transpose(1, 2, 0)).save(originals[-1])
    for label in range(100):
        folder = root / "mini_imagenet" / f"n{label:08}"
        folder.mkdir(parents=True)
        for number in range(6):
            (folder / f"n{label:08}{number:08}.png").hardlink_to(originals[(7 * label + number) % 40])
    return root


@pytest.mark.parametrize("name", TABLE_1)
def test_a_smoke_run_of_every_preset(name, tmp_path, request, monkeypatch):
    monkeypatch.setattr(vae, "MIN_EXPLAINED_VARIANCE", -1.0)
    monkeypatch.setattr(vae, "ACTIVE_VARIANCE", 0.0)
    net, encoder, latent_dim = TABLE_1[name]
    rng = np.random.default_rng(0)
    if name == "mini_imagenet":
        shrink(monkeypatch, tmp_path, n_classes=100, per_class=6, n_pool=4, n_test=2)
        root = mini_imagenet(tmp_path, rng)
    else:
        small = request.getfixturevalue("publish")(name, split_of(name, 200, rng), split_of(name, 100, rng))
        small.lay(small.archives)
        small.fetch(offline=True)
        root = small.root
    choices = {"dataset": name, "representation": "default", "profile": "smoke", "strategy": "dgmg"}
    config = compose(choices, SMOKE)
    experiment = open_experiment(config, root, tmp_path / "cache", lambda what, done, of: None)
    rows = run_in_process(experiment, tmp_path / "dgmg" / "seed-0.jsonl", config)
    assert [row.n_labeled for row in rows] == [10, 15]
    assert [row.epochs for row in rows] == [1, 1]
    assert rows[0].n_candidates == rows[0].n_scored == config.restricted_size
    header = read_run(tmp_path / "dgmg" / "seed-0.jsonl").header
    said = header["config"]
    assert header["profile"] == "smoke"
    assert (said["net"]["kind"], said["net"]["pretrained"], said["net"]["input_size"]) == (net, False, 32)
    assert (said["representation"]["encoder"], said["representation"]["latent_dim"]) == (encoder, latent_dim)
    assert (header["data"]["pool"], header["data"]["test"]) == (24, 8)
    assert len(header["data"]["classes"]) == header["data"]["n_classes"] == said["dataset"]["n_classes"]
    assert header["data"]["shape"] == list(experiment.data.image_shape)
