"""A user's own image files: which are the pool, the test split and the classes, and what pixels they become, once."""

import errno
import os
import struct
import threading
import warnings
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dgal_bench.core import cache
from dgal_bench.core.errors import ConfigError, DataError, ResultsError
from dgal_bench.data import image_folder
from dgal_bench.data.image_data import stratified_split
from dgal_bench.data.image_folder import ImageFile, decode
from tests.loading import load, request


def fill(folder, values, suffix="png"):
    """An image of 3x3 for each value, which all its pixels have."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        Image.new("L", (3, 3), value).save(folder / f"{value:03}.{suffix}")


def read(path, **settings):
    return load("folder", Path("unused"), cache=path.parent / "cache", path=str(path), **settings)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def both(root, test="test", classes=("cat", "dog")):
    for i, name in enumerate(classes):
        fill(root / "train" / name, range(50 * i, 50 * i + 6))
        fill(root / test / name, range(50 * i + 20, 50 * i + 23))


def values(images):
    return images[:, 0, 0, 0].tolist()


# --- pool, test split, classes ----------------------------------------------------------------------------------------


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
    # both are parts of one array
    assert data.images.untyped_storage().data_ptr() == data.test_images.untyped_storage().data_ptr()


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


def test_files_in_folders_inside_a_class_are_sorted_by_path(root):
    both(root)
    fill(root / "train" / "cat" / "indoors" / "asleep", [99], suffix="PNG")
    fill(root / "train" / "cat" / "000", [98])
    data = read(root)
    assert data.labels.tolist() == [0] * 8 + [1] * 6
    assert values(data.images[:8]) == [0, 98, 1, 2, 3, 4, 5, 99]  # 000.png before 000/098.png


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


def test_links_are_followed_and_home_is_known(root, tmp_path, monkeypatch):
    fill(tmp_path / "elsewhere", range(10))
    fill(root / "b", range(10))
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "again.png").symlink_to(root / "b" / "000.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load("folder", Path("unused"), cache=tmp_path / "cache", path="~/mine", test_share=0.5)
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


def rename_splits(root):
    both(root, test="testing")
    (root / "train").rename(root / "Training")


def hide_test_classes(root):
    both(root)
    for name in ("cat", "dog"):
        (root / "test" / name).rename(root / "test" / f".{name}")


def empty_classes(root):
    both(root)
    for i in range(7):
        (root / "train" / f"empty{i}").mkdir()
    (root / "train" / "empty0" / "a.txt").write_text("no image")


def different_classes(root):
    both(root)
    fill(root / "train" / "bird", [1])
    fill(root / "test" / "fish", [1])


def no_test(root):
    both(root)
    (root / "test").rename(root / "elsewhere")


def one_alone(root):
    fill(root / "a", range(10))
    fill(root / "b", [1])


def circle(root):
    both(root)
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat")
    (root / "train" / "cat" / "itself").symlink_to(root / "train" / "cat" / "itself")


def link_to_nothing(root):
    both(root)
    (root / "train" / "cat" / "gone.png").symlink_to(root / "nowhere.png")


def another_size(root):
    both(root)
    Image.new("RGB", (8, 5), (9, 8, 7)).save(root / "test" / "cat" / "wide.png")


def broken(root):
    both(root)
    (root / "test" / "cat" / "021.png").write_bytes(b"broken")


REFUSALS = [
    (lambda root: None, DataError, ["no folders of classes"]),
    (lambda root: root.rmdir(), DataError, ["is not there", "train/CLASS/*"]),
    (lambda root: root.rmdir() or root.write_text(""), DataError, ["is a file", "dataset=npz"]),
    (hide_test_classes, DataError, ["mine/test has no folders of classes"]),
    (empty_classes, DataError, ["7 class folders", "'empty0'", "..."]),
    (lambda root: fill(root / "only", range(9)), DataError, ["single class, 'only'", "dataset.path"]),
    (different_classes, DataError, ["bird only in train/ and fish only in test/"]),
    (no_test, DataError, ["no test/", "mine/train to have dataset.test_share"]),
    (rename_splits, DataError, ["Training, testing", "no classes"]),
    (one_alone, DataError, ["class 'b'", "single example"]),
    (circle, DataError, ["mine/train/cat", "cannot be read"]),
    (link_to_nothing, DataError, ["gone.png cannot be read (No such file"]),
    (broken, DataError, ["1 of 18", "test/cat/021.png", "no image format"]),
    (another_size, ConfigError, ["3x3 (18), 8x5 (1)", "dataset.image_size"]),
]


@pytest.mark.parametrize(("make", "kind", "words"), REFUSALS)
def test_folders_that_are_refused_in_one_line(root, make, kind, words):
    make(root)
    with pytest.raises(kind) as caught:
        read(root)
    message = str(caught.value)
    assert "\n" not in message
    assert str(root) in message or kind is ConfigError or "class 'b'" in message
    assert [word for word in words if word not in message] == []


def test_no_path():
    with pytest.raises(ConfigError, match=r"dataset\.path=DIR .*DATA_PATH=DIR"):
        load("folder", Path("unused"))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_share_outside_0_and_1(share):
    with pytest.raises(ConfigError, match=rf"dataset.test_share={share}"):
        stratified_split(torch.tensor([0, 0, 1, 1]), ["a", "b"], share)


def test_a_share_that_leaves_a_class_without_an_image():
    labels = torch.tensor([0] * 100 + [1] * 4)
    for share, words in ((0.1, "none for the test: raise"), (0.9, "none for the pool: lower")):
        with pytest.raises(ConfigError, match=rf"dataset.test_share={share} leaves class 'b' of 4 examples {words}"):
            stratified_split(labels, ["a", "b"], share)
    assert len(stratified_split(labels, ["a", "b"], 0.125)[1]) == 14


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


# --- pixels -----------------------------------------------------------------------------------------------------------


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def decoded(root, progress=lambda what, done, of: None, **settings):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    listed = [ImageFile(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return decode(request("folder", root, cache=root.parent / "cache", progress=progress, **settings), root, listed)[0]


def save(root, name, image, **options):
    image.save(root / name, **options)


def test_grey_images_have_one_channel_and_their_own_values(root):
    pixels = noise(4, 5, 6)
    for i, name in enumerate(("a.png", "b.bmp", "c.pgm", "d.tif")):
        save(root, name, Image.fromarray(pixels[i]))
    assert decoded(root).tolist() == pixels[:, None].tolist()


def test_one_coloured_image_makes_them_all_three_channels(root):
    grey, colour = noise(5, 6), noise(5, 6, 3)
    save(root, "a.png", Image.fromarray(grey))
    save(root, "b.png", Image.fromarray(colour))
    images = decoded(root)
    assert images.shape == (2, 3, 5, 6)
    assert images[0].tolist() == [grey.tolist()] * 3
    assert images[1].permute(1, 2, 0).tolist() == colour.tolist()


def test_palettes_are_grey_where_all_their_colours_are(root):
    pixels = noise(5, 6)
    image = Image.fromarray(pixels).convert("P")
    image.putpalette([255 - level for level in range(256) for _ in range(3)])
    save(root, "a.png", image)
    assert decoded(root).tolist() == [[(255 - pixels).tolist()]]
    image.putpalette([level if channel else 0 for level in range(256) for channel in range(3)])
    save(root, "b.png", image)
    assert decoded(root)[1].tolist() == [np.zeros_like(pixels).tolist(), pixels.tolist(), pixels.tolist()]


def test_what_is_transparent_lies_on_white(root):
    rgba = noise(4, 4, 4)
    rgba[..., 3] = [0, 255, 0, 255]
    save(root, "a.png", Image.fromarray(rgba))
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    palette.putpalette([40, 50, 60] * 256)
    save(root, "b.png", palette, transparency=bytes([0] * 4 + [255] * 12))
    solid, clear = decoded(root)[0].permute(1, 2, 0), decoded(root)[1].permute(1, 2, 0)
    assert solid[:, [1, 3]].tolist() == rgba[:, [1, 3], :3].tolist()
    assert solid[:, [0, 2]].unique().tolist() == [255]
    assert clear[0].unique().tolist() == [255]
    assert clear[1:].reshape(-1, 3).unique(dim=0).tolist() == [[40, 50, 60]]


def test_grey_with_transparency_stays_grey(root):
    save(root, "a.png", Image.fromarray(np.array([[[10, 0], [20, 255]]], dtype=np.uint8)))
    with Image.open(root / "a.png") as image:
        assert image.mode == "LA"
    assert decoded(root).tolist() == [[[[255, 20]]]]


def test_cmyk_and_one_bit(root):
    save(root, "a.tif", Image.new("CMYK", (2, 1), (255, 0, 0, 0)))
    save(root, "b.png", Image.fromarray(np.array([[True, False]])))
    assert decoded(root)[:, :, 0].tolist() == [[[0, 0], [255, 255], [255, 255]], [[255, 0]] * 3]


def deep_colours(path):
    """A PNG of RGB with 16 bits a channel, which PIL does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress((b"\0" + bytes(range(12))) * 2)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.png", lambda path: Image.fromarray(np.array([[0, 0xFFFF]], dtype=np.uint16)).save(path)),
        ("a.tif", lambda path: Image.fromarray(np.array([[0, 0xFFFF]], dtype=np.uint16)).save(path)),
        ("a.pgm", lambda path: path.write_bytes(b"P5 2 1 65535\n" + bytes([0, 1, 2, 3]))),
        ("b.tif", lambda path: Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)).save(path)),
        ("c.tif", lambda path: Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(path)),
        ("b.png", deep_colours),
    ],
)
def test_more_than_eight_bits_are_refused(root, name, write):
    write(root / name)
    with pytest.raises(DataError, match=rf"1 of 1 .*: {name} \(pixels of more than 8 bits: save them with 8"):
        decoded(root)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_photographs_are_turned_upright(root, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    save(root, f"a.{suffix}", Image.fromarray(noise(4, 6, 3)), exif=exif, **options)
    with Image.open(root / f"a.{suffix}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert decoded(root)[0].permute(1, 2, 0).tolist() == expected.tolist()
    assert (expected.shape[:2] == (6, 4)) == (orientation > 4)


def test_broken_metadata_are_no_broken_image(root):
    pixels = noise(4, 4, 3)
    save(root, "a.png", Image.fromarray(pixels), exif=b"Exif\0\0no metadata at all")
    assert decoded(root)[0].permute(1, 2, 0).tolist() == pixels.tolist()


@pytest.mark.parametrize("shape", [(40, 20, 3), (20, 40, 3), (20, 40), (5, 7, 3), (16, 16, 3)])
def test_image_size_crops_to_the_centre_and_resizes(root, shape):
    image = Image.fromarray(noise(*shape))
    save(root, "a.png", image)
    expected = np.atleast_3d(np.asarray(ImageOps.fit(image, (16, 16), Image.Resampling.BICUBIC)))
    assert decoded(root, image_size=16)[0].permute(1, 2, 0).tolist() == expected.tolist()


def test_jpegs_are_what_pil_makes_of_them(root):
    for i in range(5):
        save(root, f"{i}.JPG", Image.fromarray(noise(9, 7, 3, seed=i)), quality=90)
    images = decoded(root).permute(0, 2, 3, 1)
    for i in range(5):
        with Image.open(root / f"{i}.JPG") as image:
            assert images[i].tolist() == np.asarray(image).tolist()


def test_several_sizes_need_image_size(root):
    for i, (width, height) in enumerate([(4, 5)] * 3 + [(6, 5)] * 4 + [(2, 2), (3, 3), (3, 3)]):
        save(root, f"{i}.png", Image.new("RGB", (width, height)))
    with pytest.raises(ConfigError, match=r"10 images .* 4 sizes: 6x5 \(4\), 4x5 \(3\), 3x3 \(2\), ...; set dataset"):
        decoded(root)
    assert list((root.parent / "cache").iterdir()) == []
    assert decoded(root, image_size=3).shape == (10, 3, 3, 3)


def test_files_that_cannot_be_read_are_counted_and_named_and_nothing_stays(root):
    for i in range(6):
        save(root, f"{i}.png", Image.fromarray(noise(20, 20, 3, seed=i)))
    whole = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "2.png").write_bytes(b"")
    (root / "4.jpg").write_text("no image")
    (root / "5.png").write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 0xFF]) + whole[-9:])
    with pytest.raises(DataError) as caught:
        decoded(root)
    message = str(caught.value)
    assert "4 of 7 image files" in message
    assert all(f"{name} (" in message for name in ("1.png", "2.png", "4.jpg", "5.png"))
    assert "\n" not in message
    assert list((root.parent / "cache").iterdir()) == []
    for name in ("1.png", "2.png", "4.jpg", "5.png"):
        (root / name).unlink()
    assert len(decoded(root)) == 3


def test_no_warning_escapes(root, recwarn):
    save(root, "a.png", Image.new("P", (4, 4)), transparency=bytes([7] * 5))
    exif = Image.Exif()
    exif[0x0112] = 1
    save(root, "b.jpg", Image.new("RGB", (4, 4)), exif=exif.tobytes()[:-4])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert len(decoded(root)) == 2
    assert list(recwarn) == []


# --- decoded once -----------------------------------------------------------------------------------------------------


def test_decoded_once_until_a_file_changes(root):
    events = []

    def again(**settings):
        events.clear()
        return decoded(root, progress=lambda *event: events.append(event), **settings)

    save(root, "a.png", Image.fromarray(noise(4, 4)))
    save(root, "b.png", Image.fromarray(noise(4, 4, seed=1)))
    first = again()
    assert events == [("looking at image files (%)", 100, 100), ("decoding (%)", 100, 100)]
    assert torch.equal(again(), first)
    assert events == []

    content, stat = (root / "b.png").read_bytes(), (root / "b.png").stat()
    save(root, "b.png", Image.fromarray(noise(4, 4, seed=2)))
    assert again()[1, 0].tolist() == noise(4, 4, seed=2).tolist()
    (root / "b.png").write_bytes(content)
    os.utime(root / "b.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(again(), first)
    assert events == []  # the very same file as before
    os.utime(root / "b.png", ns=(0, 0))
    assert torch.equal(again(), first)
    assert events != []
    again(image_size=3)
    assert events != []


def test_two_folders_of_bitmaps_with_the_same_names_sizes_and_times_are_told_apart(tmp_path):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        for i in range(40):
            Image.fromarray(noise(4, 4, seed=seed * 40 + i)).save(path := tmp_path / str(seed) / f"{i}.bmp")
            os.utime(path, ns=(0, 0))
    assert not torch.equal(decoded(tmp_path / "0"), decoded(tmp_path / "1"))


def test_progress_is_told_a_hundred_times_at_most_and_ends(root):
    for i in range(130):
        save(root, f"{i:03}.pgm", Image.new("L", (2, 2)))
    events = []
    decoded(root, progress=lambda what, done, of: events.append((what, done)))
    for what in ("looking at image files (%)", "decoding (%)"):
        done = [share for name, share in events if name == what]
        assert done == sorted(set(done))
        assert (len(done), done[-1]) == (5, 100)  # by 32 files


def test_too_many_for_memory_are_mapped(root, monkeypatch, tmp_path):
    both(root)
    monkeypatch.chdir(tmp_path)  # the cache may be a relative path
    whole = load("folder", root, cache=Path("here"), path=str(root))
    assert "memory_mapped" not in whole.facts
    monkeypatch.setattr(cache, "free_memory", lambda: 0)
    mapped = load("folder", root, cache=Path("here"), path=str(root))
    assert mapped.facts["memory_mapped"] is True
    assert mapped.sha256 == whole.sha256


@pytest.mark.parametrize("when", ["before", "while it is made"])
def test_a_disk_without_room_is_said_before_anything_is_written(root, monkeypatch, when):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(root, "a.png", Image.fromarray(noise(4, 4)))
    if when == "before":
        monkeypatch.setattr(image_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=15))
    else:
        monkeypatch.setattr(image_folder.os, "posix_fallocate", refuse)
    with pytest.raises(ResultsError, match=r"GB free, but images \(1, 1, 4, 4\) needs .*No space left.*cache=DIR"):
        decoded(root)
    assert list((root.parent / "cache").iterdir()) == []


def test_an_interruption_stops_the_threads_and_leaves_nothing(root):
    for i in range(100):
        save(root, f"{i:03}.pgm", Image.fromarray(noise(2, 2, seed=i)))
    calls = Counter()

    def interrupt(what, done, of):
        calls[what] += 1
        if what.startswith("decoding"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoded(root, progress=interrupt)
    assert calls["decoding (%)"] == 1
    left = [thread for thread in threading.enumerate() if not thread.daemon]  # a progress bar's monitor is one
    assert left == [threading.main_thread()]
    assert list((root.parent / "cache").iterdir()) == []


def test_a_million_images_need_not_fit_in_memory(root, monkeypatch):
    """What is decoded goes into a file: no more pixels are alive at a time than the threads are at work on."""
    for i in range(100):
        save(root, f"{i:03}.pgm", Image.fromarray(noise(8, 8, seed=i)))
    alive, most, lock = Counter(), Counter(), threading.Lock()
    honest = image_folder.pixels

    class Counted(np.ndarray):
        def __del__(self):
            if type(self.base) is not Counted:
                with lock:
                    alive["now"] -= 1

    def counted(*arguments):
        pixels = honest(*arguments).view(Counted)
        with lock:
            alive["now"] += 1
            most["ever"] = max(most["ever"], alive["now"])
        return pixels

    monkeypatch.setattr(image_folder, "pixels", counted)
    assert decoded(root)[99, 0].tolist() == noise(8, 8, seed=99).tolist()
    assert 1 <= most["ever"] <= os.cpu_count()
