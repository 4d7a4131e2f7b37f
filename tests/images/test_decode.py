"""An image of any size, mode and format becomes a square of three channels; a damaged one is named."""

import io

import numpy as np
import pytest
from PIL import Image
from trees import encode, pixels

from labcore import LabError
from labcore.images.decode import decode


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("shape", [(32, 32), (20, 50), (7, 5), (100, 33), (1, 1), (1, 300)])
def test_any_size_and_mode_becomes_square_rgb(mode, shape):
    array = decode(encode(np.full((*shape, 3), 255, np.uint8), mode=mode), 16, "")
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, np.full((3, 16, 16), 255))


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_the_centre_of_a_long_image_is_kept(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = image[:, 32:64] if shape[1] == 96 else image[32:64]
    np.testing.assert_array_equal(decode(encode(image), 32, ""), expected.transpose(2, 0, 1))


def test_a_very_long_image_is_cut_to_its_centre_at_once():
    line = np.zeros((1, 1_000_001, 3), dtype=np.uint8)
    line[0, 499_999:500_002] = (10, 20, 30)
    assert (decode(encode(line), 32, "") == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


def test_sixteen_bit_grey_keeps_its_brightness():
    grey = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    assert np.abs(decode(encode(grey), 32, "").astype(float) - grey / 257).max() <= 1


def test_a_palette_with_transparency_keeps_its_colours_without_a_warning():
    paletted = Image.fromarray(pixels(0)).quantize(16)
    stream = io.BytesIO()
    paletted.save(stream, "PNG", transparency=bytes(range(240, 256)))
    expected = np.asarray(paletted.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(stream.getvalue(), 32, ""), expected)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_every_lossless_format_gives_the_same_pixels(kind):
    content = encode(pixels(5), kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode(content, 32, ""), pixels(5).transpose(2, 0, 1))


def assert_damaged(content: bytes, reason: str = ""):
    with pytest.raises(LabError, match=rf"^it is damaged \(.*{reason}") as caught:
        decode(content, 32, "it")
    assert "object at 0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_half_an_image_is_named(kind):
    content = encode(pixels(0), kind)
    assert_damaged(content[: len(content) // 2])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("content", [b"", b"hello", POSTSCRIPT])
def test_what_is_no_image_is_named_and_no_other_program_runs(content, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program ran"))
    assert_damaged(content, "no known format")


def test_an_image_of_too_many_pixels_is_named(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    assert_damaged(encode(pixels(0)), "decompression bomb")
