"""Files of `torch.save` (PyTorch 1.6 or later), read without unpickling them.

Such a file is a zip archive without compression: an entry of numbers for each storage, and `data.pkl`, a program for
Python's pickle machine that arranges them. The machine may call any function, so the program is not run but read: the
few instructions that tensors, lists and numbers are made of have a meaning here, and any other is refused.

Every entry's checksum is verified. No number is used twice: what is read takes no more memory, and whoever walks
through it no more time, than the length of the file allows.
"""

import io
import math
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from cddlib.runtime.errors import UserError

LARGEST_PROGRAM = 2**23
"""Bytes of the longest `data.pkl` that is read, enough for 80,000 tensors."""
LARGEST_DIRECTORY = 2**24
"""Bytes of the longest directory of an archive, enough for more than as many."""
MOST_AXES = 8

_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_REBUILD, _PARAMETER, _HOOKS = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
)


class _Name(str):
    """What an instruction of the program calls by its name."""


class _Storage(NamedTuple):
    """An entry of numbers."""

    key: str
    numbers: Shaped[Tensor, " n"]


def read_torch_file(path: Path) -> object:
    """What `torch.save` put into `path`: tensors, lists and numbers. Tensors are mapped from the file, read-only.

    Raises:
        UserError: the file is missing, damaged, of another kind, or holds anything else; or its tensors share numbers,
            because they were saved without being copied.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file.")
    try:
        with _Reader(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            return _Program(path, file, archive).read()
    except UserError:
        raise
    except Exception as error:  # a damaged archive or program can fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path} cannot be read: {reason}; it must be a file of torch.save (PyTorch 1.6 or later) with tensors, "
            f"lists and numbers and no other objects, which are never loaded because they can run code."
        ) from None


class _Reader(io.BufferedReader):
    """A file that never reads much at once, because `zipfile` reads an archive's directory as a whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST_DIRECTORY:
            raise ValueError(f"its directory has {size} bytes, more than {LARGEST_DIRECTORY}")
        return super().read(size)


class _Program:
    """The program of a file, and the numbers that it arranges."""

    def __init__(self, path: Path, file: io.BufferedReader, archive: zipfile.ZipFile) -> None:
        self.path, self.file = path, file
        self.entries = _checked_entries(archive, path.stat().st_size)
        self.text = archive.read(self.entries["data.pkl"])
        if "byteorder" in self.entries and archive.read(self.entries["byteorder"]) != b"little":
            raise ValueError("its numbers are not little-endian")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.bytes: UInt8[Tensor, " n"] = torch.from_numpy(np.memmap(path, np.uint8, "r"))
        self.free: dict[str, int] = {}
        """How many bytes of each storage no tensor has taken yet."""

    def read(self) -> object:
        """What the program arranges."""
        stack: list[Any] = []
        marked: list[list[Any]] = []  # stacks that wait below a mark
        memo: dict[int, Any] = {}
        argument: Any
        for instruction, argument, _ in pickletools.genops(self.text):
            match instruction.name:
                case "PROTO":
                    pass
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(argument)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(instruction.name == "NEWTRUE")
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "MARK":
                    marked.append(stack)
                    stack = []
                case "TUPLE":
                    marked[-1].append(tuple(stack))
                    stack = marked.pop()
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    size = int(instruction.name[-1])
                    stack[-size:] = [tuple(stack[-size:])]
                case "APPEND":
                    item = stack.pop()
                    list.append(stack[-1], item)
                case "APPENDS":
                    list.extend(marked[-1][-1], stack)
                    stack = marked.pop()
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    if not isinstance(
                        memo[argument], str
                    ):  # torch.save repeats nothing else, unless it is in two places
                        self._refuse_sharing()
                    stack.append(memo[argument])
                case "GLOBAL":
                    if argument not in {*_DTYPES, _REBUILD, _PARAMETER, _HOOKS}:
                        raise ValueError(f"its program names {argument.replace(' ', '.', 1)}")
                    stack.append(_Name(argument))
                case "BINPERSID":
                    stack.append(self._storage(*stack.pop()))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(self._call(stack.pop(), arguments))
                case "STOP":
                    return stack.pop()
                case other:
                    raise ValueError(f"its program has the instruction {other}")
        raise ValueError("its program has no end")

    def _storage(self, kind: str, dtype: str, key: str, _device: str, size: int) -> _Storage:
        """The numbers of an entry."""
        entry = self.entries[f"data/{key}"]
        if kind != "storage" or entry.file_size != size * _DTYPES[dtype].itemsize:
            raise ValueError(f"entry data/{key} has {entry.file_size} bytes, not {size} numbers of {dtype}")
        self.file.seek(entry.header_offset)
        header = self.file.read(30)  # its last four bytes are the lengths of the name and of what follows it
        start = entry.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        self.free.setdefault(key, entry.file_size)
        return _Storage(key, self.bytes[start : start + entry.file_size].view(_DTYPES[dtype]))

    def _call(self, name: object, arguments: tuple[Any, ...]) -> object:
        """What the function of that name would return."""
        if not isinstance(name, _Name):
            raise ValueError(f"its program calls a {type(name).__name__}")
        if name == _HOOKS and not arguments:
            return None
        if name == _PARAMETER and isinstance(arguments[0], Tensor):
            return arguments[0]
        if name == _REBUILD:
            storage, offset, shape, strides, _requires_grad, _hooks = arguments
            return self._tensor(storage, offset, shape, strides)
        raise ValueError(f"its program calls {name.replace(' ', '.', 1)} with other arguments than torch.save")

    def _tensor(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """The tensor of that shape at that place among the numbers of a storage."""
        if len(shape) > MOST_AXES or min((offset, *shape, *strides)) < 0:
            raise ValueError(f"one of its tensors has the shape {str(shape)[:100]}, at {offset}")
        count, last = math.prod(shape), offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        self.free[storage.key] -= count * storage.numbers.itemsize
        if self.free[storage.key] < 0:
            self._refuse_sharing()
        if count and last >= len(storage.numbers):
            raise ValueError(f"one of its tensors lies outside of its storage of {len(storage.numbers)} numbers")
        return storage.numbers.as_strided(shape, strides, storage.numbers.storage_offset() + offset)

    def _refuse_sharing(self) -> NoReturn:
        raise UserError(
            f"{self.path} holds tensors that share their numbers: they were saved without being copied, as the "
            f"published codes do on a CPU, and cannot be told apart."
        )


def _checked_entries(archive: zipfile.ZipFile, length: int) -> dict[str, zipfile.ZipInfo]:
    """The entries below the folder that every file of `torch.save` has, by name; all of them checked."""
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    folders = {entry.filename.partition("/")[0] for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()) or len(folders) != 1 or "data.pkl" not in entries:
        raise ValueError("its entries are not those of torch.save")
    for name, entry in entries.items():
        if (entry.compress_type, entry.compress_size) != (zipfile.ZIP_STORED, entry.file_size):
            raise ValueError(f"its entry {name} is compressed")
    if sum(entry.file_size for entry in entries.values()) > length:
        raise ValueError("its entries are longer than the file")
    if entries["data.pkl"].file_size > LARGEST_PROGRAM:
        raise ValueError(f"its program has {entries['data.pkl'].file_size} bytes, more than {LARGEST_PROGRAM}")
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its entry {damaged} does not have the CRC-32 that the archive names")
    return entries
