"""An image of any size, mode and format becomes a square of three channels; a damaged one is named."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from trees import encode, pixels

from labcore import LabError
from labcore.images.decode import decode


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("shape", [(32, 32), (20, 50), (7, 5), (100, 33), (1, 1), (1, 300)])
def test_any_size_and_mode_becomes_square_rgb(mode, shape):
    array = decode(encode(np.full((*shape, 3), 255, np.uint8), mode=mode), 16, "")[0]
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, np.full((3, 16, 16), 255))


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_the_centre_of_a_long_image_is_kept(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = image[:, 32:64] if shape[1] == 96 else image[32:64]
    np.testing.assert_array_equal(decode(encode(image), 32, "")[0], expected.transpose(2, 0, 1))


def test_a_very_long_image_is_cut_to_its_centre_at_once():
    line = np.zeros((1, 1_000_001, 3), dtype=np.uint8)
    line[0, 499_999:500_002] = (10, 20, 30)
    assert (decode(encode(line), 32, "")[0] == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(bits: int, colour: int, row: bytes, transparent: bytes = b"", palette: bytes = b"") -> bytes:
    """An 8×8 PNG of equal rows, of kinds that Pillow reads and does not write."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, colour, 0, 0, 0)), (b"PLTE", palette)]
    chunks += [(b"tRNS", transparent), (b"IDAT", zlib.compress((b"\0" + row) * 8)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks if part[1] or part[0] == b"IEND")


def tiff(values, dtype, **tags: int) -> bytes:
    """An 8×8 TIFF of equal rows; tags by name."""
    numbers = {"white": 262, "signed": 339, "low": 340, "high": 341}
    info = {numbers[name]: value for name, value in tags.items()}
    return encode(np.tile(np.array(values, dtype), (8, 1)), "TIFF", tiffinfo=info)


RAMP = np.arange(8)
ALPHA = np.array([255, 255, 0, 0, 255, 255, 0, 255])
SHOWN = np.where(ALPHA == 0, 255, RAMP * 30)  # RAMP * 30 on white
LAID, DEEP = ["transparent, laid on white"], ["more than 8 bits, scaled to 8"]


def tile(*bands: np.ndarray) -> np.ndarray:
    return np.tile(np.stack(bands, axis=-1).astype(np.uint8), (8, 1, 1))


def of_mode(mode: str, *bands, kind: str = "TIFF", **options) -> bytes:
    """An 8×8 image of equal rows, its bands as they are."""
    merged = Image.merge(mode, [Image.fromarray(np.tile(np.uint8(band), (8, 1))) for band in bands])
    stream = io.BytesIO()
    merged.save(stream, kind, **options)
    return stream.getvalue()


def paletted(kind: str, **transparency) -> bytes:
    image, stream = Image.fromarray(np.tile(np.uint8(RAMP), (8, 1))), io.BytesIO()
    image.putpalette([value for level in RAMP * 30 for value in [level] * 3])
    image.save(stream, kind, **transparency)
    return stream.getvalue()


def bmp(*bands) -> bytes:
    """An 8×8 BMP of 32 bits a pixel with a mask for alpha (BITMAPV3INFOHEADER)."""
    masks = 0xFF, 0xFF00, 0xFF0000, 0xFF000000  # red, green, blue, alpha
    header = struct.pack("<3I2H6I4I", 56, 8, 8, 1, 32, 3, 256, 0, 0, 0, 0, *masks)
    return b"BM" + struct.pack("<3I", 326, 0, 70) + header + tile(*bands).tobytes()


def big_endian(values, dtype: str = ">u2") -> bytes:
    return np.array(values).astype(dtype).tobytes()


SOFT = [255, 255, 0, 0, 128, 255, 255, 255]  # alpha, half of it once
SOFTENED = [0, 30, 255, 255, (120 * 128 + 255 * 127) / 255, 150, 180, 210]
KEYED = np.where(RAMP == 2, 255, RAMP * 30)
WIDE = RAMP * 9000
PIXELS = {
    "RGBA PNG": (encode(tile(*[RAMP * 30] * 3, ALPHA)), SHOWN, LAID),
    "black on nothing": (encode(tile(*[RAMP * 0] * 3, ALPHA)), 255 - ALPHA, LAID),
    "opaque RGBA": (encode(tile(*[RAMP * 30] * 3, ALPHA * 0 + 255)), RAMP * 30, []),
    "LA PNG": (of_mode("LA", RAMP * 30, ALPHA, kind="PNG"), SHOWN, LAID),
    "LA TIFF": (of_mode("LA", RAMP * 30, ALPHA), SHOWN, LAID),
    "RGBA TIFF": (of_mode("RGBA", *[RAMP * 30] * 3, ALPHA), SHOWN, LAID),
    "RGBA WEBP": (of_mode("RGBA", *[RAMP * 30] * 3, ALPHA, kind="WEBP", lossless=True), SHOWN, LAID),
    "half": (encode(tile(*[RAMP * 30] * 3, SOFT)), SOFTENED, LAID),
    "premultiplied": (of_mode("RGBA", *[RAMP * 30 * ALPHA / 255] * 3, ALPHA, tiffinfo={338: 1}), SHOWN, LAID),
    "palette, alphas": (paletted("PNG", transparency=bytes(SOFT)), SOFTENED, LAID),
    "palette, one": (paletted("PNG", transparency=2), KEYED, LAID),
    "GIF": (paletted("GIF", transparency=2), KEYED, LAID),
    "palette": (paletted("PNG"), RAMP * 30, []),
    "1-bit grey, key": (png(1, 0, b"\x55", b"\0\0"), RAMP * 0 + 255, LAID),
    "2-bit grey, key": (png(2, 0, b"\x1b\x1b", b"\0\1"), [0, 255, 170, 255] * 2, LAID),
    "4-bit grey, key": (png(4, 0, b"\x01\x23\x45\x67", b"\0\2"), np.where(RAMP == 2, 255, RAMP * 17), LAID),
    "8-bit grey, key": (png(8, 0, bytes(RAMP.tolist()), b"\0\2"), np.where(RAMP == 2, 255, RAMP), LAID),
    "RGB, key": (encode(tile(*[RAMP * 30] * 3), transparency=(60, 60, 60)), KEYED, LAID),
    "32-bit BMP": (bmp(*[RAMP * 30] * 3, ALPHA), SHOWN, LAID),
    "32-bit BMP without alpha": (bmp(*[RAMP * 30] * 3, RAMP * 0), RAMP * 30, []),
    "16-bit PNG": (png(16, 0, big_endian(WIDE)), WIDE / 257, DEEP),
    "16-bit PNG, key": (
        png(16, 0, big_endian(WIDE), big_endian([18000])),
        np.where(RAMP == 2, 255, WIDE / 257),
        DEEP + LAID,
    ),
    "16-bit PNG, alpha": (
        png(16, 4, big_endian(np.stack([WIDE, ALPHA * 257], 1))),
        np.where(ALPHA, WIDE / 257, 255),
        LAID,
    ),
    "16-bit RGB PNG": (png(16, 2, big_endian(np.stack([WIDE] * 3, 1))), WIDE / 257, []),
    "16-bit TIFF": (tiff(WIDE, np.uint16), WIDE / 257, DEEP),
    "16-bit TIFF, white is 0": (tiff(WIDE, np.uint16, white=0), 255 - WIDE / 257, DEEP),
    "16-bit PGM": (b"P5 8 8 65535\n" + big_endian(np.tile(WIDE, 8)), WIDE / 257, DEEP),
    "10-bit PGM": (b"P5 8 8 1000\n" + big_endian(np.tile(RAMP * 100, 8)), RAMP * 25.5, DEEP),
    "4-bit PGM": (b"P2 8 8 15\n" + b"0 1 2 3 4 5 6 7\n" * 8, RAMP * 17, []),
    "float TIFF": (tiff(RAMP / 7, np.float32), RAMP * 255 / 7, DEEP),
    "float PFM": (b"Pf 8 8 -1.0\n" + big_endian(np.tile(RAMP / 7, 8), "<f4"), RAMP * 255 / 7, DEEP),
    "float TIFF, range told": (tiff(RAMP * 5 - 10, np.float32, low=-10.0, high=25.0), RAMP * 255 / 7, DEEP),
    "32-bit TIFF, range told": (tiff(RAMP * 5 - 10, np.int32, low=-10, high=25), RAMP * 255 / 7, DEEP),
    "CMYK TIFF": (of_mode("CMYK", *[RAMP * 0] * 3, 255 - RAMP * 30), RAMP * 30, []),
    "YCbCr TIFF": (of_mode("YCbCr", RAMP * 30, RAMP * 0 + 128, RAMP * 0 + 128), RAMP * 30, []),
    "two frames": (
        encode(tile(*[RAMP * 30] * 3), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        RAMP * 30,
        ["the first of several pictures was read"],
    ),
}


@pytest.mark.parametrize("name", PIXELS)
def test_every_mode_is_scaled_by_its_range_and_laid_on_white(name):
    content, expected, told = PIXELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, remarks = decode(content, 8, "it")
    assert np.abs(found - np.array(expected, dtype=float)).max() <= 1
    assert remarks == told


REFUSED = {
    "float of 0 to 255": (tiff(RAMP * 30, np.float32), "mode F, values 0 to 210"),
    "float below 0": (tiff(RAMP / 7 - 0.1, np.float32), "mode F, values -0.1"),
    "no number": (tiff(RAMP * np.nan, np.float32), "mode F, values nan"),
    "32 bits": (tiff(RAMP * 30, np.int32), "mode I, values 0 to 210"),
    "outside the range told": (tiff(RAMP, np.float32, low=0.0, high=6.0), "mode F, values 0 to 7"),
    "LAB": (of_mode("LAB", *[RAMP * 30] * 3), "mode LAB"),
    "signed": (tiff(RAMP, np.uint8, signed=2), "mode L"),
    "16-bit key of colours": (png(16, 2, big_endian([WIDE] * 3), bytes(6)), "transparent colour of 16 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_of_unknown_range_are_refused_with_name_and_mode(name):
    content, reason = REFUSED[name]
    with pytest.raises(LabError, match=rf"^it has .*{reason}"):
        decode(content, 8, "it")


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_exif_says(kind, orientation):
    exif, options = Image.Exif(), {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}
    exif[274] = orientation
    smooth = np.add.outer(np.arange(32) * 4, np.arange(32) * 2).astype(
        np.uint8
    )  # no turn leaves it as it was
    content = encode(np.stack([smooth] * 3, axis=-1), kind, exif=exif, **options.get(kind, {}))
    upright = {
        2: smooth[:, ::-1],
        3: smooth[::-1, ::-1],
        4: smooth[::-1],
        5: smooth.T,
        6: np.rot90(smooth, -1),
        7: np.rot90(smooth.T, 2),
        8: np.rot90(smooth),
    }.get(orientation, smooth)
    found, told = decode(content, 32, "it")
    assert np.abs(found - upright.astype(float)).max() <= (3 if kind == "JPEG" else 0)
    assert told == (["turned as the EXIF orientation says"] if 2 <= orientation <= 8 else [])


def test_damaged_exif_turns_nothing():
    content = encode(pixels(0), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    np.testing.assert_array_equal(decode(content, 32, "it")[0], pixels(0).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_every_lossless_format_gives_the_same_pixels(kind):
    content = encode(pixels(5), kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode(content, 32, "")[0], pixels(5).transpose(2, 0, 1))


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
