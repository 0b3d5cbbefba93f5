"""Files of `torch.save`, read without running what they say."""

import pickletools
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from cddlib.runtime.errors import UserError, is_out_of_memory

LARGEST_PICKLE = 2**23
"""Bytes of the longest list of tensors in a file, enough for 80,000 tensors; the tensors themselves count elsewhere."""
_BUILDERS = re.compile(
    r"torch (?!Untyped|Typed)\w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)|collections OrderedDict"
)
"""What the pickle of a file with tensors, lists and numbers names."""


def read_torch_file(path: Path) -> object:
    """What `torch.save` put into `path`: tensors, lists and numbers. Tensors are mapped from the file.

    PyTorch's restricted unpickler reads it, which runs no code of the file. It does allocate what a file asks for, so
    files that name anything but the builders of tensors are refused before. Checksums of the archive are verified.

    Raises:
        UserError: the file is missing, damaged, of another kind, or holds other objects; or its tensors share numbers,
            so that together they are longer than the file.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive or pickle can fail in any way
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path} cannot be read: {reason}; it must be a file of torch.save (PyTorch 1.6 or later) with tensors, "
            f"lists and numbers and no other objects, which are never loaded because they can run code."
        ) from None
    _refuse_sharing(content, path)
    return content


def _check_archive(path: Path) -> None:
    """Raise an error unless the archive is whole, uncompressed, and names only builders of tensors."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        lengths = [entry.file_size for entry in entries]
        if lengths != [entry.compress_size for entry in entries] or sum(lengths) > path.stat().st_size:
            raise ValueError("its entries are compressed, or longer than the file")
        for entry in entries:
            if entry.filename.endswith("/data.pkl"):
                if entry.file_size > LARGEST_PICKLE:
                    raise ValueError(f"its list of tensors has more than {LARGEST_PICKLE} bytes")
                for instruction, argument, _ in pickletools.genops(archive.read(entry)):
                    if instruction.name == "PROTO" and argument != 2:
                        raise ValueError(f"its pickle has protocol {argument}, not 2")
                    if instruction.name == "GLOBAL" and not _BUILDERS.fullmatch(str(argument)):
                        raise ValueError(f"it names {str(argument).replace(' ', '.', 1)}")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its entry {damaged} does not have the CRC-32 that the archive names")


def _refuse_sharing(content: object, path: Path) -> None:
    """Raise `UserError` if the tensors in nested lists are together longer than their file."""
    length, waiting = 0, [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            length += value.numel() * value.itemsize
        elif isinstance(value, list):
            length += len(value)
        if length > path.stat().st_size:
            raise UserError(
                f"{path} holds tensors that share their numbers: they were saved without being copied, as the "
                f"published codes do on a CPU, and cannot be told apart."
            )
        waiting += value if isinstance(value, list) else []


def wrong_value(what: str, value: object, wanted: str) -> UserError:
    """The error of a `value` that is not what is `wanted`."""
    if isinstance(value, Tensor):
        found = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    else:
        found = f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
    return UserError(f"{what} is {found}; it must be {wanted}.")


def check_tensor(value: object, what: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """`value` itself, if it is a tensor of that type and shape with finite numbers."""
    if not isinstance(value, Tensor) or (value.dtype, tuple(value.shape)) != (dtype, shape):
        raise wrong_value(what, value, f"{str(dtype).removeprefix('torch.')}{list(shape)}")
    if not bool(value.isfinite().all()):
        raise UserError(f"{what} holds numbers that are not finite.")
    return value.detach()
