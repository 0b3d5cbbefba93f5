"""Files that say when they are damaged: written whole or not at all, with a checksum inside.

A JSON file carries the checksum of its value. A safetensors file carries one of its header, and in the header a digest
of every tensor. Whoever reads a file checks what it reads: a truncated file or a flipped bit ends in a sentence that
names the file. Checksums find damage; they do not prove who wrote a file.
"""

import contextlib
import hashlib
import json
import os
import reprlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cddlib.runtime.errors import UserError, is_out_of_memory

CHECKSUM = "checksum"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` in the error of a write that fails: the system's own may name no file, safetensors' is another."""
    try:
        yield
    except SafetensorError as error:  # Error while serializing: I/O error: …
        raise OSError(f"cannot write {path}: {str(error).split(': ')[-1]}") from None
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path.parent} is not a folder, or lies in a file; choose another place.") from None
    except OSError as error:
        if error.strerror is None:  # it is named
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary folder in the folder of `path`, in which something is written before it gets that name."""
    folder = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file below the folder of `path`, flush it to disk, then rename it to `path`."""
    with writing(path), _beside(path) as folder:  # a folder, for safetensors has a temporary file of its own
        temporary = folder / path.name
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def link_or_copy(source: Path, goal: Path) -> None:
    """Give a file that nobody changes a second name; where file systems do not link, a copy."""
    with writing(goal):
        try:
            os.link(source, goal)
        except OSError:
            write_atomically(goal, lambda temporary: shutil.copyfile(source, temporary))


def refuse_filled(folder: Path) -> None:
    """Raise `UserError` unless `folder` is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another.")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that gets the name `folder` when all is written; raises `UserError` if that is not empty."""
    refuse_filled(folder)
    folder = folder.resolve()
    with _beside(folder) as temporary:
        yield temporary
        os.replace(temporary, folder)


# --- Checksums --------------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Sixteen hex digits of the SHA-256 of a tensor's numbers."""
    contents = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(contents.numpy().data).hexdigest()[:16]


def signature(tensor: Tensor) -> str:
    """Type, shape and digest of a tensor, as the header of its file names them."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} {tensor_digest(tensor)}"


def add_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """`value` with the checksum of its JSON added."""
    text = json.dumps(value, sort_keys=True)
    return {**value, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()[:16]}


def parse_json(text: str | bytes, where: str) -> Any:
    """The value that `text` is the JSON of; raises `UserError` naming its source, `where`, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as JSON: {error}.") from None


def verify_checksum(text: str | bytes, where: str) -> dict[str, Any]:
    """The value that `add_checksum` was given, from its JSON.

    Raises:
        UserError: the value is damaged; `where` names its source.
    """
    value = parse_json(text, where)
    try:
        whole = value.pop(CHECKSUM) == add_checksum(value)[CHECKSUM]
    except (AttributeError, KeyError, TypeError, RecursionError):  # no table, or lists that are nested too deeply
        whole = False
    if not whole:
        raise UserError(f"{where} does not have the checksum of its contents: it is damaged, or of another program.")
    return value


# --- JSON -------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON with its checksum, atomically."""
    text = json.dumps(add_checksum(value), indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote to `path`; raises `UserError` naming the file if it is missing or damaged."""
    return verify_checksum(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """The contents of a small file; raises `UserError` if it is missing or cannot be read."""
    with _reading(path):
        return path.read_bytes()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within, a file that cannot be read ends in a `UserError`."""
    try:
        if not path.is_file():  # whoever reads a pipe or a device may wait, or read, forever
            raise UserError(f"{path} is not a file." if path.exists() else f"{path} does not exist.")
        yield
    except (SafetensorError, OSError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{path}: {error}") from None
        if isinstance(error, SafetensorError):
            raise UserError(f"{path} is truncated or not a safetensors file ({error}).") from None
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


# --- Tensors ----------------------------------------------------------------------------------------------------


def write_tensors(
    path: Path, tensors: dict[str, Tensor], kind: str, header: dict[str, Any] | None = None, *, digests: bool = True
) -> None:
    """Write `tensors` as safetensors, atomically.

    The file's metadata have one key, `kind`, with `header` and the tensors' digests as sealed JSON. One, because
    safetensors writes several in random order, and the same run has to give the same bytes. Without `digests`, the
    header has some of another kind, for a file that is never read as a whole.
    """
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    found = {"digests": {name: signature(tensor) for name, tensor in contents.items()}} if digests else {}
    metadata = {kind: json.dumps(add_checksum({**(header or {}), **found}))}
    write_atomically(path, lambda temporary: save_file(contents, temporary, metadata=metadata))


def open_tensors(path: Path, framework: str = "pt") -> Any:
    """A lazy reader (`safetensors.safe_open`) of `path`, which checks no digest; raises `UserError` if it cannot be."""
    with _reading(path):
        return safe_open(path, framework=framework)


def read_header(file: Any, path: Path, kind: str) -> dict[str, Any]:
    """The sealed header of an open safetensors `file`; raises `UserError` if it is damaged or of another kind."""
    metadata = file.metadata() or {}
    if kind not in metadata:
        raise UserError(f"{path} has no {kind!r} in its header: it is damaged, or another program wrote it.")
    return verify_checksum(metadata[kind], f"the header of {path}")


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the header that `write_tensors` wrote; raises `UserError` if anything is damaged or missing."""
    file = open_tensors(path)
    header = read_header(file, path, kind)
    digests = header.pop("digests", None)
    try:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # types that torch does not have, shapes that no tensor can have
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} holds a tensor that cannot be read ({' '.join(str(error).split())[:200]}).") from None
    if digests != {name: signature(tensor) for name, tensor in tensors.items()}:
        raise UserError(f"{path} is damaged: its tensors do not have the digests that its header names.")
    return tensors, header


def check_classes(classes: Any, path: Path) -> tuple[str, ...]:
    """`classes` from the header of `path` as a tuple of names; raises `UserError` if they are anything else."""
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path} has classes in its header that are not a list of names: {reprlib.repr(classes)}.")
    return tuple(classes)
