"""Image files of anyone, read as pixels of one size: a file that asks too much memory or time is refused."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from cddlib.runtime.errors import UserError, is_out_of_memory

MOST_PIXELS = 2**26
"""Pixels of the largest image that is decoded, before or after it is resized; ImageNet's largest has 61 million.

A worker process needs up to 8 bytes for each."""
LARGEST_IMAGE = 2**28
"""Bytes of the longest image file that is read."""
MOST_SCANS = 512
"""Most passes of a JPEG over its image. There are about ten; 30 bytes can ask for one more."""
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")  # Pillow knows more, of which EPS runs a program


class Pictures(torch.utils.data.Dataset[bytes | UserError]):
    """Image files as the bytes of uint8 pixels (3, size, size). Bytes go through a pipe; tensors need shared memory."""

    def __init__(self, files: list[str], size: int) -> None:
        from torchvision.transforms import v2

        # one array: a list's strings are counted as they are used, so that every worker would come to copy them all
        self.files = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
        self.size = size
        self.resize = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> bytes | UserError:
        """The image, or the error: what a worker process raises arrives with its traceback as the message."""
        file = os.fsdecode(self.files[index])
        try:
            return self.resize(_read_image(file, self.size)).numpy().tobytes()
        except Exception as error:  # what Pillow raises for a broken file depends on the format
            if is_out_of_memory(error):
                return UserError(f"there is not enough memory to read {file}; lower --size, or close other programs.")
            return UserError(f"{file} is not a readable image ({' '.join(str(error).split())}).")


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(_FORMATS)}") from None
    shorter, longer = sorted(image.size)
    pixels = max(shorter * longer, size**2 * longer // shorter)
    if pixels > MOST_PIXELS:
        raise ValueError(f"its sides of {shorter} and {longer} pixels make {pixels}, more than {MOST_PIXELS}")
    return image.convert("RGB")
