"""Data sets in memory, the pool's standardisation, and batches as slices."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from dgal_bench.config.compose import dataset_kinds, group_names, read_group
from dgal_bench.core.errors import ConfigError
from dgal_bench.data.datamodule import PoolDataModule, SliceLoader, Standardise, channel_statistics
from dgal_bench.data.datasets import DATASETS
from dgal_bench.data.image_data import ImageData
from dgal_bench.data.pool import Pool
from tests.loading import load


def test_digits_are_split_once_and_stratified():
    data = load("digits", Path("unused"))
    assert (len(data.images), len(data.test_images)) == (1437, 360)
    assert data.images.dtype == torch.uint8
    assert data.images.max() == data.maximum == 16
    shares = torch.bincount(data.test_labels) / torch.bincount(torch.cat([data.labels, data.test_labels]))
    assert (shares - 360 / 1797).abs().max() < 0.01
    # Together they are the original, each image once.
    both = torch.cat([data.images, data.test_images]).flatten(1).tolist()
    assert sorted(both) == sorted(load_digits().data.astype(int).tolist())


def test_a_subset_is_seeded_and_part_of_the_whole():
    whole, part = load("digits", Path("unused")), load("digits", Path("unused"), pool_size=50, test_size=20)
    assert part.images.shape == (50, 1, 8, 8)
    assert part.test_images.shape == (20, 1, 8, 8)
    assert part.sha256 == load("digits", Path("unused"), pool_size=50, test_size=20).sha256 != whole.sha256
    pairs = {
        (tuple(image.flatten().tolist()), int(label)) for image, label in zip(whole.images, whole.labels, strict=True)
    }
    assert all((tuple(i.flatten().tolist()), int(c)) in pairs for i, c in zip(part.images, part.labels, strict=True))
    with pytest.raises(ConfigError, match=r"dataset.pool_size=5000, but digits has 1437"):
        load("digits", Path("unused"), pool_size=5000)


def test_hashes_cover_what_they_name():
    data = load("digits", Path("unused"), pool_size=30, test_size=10)
    labels, images = data.labels.clone(), data.images.clone()
    labels[3] = (labels[3] + 1) % 10
    images[3, 0, 0, 0] += 1
    relabelled = ImageData("digits", data.images, labels, data.test_images, data.test_labels, 10, 16)
    redrawn = ImageData("digits", images, data.labels, data.test_images, data.test_labels, 10, 16)
    assert relabelled.sha256 != data.sha256 != redrawn.sha256
    assert relabelled.pool_sha256 == data.pool_sha256 != redrawn.pool_sha256  # made without labels


def test_every_preset_has_a_loader():
    assert dataset_kinds() == set(DATASETS)
    assert all(read_group("dataset", name).dataset.name == name for name in group_names("dataset"))


def toy(n=33, channels=3):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, 4, 5), dtype=torch.uint8, generator=rng)
    return ImageData("toy", images, torch.arange(n) % 4, images[:9], torch.arange(9) % 4, 4)


def test_standardised_pool_has_mean_0_and_deviation_1_per_channel():
    data = toy()
    pixels = data.images.double() / 255
    mean, deviation = channel_statistics(data.images, 255)
    assert torch.allclose(mean.double(), pixels.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(deviation.double(), pixels.std((0, 2, 3), correction=0), atol=1e-6)
    standard = Standardise.of_pool(data, channels_last=True)(data.images)
    assert torch.allclose(standard.double(), (pixels - mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1), atol=1e-5)


def test_a_constant_channel_is_no_division_by_zero():
    data = ImageData(
        "flat", torch.full((5, 1, 4, 4), 7, dtype=torch.uint8), torch.zeros(5), torch.zeros(0), torch.zeros(0), 2
    )
    standard = Standardise.of_pool(data, channels_last=True)
    assert torch.allclose(standard(data.images), torch.zeros(5, 1, 4, 4), atol=1e-7)
    other = torch.full((1, 1, 4, 4), 58, dtype=torch.uint8)  # what is constant in the pool may differ in the test split
    assert torch.allclose(standard(other), torch.tensor(51 / 255))


@pytest.mark.parametrize("n", [1, 2, 8, 9, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("shuffle", [True, False])
def test_slices_serve_every_point_once_and_training_never_a_batch_of_one(n, shuffle):
    data = toy()
    order = torch.Generator().manual_seed(1) if shuffle else None
    slices = SliceLoader(
        data.images, data.labels, torch.arange(40 - n, 40) % 33, 8, lambda images: images.float(), order
    )
    for _ in range(2):
        batches = list(slices)
        assert len(batches) == len(slices)
        images = torch.cat([images for images, _ in batches])
        expected = data.images[torch.arange(40 - n, 40) % 33].float()
        assert sorted(images.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())
        assert max(len(images) for images, _ in batches) <= 9
        if shuffle and n > 1:
            assert min(len(images) for images, _ in batches) > 1


def module(pool, seed=0):
    return PoolDataModule(toy(), pool, lambda images: images.float(), 8, 6, torch.Generator().manual_seed(seed))


def test_the_three_loaders():
    data = toy()
    labeled = torch.tensor([4, 9, 1])
    pool = Pool(33, 4, labeled, data.labels[labeled])
    loaders = module(pool)
    (epoch,) = loaders.train_dataloader()
    ((images, labels),) = epoch
    known = {tuple(data.images[i].float().flatten().tolist()): int(data.labels[i]) for i in labeled}
    assert {tuple(i.flatten().tolist()): int(c) for i, c in zip(images, labels, strict=True)} == known
    hidden = torch.cat([labels for _, labels in loaders.predict_dataloader()])
    assert hidden.tolist() == [-1] * 30
    served = torch.cat([images for images, _ in loaders.predict_dataloader()])
    assert torch.equal(served, data.images[pool.unlabeled].float())
    assert torch.equal(torch.cat([labels for _, labels in loaders.test_dataloader()]), data.test_labels)


def test_a_single_label_is_given_twice():
    (epoch,) = module(Pool(33, 4, torch.tensor([5]), torch.tensor([1]))).train_dataloader()
    ((images, labels),) = epoch
    assert len(images) == 2
    assert labels.tolist() == [1, 1]


def test_the_order_of_training_is_seeded_and_new_every_epoch():
    pool = Pool(33, 4, torch.arange(20), torch.arange(20) % 4)

    def epochs(seed):
        (epoch,) = module(pool, seed).train_dataloader()
        return [torch.cat([images for images, _ in epoch]).flatten().tolist() for _ in range(2)]

    first, second = epochs(0)
    assert first != second
    assert epochs(0) == [first, second] != epochs(1)
