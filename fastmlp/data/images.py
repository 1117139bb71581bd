"""Any image file as FashionMNIST sees it, 28 x 28 gray values, a light object on black; or as other data see it.

``load_pixels`` makes what a model of other images takes, and ``load_image`` what a model of FashionMNIST takes.
FashionMNIST was made as follows (Xiao, Rasul and Vollgraf 2017, section 2): cut the margins of background away, shrink
the longest edge to 28 pixels, extend the shorter edge with background so that the object is in the center, and negate
a dark-on-light picture. An image of 28 x 28 pixels is only negated, if need be.

An image takes the memory of its file's pixels, of which there may be `MOST_PIXELS`, and little more: a large image is
made smaller strip by strip, by averages of whole blocks, before anything is computed with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ..base.atomic import open_file

SIZE = 28
MOST_PIXELS = 100_000_000
MOST_EDGE = 2048
"""The longest edge, in pixels, with which anything is computed; larger images are made smaller first."""
STRIP_PIXELS = 1 << 22

# An error of pillow is an exception here, and a line on stderr as well only where an application asks for logs.
logging.getLogger("PIL").addHandler(logging.NullHandler())

MARGIN_TOLERANCE = 0.05 * 255  # how far a margin may be from the corners' value, as in the data set's own processing


@dataclass(frozen=True)
class LoadedImage:
    """An image as the model takes it.

    Attributes:
        pixels: uint8 [784], row by row, 0 for black.
        inverted: whether light and dark were exchanged.
        empty: whether there is nothing but background.
    """

    pixels: Tensor
    inverted: bool
    empty: bool = False


def load_image(path: str | os.PathLike[str], invert: bool | None = None) -> LoadedImage:
    """Read any image that pillow reads: gray, colour, palette, 16 bits or floating point, with alpha, rotated by EXIF.

    Transparent parts count as background; they become white behind a dark object and black behind a light one.

    Args:
        path: the file; of an animation, the first frame is read.
        invert: whether to exchange light and dark. None: where the mean of the outermost pixels, which are background,
            is above 127. (This is right for all 70,000 images of FashionMNIST and for their negatives.)

    Raises:
        OSError: as ``open``; also for what is no regular file.
        ValueError: not an image, truncated, or too large.
    """
    gray = _read(Path(path), _gray)
    empty = not _inside(gray).any()
    if invert is None:
        invert = bool(_border(gray).mean() > 127)
    if invert:
        gray = 255 - gray
    if gray.shape != (SIZE, SIZE):
        gray = _to_size(gray)
    return LoadedImage(torch.from_numpy(np.rint(gray).astype(np.uint8)).flatten(), invert, empty)


def load_pixels(path: str | os.PathLike[str], shape: tuple[int, ...]) -> np.ndarray:
    """Any image that pillow reads as uint8 of ``shape``, [height, width] gray or [height, width, 3] in colour.

    An image of another size is scaled, and cut at two edges if its proportions differ. Errors as ``load_image``.
    """
    values = _read(Path(path), _gray if len(shape) == 2 else _colour)
    picture = Image.fromarray(np.rint(values).astype(np.uint8))
    if picture.size != (shape[1], shape[0]):
        picture = ImageOps.fit(picture, (shape[1], shape[0]), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def size_and_mode(path: Path) -> tuple[tuple[int, int], str]:
    """((width, height), pillow's mode) of an image, upright as `load_pixels` reads it. Errors as ``load_image``."""
    with _opened(path) as image:
        size, mode = image.size, image.mode
        # pillow turns a TIFF itself when it opens the file.
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (size[1], size[0]) if turned else size, mode


def _read(path: Path, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """The values that ``convert`` makes of the image, upright and at most `MOST_EDGE` pixels long."""
    with _opened(path) as image:
        if image.width > MOST_EDGE:
            # A decoder waits for a whole row, and pillow copies what is there for each further piece of the file.
            image.decodermaxblock = 1 << 24  # type: ignore[attr-defined]
        image.load()
        if 0 in image.size:
            raise ValueError("it has no pixels")
        return convert(ImageOps.exif_transpose(_shrunk(image)))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image of a file, not yet decoded; errors of pillow, also while the image is used, become ValueErrors."""
    with open_file(path) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what pillow finds odd in a file that it can read
        try:
            image = Image.open(stream)
            if image.width * image.height > MOST_PIXELS:
                text = f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}; make the image smaller"
                raise Image.DecompressionBombError(text)
            yield image
        except Image.UnidentifiedImageError:
            kinds = "PNG, JPEG, GIF, BMP, TIFF or WebP"
            raise ValueError(f"{path} is not an image that can be read; expected {kinds}, for example") from None
        except (Image.DecompressionBombError, MemoryError) as error:
            raise ValueError(f"{path} is too large: {error or 'out of memory'}") from error
        except Exception as error:  # for damaged files, pillow's readers raise nearly every type of error
            raise ValueError(f"{path} is damaged, truncated or too large: {error or type(error).__name__}") from error


def _shrunk(image: Image.Image) -> Image.Image:
    """The image, or a smaller copy whose pixels are averages of square blocks."""
    factor = -(-max(image.size) // MOST_EDGE)
    if factor == 1:
        return image
    rows = max(1, STRIP_PIXELS // (image.width * factor)) * factor
    strips = []
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        strips.append(_averageable(strip).reduce(factor))
    small = Image.new(strips[0].mode, (strips[0].width, sum(strip.height for strip in strips)))
    for number, strip in enumerate(strips):
        small.paste(strip, (0, number * strips[0].height))
    if "exif" in image.info:
        small.info["exif"] = image.info["exif"]
    return small


def _averageable(image: Image.Image) -> Image.Image:
    """The image in a mode that pillow can average: not numbers of colours, bits or 16-bit integers."""
    if image.mode.startswith("I;16"):
        return image.convert("I")
    if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBa"):
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return (
        image if image.mode in ("L", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F") else image.convert("RGB")
    )


def _gray(image: Image.Image) -> np.ndarray:
    """Gray values 0 to 255 as float32 [height, width]."""
    if image.mode.startswith("I;16"):
        return np.asarray(image, dtype=np.float32) / 257
    if image.mode in ("I", "F"):
        return _scaled(np.asarray(image, dtype=np.float32), fractions=image.mode == "F")
    if _has_alpha(image):
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32)
        return _composed(_luminance(rgba), rgba[..., 3])
    if image.mode == "LAB":  # L is the lightness itself
        return np.asarray(image.getchannel("L"), dtype=np.float32)
    colour = image if image.mode in ("1", "L", "RGB") else image.convert("RGB")
    return np.asarray(colour.convert("L"), dtype=np.float32)


def _scaled(values: np.ndarray, *, fractions: bool) -> np.ndarray:
    """To 0 .. 255 from the smallest usual range that holds the values: 1 (``fractions``), 255, 65535, or their own.

    Of values that are not finite, infinity is the largest finite value of the image and the others are the smallest.
    Equal values outside of the usual ranges become 0.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    # float64, because the difference of two float32 numbers may be too large for float32.
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    if low < 0 or high > 65535:
        values = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    elif fractions and high <= 1:
        values = values * 255
    elif high > 255:
        values = values / 257
    return values.astype(np.float32)


def _colour(image: Image.Image) -> np.ndarray:
    """Red, green and blue from 0 to 255 as float32 [height, width, 3]."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F", "LAB"):
        return np.repeat(_gray(image)[..., None], 3, axis=2)
    if _has_alpha(image):
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32)
        background = _contrast(_luminance(rgba), rgba[..., 3])
        return np.stack([_composed(rgba[..., i], rgba[..., 3], background) for i in range(3)], axis=2)
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa")


def _luminance(rgba: np.ndarray) -> np.ndarray:
    return rgba[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as pillow's "L"


def _contrast(gray: np.ndarray, alpha: np.ndarray) -> float:
    """The background, black or white, that the opaque part of the picture stands out from."""
    alpha = alpha / 255
    opaque = alpha.sum()
    mean = float((gray * alpha).sum() / opaque) if opaque > 0 else 0.0
    return 255.0 if mean < 127.5 else 0.0


def _composed(values: np.ndarray, alpha: np.ndarray, background: float | None = None) -> np.ndarray:
    """The picture on a background, by default on the one that its opaque part stands out from."""
    background = _contrast(values, alpha) if background is None else background
    alpha = alpha / 255
    return values * alpha + background * (1 - alpha)


def _border(gray: np.ndarray) -> np.ndarray:
    return np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])


def _background(gray: np.ndarray) -> float:
    return float(np.median(gray[[0, 0, -1, -1], [0, -1, 0, -1]]))


def _inside(gray: np.ndarray) -> np.ndarray:
    """Which pixels differ from the background."""
    return np.abs(gray - _background(gray)) > MARGIN_TOLERANCE


def _to_size(gray: np.ndarray) -> np.ndarray:
    """Cut the margins, shrink or enlarge the longest edge to 28, extend the other with background."""
    background = _background(gray)
    inside = _inside(gray)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if len(rows) > 0:
        gray = gray[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = gray.shape
    scale = SIZE / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    small = Image.fromarray(np.ascontiguousarray(gray)).resize((width, height), Image.Resampling.LANCZOS)
    canvas = np.full((SIZE, SIZE), background, dtype=np.float32)
    # An odd rest is divided as in the data set: the larger part above (94 % of its images) and on the left (99 %).
    top, left = (SIZE - height + 1) // 2, (SIZE - width + 1) // 2
    canvas[top : top + height, left : left + width] = np.clip(np.asarray(small), 0, 255)
    return canvas
