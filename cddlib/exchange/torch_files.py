"""Files of `torch.save`, read without running what they say."""

import zipfile
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from cddlib.runtime.errors import UserError, is_out_of_memory

LARGEST_PICKLE = 2**23
"""Bytes of the longest list of tensors in a file, enough for 80,000 tensors; the tensors themselves count elsewhere."""


def read_torch_file(path: Path) -> object:
    """What `torch.save` put into `path`: tensors, lists and numbers. Tensors are mapped from the file.

    PyTorch's restricted unpickler reads it, which calls nothing but the builders of tensors. Checksums of the archive
    are verified first.

    Raises:
        UserError: the file is missing, damaged, of another kind, or holds other objects.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("its entries are longer than the file")
            if any(entry.file_size > LARGEST_PICKLE for entry in entries if entry.filename.endswith("/data.pkl")):
                raise ValueError(f"its list of tensors has more than {LARGEST_PICKLE} bytes")
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its entry {damaged} does not have the CRC-32 that the archive names")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive or pickle can fail in any way
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path} cannot be read: {reason}; it must be a file of torch.save (PyTorch 1.6 or later) with tensors, "
            f"lists and numbers and no other objects, which are never loaded because they can run code."
        ) from None


def describe_value(value: object) -> str:
    if isinstance(value, Tensor):
        odd = "" if _is_plain(value) else ", whose numbers do not each have a place in memory"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{odd}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor whose numbers lie in memory, each at a place of its own."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.numel() * value.itemsize <= value.untyped_storage().nbytes()


def check_tensor(value: object, what: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """`value` itself, if it is a plain tensor of that type and shape with finite numbers."""
    if not _is_plain(value) or (value.dtype, tuple(value.shape)) != (dtype, shape):
        wanted = f"{str(dtype).removeprefix('torch.')}{list(shape)}"
        raise UserError(f"{what} is {describe_value(value)}; it must be {wanted}.")
    if not bool(value.isfinite().all()):
        raise UserError(f"{what} holds numbers that are not finite.")
    return value.detach()
