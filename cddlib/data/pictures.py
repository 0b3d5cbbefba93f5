"""Image files of anyone, read as pixels of one size: a file that asks too much memory or time is refused."""

import io
import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from cddlib.runtime.errors import UserError, is_out_of_memory

MOST_PIXELS = 2**26
"""Pixels of the largest image that is decoded, before or after it is resized; ImageNet's largest has 61 million.

A thread needs up to 8 bytes for each."""
LARGEST_IMAGE = 2**28
"""Bytes of the longest image file that is read."""
MOST_SCANS = 512
"""Most passes of a JPEG over its image. There are about ten; 30 bytes can ask for one more."""
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")  # Pillow knows more, of which EPS runs a program


def read_picture(file: str, size: int) -> bytes:
    """The uint8 pixels (3, size, size) of an image file: resized with antialiasing, and the middle cut out.

    Raises:
        UserError: it cannot be read, or asks too much.
    """
    from torchvision.transforms.v2 import functional as F

    try:
        image = F.center_crop(F.resize(_read_image(file, size), [size], antialias=True), [size])
        return F.pil_to_tensor(image).numpy().tobytes()
    except Exception as error:  # what Pillow raises for a broken file depends on the format
        if is_out_of_memory(error):
            raise UserError(
                f"there is not enough memory to read {file}; lower --size, or close other programs."
            ) from None
        raise UserError(f"{file} is not a readable image ({' '.join(str(error).split())}).") from None


def _read_image(file: str, size: int) -> Image.Image:
    """An image in RGB whose shorter side can be resized to `size`; raises `ValueError` if it asks too much."""
    if not os.path.isfile(file):
        raise ValueError("it is not a file")
    if os.path.getsize(file) > LARGEST_IMAGE:
        raise ValueError(f"it has {os.path.getsize(file)} bytes, more than {LARGEST_IMAGE}")
    content = Path(file).read_bytes()
    scans = content.count(b"\xff\xda") if content.startswith(b"\xff\xd8") else 1
    if scans > MOST_SCANS:
        raise ValueError(f"it has {scans} scans, more than {MOST_SCANS}")
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(_FORMATS)}") from None
    shorter, longer = sorted(image.size)
    pixels = max(shorter * longer, size**2 * longer // shorter)
    if pixels > MOST_PIXELS:
        raise ValueError(f"its sides of {shorter} and {longer} pixels make {pixels}, more than {MOST_PIXELS}")
    if image.mode == "F":
        raise ValueError("its pixels are not whole numbers")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        return image.convert("I").point(lambda level: level * (1 / 257)).convert("L").convert("RGB")
    return image.convert("RGB")
