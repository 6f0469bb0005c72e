"""The pixels of one image file, whatever it is: grey or RGB, upright, eight bits, opaque."""

import struct
import zlib
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

RESIZE = Image.Resampling.BICUBIC
"""The filter of image_size; PIL widens it where it shrinks, so that nothing is aliased."""

# What PIL raises for a damaged file: besides its own errors, whatever its parsers trip over.
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


def is_grey(image: Image.Image) -> bool:
    """Whether one channel holds all of it; a palette's colours are looked at, and for that the file is read whole."""
    if image.mode in ("P", "PA"):
        red, green, blue = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3).T
        return bool((red == green).all() and (green == blue).all())
    return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")


# EXIF's orientations 2 to 8; the last four exchange width and height.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """1 to 8; broken metadata do not make an image unreadable. Of TIFF, PIL turns the pixels itself."""
    if image.format == "TIFF" or not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return 1  # most files: asking further would make PIL read all of a PNG
    with suppress(*UNREADABLE):
        return int(image.getexif().get(0x0112, 1))
    return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as it is looked at."""
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def pixels(image: Image.Image, channels: int, image_size: int | None) -> np.ndarray:
    """(channels, height, width) uint8 of an opened image, of 1 or 3 channels; see ``decode``.

    Raises:
        UNREADABLE: it is truncated, damaged, or of values whose white is unknown.
    """
    image.load()
    turn = _TURNS.get(_orientation(image))
    flat = _opaque(_eight_bit(image)).convert("L" if channels == 1 else "RGB")
    upright = flat if turn is None else flat.transpose(turn)
    if image_size:
        upright = ImageOps.fit(upright, (image_size, image_size), RESIZE)
    values = np.asarray(upright)
    return values[None] if channels == 1 else values.transpose(2, 0, 1)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Sixteen bits to their upper eight: PIL would clip them. Beyond that, no value is known to mean white."""
    if image.mode == "F":
        raise ValueError("pixels are floats: save them with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("pixels of more than 16 bits: save them with 8 or 16")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """Over white, as on a page: colours under full transparency are whatever the program that wrote them left there."""
    if not image.has_transparency_data:
        return image
    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured)


def reason(error: Exception) -> str:
    """Why a file is unreadable, in a few words and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "no image format that PIL knows"
    return " ".join(str(error).split())[:100] or type(error).__name__
