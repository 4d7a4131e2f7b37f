"""One encoded image to pixels: the formats that are read, and the square that an image becomes."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from labcore import LabError
from labcore.files.artifacts import UNREADABLE

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Pillow's names of them. Its other formats stay closed: some hand the file to another program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")


def decode(content: bytes, size: int, name: str) -> np.ndarray:
    """Return the pixels of an image's file, uint8 (3, size, size). Raises LabError where it is damaged."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return to_array(image, size)
    except (*UNREADABLE, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise LabError(f"{name} is damaged ({reason}): repair or remove it.") from error


def to_array(image: Image.Image, size: int) -> np.ndarray:
    """Return an image of any size and mode as uint8 (3, size, size): its centred square, resized."""
    if image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # convert() would warn of some kinds
    square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
