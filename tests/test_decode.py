"""Image files become the pixels that are seen, once, and nothing half stays in the cache."""

import errno
import os
import threading
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dgal_bench.core import cache
from dgal_bench.core.errors import ConfigError, DataError, ResultsError
from dgal_bench.data import image_folder as decoding
from dgal_bench.data.image_folder import ImageFile, StepProgress, decode
from tests.loading import request


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def listed(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [ImageFile(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def decoded(root, progress=lambda what, done, of: None, **settings):
    asked = request("folder", root, cache=root.parent / "cache", progress=progress, **settings)
    return decode(asked, root, listed(root)).images


def save(root, name, image, **options):
    image.save(root / name, **options)


def test_grey_images_have_one_channel_and_their_own_values(root):
    values = noise(4, 5, 6)
    for i, name in enumerate(("a.png", "b.bmp", "c.pgm", "d.tif")):
        save(root, name, Image.fromarray(values[i]))
    assert decoded(root).tolist() == values[:, None].tolist()


def test_one_coloured_image_makes_them_all_three_channels(root):
    grey, colour = noise(5, 6), noise(5, 6, 3)
    save(root, "a.png", Image.fromarray(grey))
    save(root, "b.png", Image.fromarray(colour))
    images = decoded(root)
    assert images.shape == (2, 3, 5, 6)
    assert images[0].tolist() == [grey.tolist()] * 3
    assert images[1].permute(1, 2, 0).tolist() == colour.tolist()


def test_palettes_are_grey_where_all_their_colours_are(root):
    values = noise(5, 6)
    image = Image.fromarray(values).convert("P")
    image.putpalette([255 - level for level in range(256) for _ in range(3)])
    save(root, "a.png", image)
    assert decoded(root).tolist() == [[(255 - values).tolist()]]
    image.putpalette([level if channel else 0 for level in range(256) for channel in range(3)])
    save(root, "b.png", image)
    assert decoded(root)[1].tolist() == [np.zeros_like(values).tolist(), values.tolist(), values.tolist()]


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
    values = np.array([[[10, 0], [20, 255]]], dtype=np.uint8)
    save(root, "a.png", Image.fromarray(values))
    with Image.open(root / "a.png") as image:
        assert image.mode == "LA"
    assert decoded(root).tolist() == [[[[255, 20]]]]


def test_cmyk_and_one_bit(root):
    save(root, "a.tif", Image.new("CMYK", (2, 1), (255, 0, 0, 0)))
    save(root, "b.png", Image.fromarray(np.array([[True, False]])))
    assert decoded(root)[:, :, 0].tolist() == [[[0, 0], [255, 255], [255, 255]], [[255, 0]] * 3]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_of_sixteen_bits_the_upper_eight_are_kept(root, suffix):
    deep = np.array([[0, 255, 256], [0x7FFF, 0xFF00, 0xFFFF]], dtype=np.uint16)
    if suffix == "pgm":
        (root / "a.pgm").write_bytes(b"P5 3 2 65535\n" + deep.astype(">u2").tobytes())
    else:
        save(root, f"a.{suffix}", Image.fromarray(deep))
    assert decoded(root).tolist() == [[[[0, 0, 1], [0x7F, 0xFF, 0xFF]]]]


@pytest.mark.parametrize("values", [np.full((2, 2), 70_000, dtype=np.int32), np.zeros((2, 2), dtype=np.float32)])
def test_values_whose_white_is_unknown_are_refused(root, values):
    save(root, "a.tif", Image.fromarray(values))
    with pytest.raises(DataError, match=r"a\.tif \(pixels .*8 or 16"):
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
    values = noise(4, 4, 3)
    save(root, "a.png", Image.fromarray(values), exif=b"Exif\0\0no metadata at all")
    assert decoded(root)[0].permute(1, 2, 0).tolist() == values.tolist()


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
    with pytest.raises(ConfigError) as caught:
        decoded(root)
    assert "10 images" in str(caught.value)
    assert "4 sizes: 6x5 (4), 4x5 (3), 3x3 (2), ...; set dataset.image_size=S" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((root.parent / "cache").iterdir()) == []
    assert decoded(root, image_size=3).shape == (10, 3, 3, 3)


def test_files_that_cannot_be_read_are_counted_and_named_and_nothing_stays(root):
    for i in range(6):
        save(root, f"{i}.png", Image.fromarray(noise(20, 20, 3, seed=i)))
    whole = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "2.png").write_bytes(b"")
    (root / "4.jpg").write_text("no image")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    (root / "5.png").write_bytes(damaged)
    with pytest.raises(DataError) as caught:
        decoded(root)
    message = str(caught.value)
    assert "4 of 7 image files" in message
    assert all(f"{name} (" in message for name in ("1.png", "2.png", "4.jpg"))
    assert "no image format that PIL knows" in message
    assert "5.png" not in message
    assert "..." in message
    assert "\n" not in message
    assert list((root.parent / "cache").iterdir()) == []
    for name in ("1.png", "2.png", "4.jpg", "5.png"):
        (root / name).unlink()
    assert len(decoded(root)) == 3


def test_unreadable_files_alone(root):
    (root / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="1 of 1 image files"):
        decoded(root)


def test_no_warning_escapes(root, recwarn):
    palette = Image.new("P", (4, 4))
    save(root, "a.png", palette, transparency=bytes([7] * 5))
    exif = Image.Exif()
    exif[0x0112] = 1
    save(root, "b.jpg", Image.new("RGB", (4, 4)), exif=exif.tobytes()[:-4])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert len(decoded(root)) == 2
    assert list(recwarn) == []


def test_decoded_once_until_a_file_changes(root):
    told = []
    save(root, "a.png", Image.fromarray(noise(4, 4)))
    save(root, "b.png", Image.fromarray(noise(4, 4, seed=1)))
    first = decoded(root, progress=lambda *word: told.append(word))
    assert told[-1] == ("decoding", 2, 2)
    told.clear()
    assert torch.equal(decoded(root, progress=lambda *word: told.append(word)), first)
    assert told == []

    content, stat = (root / "b.png").read_bytes(), (root / "b.png").stat()
    save(root, "b.png", Image.fromarray(noise(4, 4, seed=2)))
    assert decoded(root)[1, 0].tolist() == noise(4, 4, seed=2).tolist()
    (root / "b.png").write_bytes(content)
    os.utime(root / "b.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(decoded(root, progress=lambda *word: told.append(word)), first)
    assert told == []  # the very same file as before
    os.utime(root / "b.png", ns=(0, 0))
    assert torch.equal(decoded(root, progress=lambda *word: told.append(word)), first)
    assert told != []
    told.clear()
    decoded(root, image_size=3, progress=lambda *word: told.append(word))
    assert told != []


def test_two_folders_of_bitmaps_with_the_same_names_sizes_and_times_are_told_apart(tmp_path):
    for seed in (0, 1):
        (tmp_path / str(seed) / "images").mkdir(parents=True)
        for i in range(40):
            path = tmp_path / str(seed) / "images" / f"{i}.bmp"
            Image.fromarray(noise(4, 4, seed=seed * 40 + i)).save(path)
            os.utime(path, ns=(0, 0))
    asked = request("folder", tmp_path, cache=tmp_path / "cache")
    first, second = (decode(asked, root, listed(root)).images for root in (tmp_path / "0", tmp_path / "1"))
    assert not torch.equal(first, second)


def test_a_relative_cache_folder(root, monkeypatch, tmp_path):
    save(root, "a.png", Image.fromarray(noise(4, 4)))
    monkeypatch.chdir(tmp_path)
    asked = request("folder", root, cache=Path("here"))
    assert decode(asked, root, listed(root)).images[0, 0].tolist() == noise(4, 4).tolist()
    assert list((tmp_path / "here").glob("*/images.npy"))


def test_too_many_for_memory_are_mapped(root, monkeypatch):
    save(root, "a.png", Image.fromarray(noise(4, 4)))
    asked = request("folder", root, cache=root.parent / "cache")
    assert not decode(asked, root, listed(root)).mapped
    monkeypatch.setattr(cache, "free_memory", lambda: 0)
    again = decode(asked, root, listed(root))
    assert again.mapped
    assert again.images[0, 0].tolist() == noise(4, 4).tolist()


@pytest.mark.parametrize("when", ["before", "while it is made"])
def test_a_disk_without_room_is_said_before_anything_is_written(root, monkeypatch, when):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(root, "a.png", Image.fromarray(noise(4, 4)))
    if when == "before":
        monkeypatch.setattr(decoding.shutil, "disk_usage", lambda path: SimpleNamespace(free=15))
    else:
        monkeypatch.setattr(decoding.os, "posix_fallocate", refuse)
    with pytest.raises(ResultsError, match=r"GB free, but images \(1, 1, 4, 4\) needs .*cache=DIR"):
        decoded(root)
    assert list((root.parent / "cache").iterdir()) == []


def test_progress_is_told_some_hundred_times_at_most_and_at_every_fifth():
    for n, piece in [(1, 1), (4, 1), (99, 1), (500, 5), (1234, 12), (60_001, 32), (1_000_003, 32)]:
        told = []
        tell = StepProgress("decoding", n, lambda what, done, of: told.append(done))  # noqa: B023
        assert piece <= tell.step
        for start in range(0, n, piece):
            tell(min(piece, n - start))
        assert len(told) < 250
        assert told[-1] == n
        assert told == sorted(set(told))
        assert {fifth * max(1, n // 5) for fifth in range(1, 5) if fifth * max(1, n // 5) <= n} <= set(told)


def test_an_interruption_stops_the_threads_and_leaves_nothing(root, monkeypatch):
    for i in range(300):
        save(root, f"{i:03}.pgm", Image.fromarray(noise(2, 2, seed=i)))
    calls = Counter()

    def interrupt(what, done, of):
        calls[what] += 1
        if what == "decoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoded(root, progress=interrupt)
    assert calls["decoding"] == 1
    assert threading.enumerate() == [threading.main_thread()]
    assert list((root.parent / "cache").iterdir()) == []


def test_a_million_images_need_not_fit_in_memory(root, monkeypatch):
    """What is decoded goes into a file: no more pixels are alive at a time than the threads are at work on."""
    for i in range(400):
        save(root, f"{i:03}.pgm", Image.fromarray(noise(8, 8, seed=i)))
    alive, most, lock = Counter(), Counter(), threading.Lock()
    honest = decoding.pixels

    class Counted(np.ndarray):
        def __del__(self):
            if type(self.base) is not Counted:
                with lock:
                    alive["now"] -= 1

    def counted(*arguments):
        values = honest(*arguments).view(Counted)
        with lock:
            alive["now"] += 1
            most["ever"] = max(most["ever"], alive["now"])
        return values

    monkeypatch.setattr(decoding, "pixels", counted)
    images = decoded(root)
    assert images[399, 0].tolist() == noise(8, 8, seed=399).tolist()
    assert 1 <= most["ever"] <= os.cpu_count()
