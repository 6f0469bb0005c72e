"""A user's own images: folders of classes, with a test split of their own or a seeded one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgal_bench.core import cache
from dgal_bench.core.errors import ConfigError, DataError
from dgal_bench.data.image_data import stratified_split
from tests.loading import load


def fill(folder, values, suffix="png"):
    """An image of 3x3 for each value, which all its pixels have."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        Image.new("L", (3, 3), value).save(folder / f"{value:03}.{suffix}")


def read(path, **settings):
    return load("folder", Path("unused"), cache=path.parent / "cache", path=str(path), **settings)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "mine"


def both(root, test="test", classes=("cat", "dog")):
    for i, name in enumerate(classes):
        fill(root / "train" / name, range(50 * i, 50 * i + 6))
        fill(root / test / name, range(50 * i + 20, 50 * i + 23))


def values(images):
    return images[:, 0, 0, 0].tolist()


def refused(path, kind, *words, **settings):
    with pytest.raises(kind) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_a_train_and_a_test_folder(root):
    both(root, classes=("dog", "cat"))  # labels follow the names, not the order of making
    data = read(root)
    assert data.images.shape == (12, 1, 3, 3)
    assert data.images.dtype == torch.uint8
    assert values(data.images) == [*range(50, 56), *range(6)]
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    assert values(data.test_images) == [70, 71, 72, 20, 21, 22]
    assert data.test_labels.tolist() == [0] * 3 + [1] * 3
    assert data.labels.dtype == data.test_labels.dtype == torch.int64
    assert (data.n_classes, data.maximum) == (2, 255)
    assert data.facts == {"classes": ["cat", "dog"], "layout": "train/CLASS/*, test split test/CLASS/*"}


@pytest.mark.parametrize("name", ["val", "valid", "Test"])
def test_val_takes_the_place_of_a_missing_test(root, name):
    both(root, test=name)
    data = read(root)
    assert len(data.test_images) == 6
    assert f"test split {name}/" in data.facts["layout"]


def test_val_beside_test_is_not_used_and_that_is_said(root):
    both(root)
    fill(root / "val" / "cat", [200])
    data = read(root)
    assert values(data.test_images) == [20, 21, 22, 70, 71, 72]
    assert data.facts["layout"].endswith("val/ is not used")


def test_files_in_folders_inside_a_class(root):
    both(root)
    fill(root / "train" / "cat" / "indoors" / "asleep", [99], suffix="PNG")
    fill(root / "train" / "cat" / "outdoors", [98])
    data = read(root)
    assert data.labels.tolist() == [0] * 8 + [1] * 6
    assert {98, 99} < set(values(data.images[:8]))


def test_folders_of_classes_alone_are_split_by_class(root):
    fill(root / "a", range(10))
    fill(root / "b", range(100, 120))
    data = read(root)
    assert torch.bincount(data.test_labels).tolist() == [2, 4]
    assert torch.bincount(data.labels).tolist() == [8, 16]
    assert sorted(values(data.images) + values(data.test_images)) == [*range(10), *range(100, 120)]
    for images, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
        assert [int(value >= 100) for value in values(images)] == labels.tolist()
    assert values(data.test_images) == values(read(root).test_images)  # seeded
    assert "6 of 30 split off" in data.facts["layout"]
    assert len(read(root, test_share=0.5).test_images) == 15


def test_a_class_of_trains_is_no_split(root):
    fill(root / "bus", range(10))
    fill(root / "train", range(10))
    assert read(root).facts["classes"] == ["bus", "train"]


def test_links_are_followed(root, tmp_path):
    fill(tmp_path / "elsewhere", range(10))
    fill(root / "b", range(10))
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "again.png").symlink_to(root / "b" / "000.png")
    data = read(root, test_share=0.5)
    assert len(data.images) + len(data.test_images) == 21


def test_what_is_hidden_or_no_image_is_passed_over(root, caplog):
    both(root)
    for name in (".DS_Store", "._000.png", ".checkpoints/000.png"):
        (root / "train" / "cat" / name).parent.mkdir(exist_ok=True)
        (root / "train" / "cat" / name).write_text("hidden")
    assert len(read(root).images) == 12
    assert caplog.text == ""
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "README").write_text("no image")
    fill(root / "test", [1])  # in no class
    assert len(read(root).images) == 12
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "3 files" in record.message
    assert all(name in record.message for name in ("test/001.png", "train/README", "train/cat/notes.txt"))


def test_the_pool_and_the_test_are_parts_of_one_array(root, monkeypatch):
    fill(root / "a", range(10))
    fill(root / "b", range(10))
    data = read(root)
    assert data.images.untyped_storage().data_ptr() == data.test_images.untyped_storage().data_ptr()
    assert "memory_mapped" not in data.facts
    monkeypatch.setattr(cache, "free_memory", lambda: 0)
    again = read(root)
    assert again.facts["memory_mapped"] is True
    assert again.sha256 == data.sha256


def test_a_changed_file_is_decoded_again(root):
    both(root)
    before = read(root)
    Image.new("L", (3, 3), 255).save(root / "train" / "dog" / "052.png")
    assert values(read(root).images)[8] == 255 != values(before.images)[8]


def test_image_size(root):
    both(root)
    Image.new("RGB", (8, 5), (9, 8, 7)).save(root / "test" / "cat" / "wide.png")
    refused(root, ConfigError, "3x3 (18), 8x5 (1)", "dataset.image_size")
    assert read(root, image_size=4).images.shape == (12, 3, 4, 4)


def test_unreadable_images_are_named_by_their_paths(root):
    both(root)
    (root / "test" / "cat" / "021.png").write_bytes(b"broken")
    refused(root, DataError, "1 of 18", "test/cat/021.png", str(root))


def test_no_path():
    with pytest.raises(ConfigError, match=r"dataset\.path=DIR .*DATA_PATH=DIR"):
        load("folder", Path("unused"))


def test_a_path_that_is_no_folder(root, tmp_path):
    assert refused(root, DataError, str(root), "is not there", "train/CLASS/*").count("CLASS") == 3
    (tmp_path / "file.npz").write_text("")
    refused(tmp_path / "file.npz", DataError, "is a file", "dataset=npz")


def test_home_is_known(root, monkeypatch):
    both(root)
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(load("folder", Path("unused"), cache=root.parent / "cache", path="~/mine").images) == 12


def test_no_classes(root):
    root.mkdir()
    refused(root, DataError, "no folders of classes")
    both(root)
    (root / "test" / "cat").rename(root / "test" / ".cat")
    (root / "test" / "dog").rename(root / "test" / ".dog")
    refused(root, DataError, str(root / "test"), "no folders of classes")


def test_empty_classes(root):
    both(root)
    for i in range(7):
        (root / "train" / f"empty{i}").mkdir()
    (root / "train" / "empty0" / "a.txt").write_text("no image")
    message = refused(root, DataError, "7 class folders", "'empty0'", "...")
    assert "cat" not in message


def test_a_single_class(root):
    fill(root / "only", range(10))
    refused(root, DataError, "single class, 'only'", "dataset.path")


def test_classes_that_differ_are_named_both_ways(root):
    both(root)
    fill(root / "train" / "bird", [1])
    fill(root / "test" / "fish", [1])
    refused(root, DataError, "bird only in train/ and fish only in test/")
    (root / "test" / "fish").rename(root / "test" / "bird")
    assert read(root).n_classes == 3


def test_train_without_test(root):
    both(root)
    (root / "test").rename(root / "elsewhere")
    refused(root, DataError, "no test/", f"dataset.path={root / 'train'}")
    assert len(read(root / "train").images) > 0


def test_splits_of_other_names_are_not_taken_for_classes(root):
    both(root, test="testing")
    (root / "train").rename(root / "Training")
    refused(root, DataError, "Training, testing", "no classes")


def test_a_class_of_one_image_cannot_be_split(root):
    fill(root / "a", range(10))
    fill(root / "b", [1])
    refused(root, DataError, "class 'b'", "single example")
    both(root)  # a test split of one's own needs no second
    fill(root / "train" / "one", [1])
    fill(root / "test" / "one", [2])
    assert read(root).n_classes == 3


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_share_outside_0_and_1(root, share):
    fill(root / "a", range(10))
    fill(root / "b", range(10))
    refused(root, ConfigError, f"dataset.test_share={share}", test_share=share)


def test_a_share_that_leaves_a_class_without_an_image(root):
    fill(root / "a", range(100))
    fill(root / "b", range(4))
    refused(root, ConfigError, "dataset.test_share=0.1", "'b' of 4", "none for the test: raise", test_share=0.1)
    refused(root, ConfigError, "dataset.test_share=0.9", "'b' of 4", "none for the pool: lower", test_share=0.9)
    assert len(read(root, test_share=0.125).test_images) == 14


def test_a_folder_that_cannot_be_listed(root):
    both(root)
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "itself").symlink_to(root / "train" / "cat" / "itself")
    refused(root, DataError, "cannot be read", str(root / "train" / "cat"))


def test_a_link_to_nothing(root):
    both(root)
    (root / "train" / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    refused(root, DataError, "gone.png", "No such file")


def test_a_class_of_a_split_depends_on_its_name_and_size_alone():
    one = torch.tensor([0] * 20 + [1] * 30)
    more = torch.tensor([2] * 20 + [0] * 5 + [1] * 30 + [2] * 0)
    _, test = stratified_split(one, ["x", "y"], 0.2)
    pool, again = stratified_split(more, ["a", "y", "x"], 0.2)
    assert torch.equal(test[one[test] == 0], again[more[again] == 2])
    assert torch.equal(test[one[test] == 1] + 5, again[more[again] == 1])
    assert sorted(torch.cat([pool, again]).tolist()) == list(range(55))


def test_a_split_draws_every_member_alike():
    drawn = np.zeros(20)
    for i in range(400):
        _, test = stratified_split(torch.tensor([0] * 20), [str(i)], 0.25)
        drawn[test] += 1
    assert drawn.sum() == 400 * 5
    # 100 each on average; the deviation of a count is sqrt(400 / 4 * 3 / 4) = 8.7
    assert abs(drawn - 100).max() < 40
