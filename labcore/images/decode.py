"""One encoded image to pixels: the formats that are read, and the square that an image becomes."""

import contextlib
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from labcore import LabError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Pillow's names of them. Its other formats stay closed: some hand the file to another program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # EXIF orientation -> Image.Transpose
# Tags of a TIFF; the last of EXIF too.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _LOWEST, _HIGHEST, _ORIENTATION = 258, 262, 339, 340, 341, 274


def is_image(head: bytes, name: str) -> bool:
    """Return whether a file is an image by its first 32 bytes, or should be one by its name."""
    Image.init()
    kind = next((kind for kind in FORMATS if Image.OPEN[kind][1](head)), None)
    # These two begin with letters, as a text may.
    text = (kind == "PPM" and not head[2:3].isspace()) or (kind == "BMP" and b"\0" not in head)
    return (kind is not None and not text) or name.lower().endswith(SUFFIXES)


def decode(content: bytes, size: int, name: str) -> tuple[np.ndarray, list[str]]:
    """Return the pixels of an image's file, uint8 (3, size, size), and in words what was done to them.

    Raises LabError, which begins with `name`, where it is damaged, or its numbers have no known range.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _decode(image, size, name)
    except LabError:
        raise
    except Exception as error:  # Pillow raises almost anything on foreign bytes
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise LabError(f"{name} is damaged ({reason}): repair or remove it.") from error


def _decode(image: Image.Image, size: int, name: str) -> tuple[np.ndarray, list[str]]:
    told = ["the first of several pictures was read"] if getattr(image, "is_animated", False) else []
    layout = image.tile[0].args if image.tile else None  # of a PNG: how a pixel is stored, such as "L;2"
    tags = getattr(image, "tag_v2", {})
    turn, told_by_tiff = None, tags.get(_ORIENTATION, 1)  # by which Pillow turns a TIFF when it is loaded
    image.load()
    if image.mode[0] in "IF" or tags.get(_SAMPLE_FORMAT, (1,))[0] == 2:
        told.append("more than 8 bits, scaled to 8")
        rgb, opaque = _grey(image, name)
    elif image.mode in ("LAB", "HSV"):
        raise _unknown_range(image, name)
    else:
        rgb, opaque = _on_white(image, layout, name)
    if not opaque:
        told.append("transparent, laid on white")
    with contextlib.suppress(Exception):  # damaged EXIF turns nothing
        turn = TURNS.get(image.getexif().get(_ORIENTATION))
    if turn is not None:
        rgb = rgb.transpose(turn)
    if turn is not None or told_by_tiff in TURNS:
        told.append("turned as the EXIF orientation says")
    return to_array(rgb, size), told


def _grey(image: Image.Image, name: str) -> tuple[Image.Image, bool]:
    """Return deep grey as bytes, and whether nothing of it is transparent.

    Its range is the one that the file tells, else all of an unsigned 16-bit number, else 0 … 1 of a float.
    Raises LabError where the range is unknown, and where a value lies outside.
    """
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
    low, high = (tags.get(tag, (None,))[0] for tag in (_LOWEST, _HIGHEST))
    if low is None or high is None or image.mode == "L":
        bits = tags.get(_BITS, (16,))[0]
        known = {"I": 65535 if image.format == "PPM" else None, "F": 1, "L": None}
        low, high = 0, known.get(image.mode, 2**bits - 1)
    if high is None or not (low <= values.min() and values.max() <= high and low < high):
        raise _unknown_range(image, name)
    grey = ((values.astype(np.float64) - low) * (255 / (high - low))).round().astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    hidden = values == image.info.get("transparency", -1)
    grey[hidden] = 255
    return Image.fromarray(grey), not hidden.any()


def _on_white(image: Image.Image, layout, name: str) -> tuple[Image.Image, bool]:
    """Return an image of 8 bits or fewer without its transparency, and whether it had none."""
    key = image.info.get("transparency")
    if image.mode == "L" and layout in ("L;2", "L;4") and key is not None:
        image.info["transparency"] = key * 255 // (2 ** int(layout[2]) - 1)
    elif layout == "RGB;16B" and key is not None:  # of which Pillow keeps the upper byte only
        raise LabError(f"{name} has a transparent colour of 16 bits, which is not read: save it with 8 bits.")
    if image.has_transparency_data:
        whole = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        low, high = whole.getchannel("A").getextrema()
        if low < 255 and (high > 0 or image.format != "BMP"):  # where a zero often means that there is none
            return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole), False
        image.info.pop("transparency", None)
    return image, True


def _unknown_range(image: Image.Image, name: str) -> LabError:
    kind = f"mode {image.mode}"
    if image.mode in ("I", "F"):
        kind += f", values {image.getextrema()[0]:g} to {image.getextrema()[1]:g}"
    return LabError(
        f"{name} has numbers of unknown range ({kind}): expected unsigned 8 or 16 bits, or floats from 0 to "
        "1; save it so, or remove it."
    )


def to_array(image: Image.Image, size: int) -> np.ndarray:
    """Return an image of any size as uint8 (3, size, size): its centred square, resized."""
    square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
