"""Any image file as FashionMNIST sees it: 28 x 28 gray values, a light object on black.

The data set was made in the same way (Xiao, Rasul and Vollgraf 2017, section 2): cut the margins of background away,
shrink the longest edge to 28 pixels, extend the shorter edge with background so that the object is in the center, and
negate a dark-on-light picture. An image of 28 x 28 pixels is only negated, if need be.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SIZE = 28
MARGIN_TOLERANCE = 0.05 * 255  # how far a margin may be from the corners' value, as in the data set's own processing


@dataclass(frozen=True)
class LoadedImage:
    """An image as the model takes it.

    Attributes:
        pixels: uint8 [784], row by row, 0 for black.
        inverted: whether light and dark were exchanged.
    """

    pixels: Tensor
    inverted: bool


def load_image(path: str | os.PathLike[str], invert: bool | None = None) -> LoadedImage:
    """Read any image that pillow reads: gray, colour, palette, 16 bits or floating point, with alpha, rotated by EXIF.

    Transparent parts count as background; they become white behind a dark object and black behind a light one.

    Args:
        path: the file; of an animation, the first frame is read.
        invert: whether to exchange light and dark. None: where the mean of the outermost pixels, which are background,
            is above 127. (This is right for all 70,000 images of FashionMNIST and for their negatives.)

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: as ``open``.
        ValueError: not an image, truncated, or too large.
    """
    gray = _gray(_open(Path(path)))
    if invert is None:
        invert = bool(_border(gray).mean() > 127)
    if invert:
        gray = 255 - gray
    if gray.shape != (SIZE, SIZE):
        gray = _to_size(gray)
    return LoadedImage(torch.from_numpy(np.rint(gray).astype(np.uint8)).flatten(), invert)


def _open(path: Path) -> Image.Image:
    with path.open("rb") as stream:
        try:
            image = Image.open(stream)
            image.load()
            return ImageOps.exif_transpose(image)
        except Image.UnidentifiedImageError:
            kinds = "PNG, JPEG, GIF, BMP, TIFF or WebP"
            raise ValueError(f"{path} is not an image that can be read; expected {kinds}, for example") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"{path} is too large: {error}") from error
        # For damaged files, pillow's readers raise many types of errors.
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from error


def _gray(image: Image.Image) -> np.ndarray:
    """Gray values 0 to 255 as float32 [height, width]."""
    if image.mode.startswith("I;16"):
        return np.asarray(image, dtype=np.float32) / 257
    if image.mode in ("I", "F"):
        return _scaled(np.nan_to_num(np.asarray(image, dtype=np.float32)), fractions=image.mode == "F")
    if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa"):
        return _composed(np.asarray(image.convert("RGBA"), dtype=np.float32))
    if image.mode == "LAB":  # L is the lightness itself
        return np.asarray(image.getchannel("L"), dtype=np.float32)
    colour = image if image.mode in ("1", "L", "RGB") else image.convert("RGB")
    return np.asarray(colour.convert("L"), dtype=np.float32)


def _scaled(values: np.ndarray, *, fractions: bool) -> np.ndarray:
    """To 0 .. 255 from the smallest usual range that holds the values: 1 (``fractions``), 255, 65535, or their own."""
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        return (values - low) * (255 / (high - low))
    if fractions and high <= 1:
        return values * 255
    return values if high <= 255 else values / 257


def _composed(rgba: np.ndarray) -> np.ndarray:
    """The picture on a background that its opaque part stands out from."""
    gray = rgba[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as pillow's "L"
    alpha = rgba[..., 3] / 255
    opaque = alpha.sum()
    mean = float((gray * alpha).sum() / opaque) if opaque > 0 else 0.0
    background = 255.0 if mean < 127.5 else 0.0
    return gray * alpha + background * (1 - alpha)


def _border(gray: np.ndarray) -> np.ndarray:
    return np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])


def _to_size(gray: np.ndarray) -> np.ndarray:
    """Cut the margins, shrink or enlarge the longest edge to 28, extend the other with background."""
    background = float(np.median(gray[[0, 0, -1, -1], [0, -1, 0, -1]]))
    inside = np.abs(gray - background) > MARGIN_TOLERANCE
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
