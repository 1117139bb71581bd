"""Image files as the model sees them: every mode, polarity and shape, and damaged files."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastmlp.data import images, load_fashion_mnist
from fastmlp.data.images import load_image


@pytest.fixture(scope="module")
def garments() -> np.ndarray:
    """uint8 [20, 28, 28]: real test images, light on black."""
    _, test = load_fashion_mnist(source="bundled")
    return test.images[:20].reshape(-1, 28, 28).numpy()


@pytest.fixture
def garment(garments) -> np.ndarray:
    return garments[0]


def saved(tmp_path, image: Image.Image, name: str = "image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixels(path, invert=None) -> np.ndarray:
    return load_image(path, invert).pixels.reshape(28, 28).numpy()


def mode_of(path) -> str:
    with Image.open(path) as image:
        return image.mode


def shape_of(size: tuple[int, int], box: tuple[int, int, int, int], inside: int, outside: int) -> np.ndarray:
    """A gray image [height, width] with a rectangle (top, left, bottom, right)."""
    image = np.full(size, outside, dtype=np.uint8)
    image[box[0] : box[2], box[1] : box[3]] = inside
    return image


def test_28x28_gray_is_taken_as_it_is(tmp_path, garments):
    for garment in garments:
        loaded = load_image(saved(tmp_path, Image.fromarray(garment)))
        assert not loaded.inverted
        assert loaded.pixels.dtype == torch.uint8
        assert np.array_equal(loaded.pixels.reshape(28, 28).numpy(), garment)


def test_negative_is_inverted_back(tmp_path, garments):
    for garment in garments:
        loaded = load_image(saved(tmp_path, Image.fromarray(255 - garment)))
        assert loaded.inverted
        assert np.array_equal(loaded.pixels.reshape(28, 28).numpy(), garment)


@pytest.mark.parametrize("invert", [True, False])
def test_polarity_can_be_forced(tmp_path, garment, invert):
    for original in (garment, 255 - garment):
        loaded = load_image(saved(tmp_path, Image.fromarray(original)), invert)
        assert loaded.inverted == invert
        expected = 255 - original if invert else original
        assert np.array_equal(loaded.pixels.reshape(28, 28).numpy(), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK", "YCbCr", "P"])
def test_other_modes_hold_the_same_gray(tmp_path, garment, mode):
    name = "image.tif" if mode in ("CMYK", "YCbCr") else "image.png"
    path = saved(tmp_path, Image.fromarray(garment).convert(mode), name)
    assert mode_of(path) == mode
    assert np.abs(pixels(path).astype(int) - garment).max() <= 2


def test_colour_is_weighted_as_bt601(tmp_path):
    red = np.zeros((28, 28, 3), dtype=np.uint8)
    red[5:20, 5:20, 0] = 255
    assert pixels(saved(tmp_path, Image.fromarray(red))).max() == round(0.299 * 255)


def test_bilevel(tmp_path, garment):
    path = saved(tmp_path, Image.fromarray(garment > 100))
    assert mode_of(path) == "1"
    assert np.array_equal(pixels(path), np.where(garment > 100, 255, 0))


def test_16_bits(tmp_path, garment):
    path = saved(tmp_path, Image.fromarray(garment.astype(np.uint16) * 257))
    assert mode_of(path).startswith("I")
    assert np.array_equal(pixels(path), garment)


def test_dark_16_bits_stays_dark(tmp_path):
    """A 16-bit file is scaled by its bits, not by its values."""
    path = saved(tmp_path, Image.fromarray(np.full((28, 28), 200, dtype=np.uint16)))
    assert pixels(path).max() <= 1


@pytest.mark.parametrize(("scale", "offset"), [(1 / 255, 0), (1, 0), (257, 0), (1000, 0), (1, -300)])
def test_floating_point_and_wide_integers(tmp_path, garment, scale, offset):
    values = garment.astype(np.float32) * np.float32(scale) + np.float32(offset)
    assert garment.max() == 255, "the whole range, so that every scale leads back to it"
    assert np.abs(pixels(saved(tmp_path, Image.fromarray(values), "f.tif")).astype(int) - garment).max() <= 1
    if scale >= 1:
        path = saved(tmp_path, Image.fromarray(values.astype(np.int32)), "i.tif")
        assert mode_of(path) == "I"
        assert np.abs(pixels(path).astype(int) - garment).max() <= 1


@pytest.mark.parametrize("value", [0.0, 0.5, 7.0, 300.0])
def test_constant_images(tmp_path, value):
    path = saved(tmp_path, Image.fromarray(np.full((40, 30), value, dtype=np.float32)), "f.tif")
    assert len(np.unique(pixels(path))) == 1


@pytest.mark.parametrize("inside", [20, 235])
@pytest.mark.parametrize("hidden", [0, 255])
def test_transparent_background_has_the_contrast_of_the_object(tmp_path, inside, hidden):
    """Whatever colour hides under full transparency, the object comes out light on black."""
    gray = shape_of((28, 28), (4, 8, 24, 20), inside, hidden)
    alpha = shape_of((28, 28), (4, 8, 24, 20), 255, 0)
    rgba = np.stack([gray, gray, gray, alpha], axis=-1)
    loaded = load_image(saved(tmp_path, Image.fromarray(rgba)))
    assert loaded.inverted == (inside < 128)
    assert np.array_equal(loaded.pixels.reshape(28, 28).numpy(), shape_of((28, 28), (4, 8, 24, 20), 235, 0))


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(shape_of((28, 28), (4, 8, 24, 20), 1, 0)).convert("P")
    image.putpalette([255, 0, 255, 30, 30, 30] + [0] * 750)
    loaded = load_image(saved(tmp_path, image, transparency=0))
    assert loaded.inverted
    assert np.array_equal(loaded.pixels.reshape(28, 28).numpy(), shape_of((28, 28), (4, 8, 24, 20), 225, 0))


def test_fully_transparent_is_black(tmp_path):
    assert pixels(saved(tmp_path, Image.fromarray(np.zeros((28, 28, 4), dtype=np.uint8)))).max() == 0


def test_exif_orientation(tmp_path, garment):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the viewer must turn by 90 degrees clockwise
    path = saved(tmp_path, Image.fromarray(garment), exif=exif)
    assert np.array_equal(pixels(path), np.rot90(garment, -1))


def test_first_frame_of_an_animation(tmp_path, garments):
    frames = [Image.fromarray(garment) for garment in garments[:3]]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert np.abs(pixels(path).astype(int) - garments[0]).max() <= 2


@pytest.mark.parametrize("background", [0, 255])
def test_aspect_ratio_is_kept_and_the_object_centered(tmp_path, background):
    """A 60 x 20 object somewhere in a large picture becomes 28 x 9 in the middle, light on black."""
    gray = shape_of((200, 300), (30, 250, 90, 270), 255 - background, background)
    loaded = load_image(saved(tmp_path, Image.fromarray(gray)))
    assert loaded.inverted == (background == 255)
    assert np.array_equal(loaded.pixels.reshape(28, 28).numpy(), shape_of((28, 28), (0, 10, 28, 19), 255, 0))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 4), (1000, 28), (29, 27)])
def test_any_size(tmp_path, size):
    gray = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    assert pixels(saved(tmp_path, Image.fromarray(gray))).shape == (28, 28)


def test_enlarged_picture_with_margins_is_recognised(tmp_path, garments):
    """A 6x enlargement in a large white page becomes an image nearer to its original than to any other image."""
    for number, garment in enumerate(garments):
        page = np.full((400, 500), 255, dtype=np.uint8)
        page[50:218, 200:368] = np.kron(255 - garment, np.ones((6, 6), dtype=np.uint8))
        found = pixels(saved(tmp_path, Image.fromarray(page))).astype(float)
        assert np.abs(garments - found).mean(axis=(1, 2)).argmin() == number


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError):
        load_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM" + bytes(60)])
def test_not_an_image(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png is (not an image|damaged|too large)"):
        load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_truncated_files_are_errors_that_name_the_file(tmp_path, garments, kind):
    stream = io.BytesIO()
    Image.fromarray(np.kron(garments[1], np.ones((4, 4), dtype=np.uint8))).convert("RGB").save(stream, kind)
    content = stream.getvalue()
    path = tmp_path / "cut.img"
    for keep in (0.9, 0.5, 0.1):
        path.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(ValueError, match=r"cut\.img is"):
            load_image(path)


def test_decompression_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too large"):
        load_image(saved(tmp_path, Image.fromarray(np.zeros((28, 28), dtype=np.uint8))))


@pytest.mark.parametrize(
    "values",
    [
        np.full((30, 30), -5, np.float32),
        np.full((30, 30), 3e38, np.float32),
        np.full((30, 30), np.inf, np.float32),
        np.full((30, 30), -np.inf, np.float32),
        np.full((30, 30), np.nan, np.float32),
        np.full((30, 30), 2_000_000_000, np.int32),
        np.full((30, 30), -2_000_000_000, np.int32),
    ],
    ids=range(7),
)
def test_constant_images_of_32_bits_are_empty(tmp_path, values):
    loaded = load_image(saved(tmp_path, Image.fromarray(values), "x.tif"))
    assert loaded.empty
    assert loaded.pixels.max() == 0


@pytest.mark.parametrize("low", [-3e38, 0.0, -1.0])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, odd, low):
    """Infinity is as bright as the brightest finite value; NaN and minus infinity are as dark as the darkest."""
    values = np.full((28, 28), low, np.float32)
    values[4:20, 4:20] = 3e38
    values[10, 10] = odd
    found = pixels(saved(tmp_path, Image.fromarray(values), "x.tif"), invert=False)
    assert found[0, 0] == 0
    assert found[5, 5] == 255
    assert found[10, 10] == (255 if odd == np.inf else 0)


@pytest.mark.parametrize("size", [(28, 28), (40, 60)])
def test_nothing_but_background_is_empty(tmp_path, size):
    blank = np.full(size, 200, np.uint8)
    blank[5, 5] += 10  # noise within the tolerance
    assert load_image(saved(tmp_path, Image.fromarray(blank))).empty
    blank[5:9, 5:9] = 20
    assert not load_image(saved(tmp_path, Image.fromarray(blank))).empty


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"])
def test_large_images_are_made_smaller_first(tmp_path, monkeypatch, mode):
    """In strips, whose averages give the picture that the whole image gives."""
    gray = shape_of((401, 333), (100, 50, 311, 290), 230, 20)
    picture = Image.fromarray(gray)
    if mode == "LAB":
        picture = Image.merge("LAB", [picture, Image.new("L", picture.size, 128), Image.new("L", picture.size, 128)])
    elif mode == "I;16":
        picture = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    name = "x.tif" if mode in ("CMYK", "YCbCr", "LAB", "I", "F") else "x.png"
    path = saved(tmp_path, picture, name)
    whole = pixels(path).astype(int)
    sizes = []
    gray_of = images._gray
    monkeypatch.setattr(images, "MOST_EDGE", 100)
    monkeypatch.setattr(images, "STRIP_PIXELS", 20_000)
    monkeypatch.setattr(images, "_gray", lambda image: sizes.append(image.size) or gray_of(image))
    small = pixels(path).astype(int)
    assert sizes == [(67, 81)]
    assert np.abs(small - whole).mean() < 6


def test_orientation_of_a_large_image(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_EDGE", 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    gray = shape_of((112, 112), (0, 0, 28, 112), 230, 20)
    found = pixels(saved(tmp_path, Image.fromarray(gray), exif=exif))
    assert found[:, -3:].min() > 200
    assert found[:, :10].max() < 50


@pytest.mark.parametrize("size", [(60_000_000, 1), (1, 3_000_000), (9400, 9400)])
def test_memory_is_bounded(tmp_path, monkeypatch, size):
    sizes = []
    gray_of = images._gray
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(images, "_gray", lambda image: sizes.append(image.size) or gray_of(image))
    path = saved(tmp_path, Image.new("1", size), compress_level=1)
    assert load_image(path).empty
    assert max(sizes[0]) <= images.MOST_EDGE


def test_images_of_too_many_pixels_are_not_decoded(tmp_path, monkeypatch):
    path = tmp_path / "x.ppm"
    path.write_bytes(b"P5 13300 13300 255\n")
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ValueError, match=r"x\.ppm is too large: 13300 x 13300 pixels, more than 100,000,000"):
        load_image(path)


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(OSError, match="expected a regular file"):
            load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "PCX", "ICO", "SGI"])
def test_altered_files_are_images_or_errors_that_name_the_file(request, tmp_path, garments, kind, capfd):
    stream = io.BytesIO()
    Image.fromarray(garments[1]).convert("RGB").save(stream, kind)
    content, generator = np.frombuffer(stream.getvalue(), np.uint8), np.random.default_rng(0)
    path = tmp_path / "altered.img"
    for _ in range(2000 if request.config.getoption("full") else 60):
        altered = content.copy()
        at = generator.integers(0, min(len(altered), generator.choice([60, 100_000])), size=4)
        altered[at] = generator.integers(0, 256, 4)
        path.write_bytes(altered.tobytes())
        try:
            assert load_image(path).pixels.shape == (784,)
        except ValueError as error:
            assert str(error).startswith(f"{path} is ")  # noqa: PT017
    assert capfd.readouterr() == ("", "")
