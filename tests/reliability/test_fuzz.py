"""At least 10,000 hostile inputs for everything that reads a file or an option.

Two kinds of inputs. *Damage*: a small valid file with bits flipped, or a piece cut out, inserted or replaced, also by
one of another valid file. Of our own formats it must be refused, or hold exactly what one of the two held; so must the
published codes' files, whose checksums are verified; an image must be refused or be one. *Lies*: files whose
checksums are right, because whoever made them knows how, but which say what no file of ours would: values that are
absurd, missing, or of another type, tensors of other types and shapes. They must be refused, or be valid objects.

Refused means a `UserError`; any other exception fails. Memory is limited to a gigabyte more than at the start, and an
input may take half a minute.
"""

import collections
import contextlib
import copy
import dataclasses
import json
import os
import random
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import little_memory, little_time
from conftest import Note
from loaders import LOADERS, NETWORK, TENSORS, small_set, write_buffer, written
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

import cddlib
from cddbook.__main__ import parse_grid
from cddlib import cli, evaluate, protocol
from cddlib.data import dataset as data
from cddlib.data.pictures import read_picture
from cddlib.data.preprocessing import Normalisation, fit_preprocessing
from cddlib.exchange import published
from cddlib.experts.buffer import Buffer
from cddlib.methods.recipes import METHODS
from cddlib.runtime.config import as_dict
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import add_checksum, read_json, signature, tensor_digest, verify_checksum
from cddlib.runtime.random import generator
from cddlib.synthetic import SyntheticSet

INPUTS = 10_000
PREPARE = sys.modules["cddlib.data.download"]  # whose function hides it
Attempt = Callable[[random.Random], bool]
"""Reads one input that it makes from random numbers; whether the object is the original."""


def fuzz(note: Note, loader: str, kind: str, attempt: Attempt) -> collections.Counter[str]:
    """Make `INPUTS` attempts; notes, and returns, what became of them."""
    counts: collections.Counter[str] = collections.Counter(dict.fromkeys(("refused", "unchanged", "valid"), 0))
    sentences = set()
    with little_memory():
        for number in range(INPUTS):
            try:
                with little_time():
                    counts["unchanged" if attempt(random.Random(f"{loader} {number}")) else "valid"] += 1
            except UserError as error:
                counts["refused"] += 1
                sentences.add(re.sub(r"\(.*\)|'.*'|\".*\"|[\d./]+|: .*", "", str(error).split(" ", 1)[1]))
                assert "\n" not in str(error)
    note("loaders", loader=loader, kind=kind, inputs=counts.total(), **counts, sentences=len(sentences))
    assert counts["refused"] > INPUTS // 100
    return counts


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder, in memory if there is such a file system: disks are slow at writing a file anew."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


# --- Damage -----------------------------------------------------------------------------------------------------

EXTREMES = [struct.pack("<Q", value) for value in (0, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**64 - 1)]


def damaged(whole: bytes, other: bytes, rng: random.Random) -> bytes:
    """`whole` with some bits flipped, or with a piece replaced by another; either may be nothing."""
    if rng.random() < 0.3:
        spoilt = bytearray(whole)
        for _ in range(rng.randrange(8)):
            spoilt[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        return bytes(spoilt)
    at, size = rng.randrange(len(whole) + 1), rng.randrange(1, 1 + rng.choice((1, 16, len(whole))))
    source = rng.choice((whole, other, rng.choice(EXTREMES), bytes([rng.randrange(256)]) * size))
    start = rng.choice((0, rng.randrange(len(source) + 1)))
    piece = source[start : start + size]
    return whole[:at] + piece + whole[at + rng.choice((0, len(piece), size, len(whole))) :]


@pytest.mark.parametrize("name", LOADERS)
def test_damage_is_refused_or_harmless(memory: Path, note: Note, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fit_preprocessing(data.load("digits"), zca=False)
    monkeypatch.setattr(published, "fit_preprocessing", lambda dataset, zca: fitted)  # which takes long
    loader = LOADERS[name]
    path, another = written(loader, memory)
    whole, other, wanted = path.read_bytes(), another.read_bytes(), loader.read(path)
    contents = [wanted]
    with contextlib.suppress(UserError):  # of an expert that the buffer does not have
        path.write_bytes(other)
        contents.append(loader.read(path))

    def attempt(rng: random.Random) -> bool:
        path.write_bytes(damaged(whole, other, rng))
        found = loader.read(path)
        assert found in contents
        return found == wanted

    assert fuzz(note, name, "damaged", attempt)["unchanged"]


FORMS: list[Any] = [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("BMP", {}), ("PPM", {})]


def test_damaged_images_are_refused_or_images(memory: Path, note: Note) -> None:
    """No checksum tells whether an image is damaged."""
    files = []
    for number, (form, options) in enumerate(FORMS):
        pixels = torch.randint(256, (9, 11, 3), generator=generator("fuzz", number)).byte()
        Image.fromarray(pixels.numpy()).save(memory / "image", form, **options)
        files.append((memory / "image").read_bytes())

    def attempt(rng: random.Random) -> bool:
        whole, other = rng.sample(files, 2)
        spoilt = damaged(whole, other, rng)
        (memory / "image").write_bytes(spoilt)
        assert len(read_picture(str(memory / "image"), 4)) == 3 * 4 * 4
        return spoilt == whole

    fuzz(note, "image", "damaged", attempt)


def test_damaged_annotations_of_tiny_imagenet_are_refused_or_stay_in_their_folder(memory: Path, note: Note) -> None:
    path = memory / "val_annotations.txt"
    whole = b"".join(b"val_%d.JPEG\tn0144%d\t0\t32\t44\t62\n" % (i, i % 3) for i in range(5))
    other = b"../../a.png\tn01440\t0\n..\tn01441\n/etc/passwd\tn01442\n"

    def attempt(rng: random.Random) -> bool:
        path.write_bytes(damaged(whole, other, rng))
        found = PREPARE._annotated(path, {f"n0144{i}": i for i in range(3)})
        assert found and all(Path(file).parent == memory / "images" for file, _ in found)
        return len(found) == 5

    fuzz(note, "annotations", "damaged", attempt)


# --- Lies -------------------------------------------------------------------------------------------------------

VALUES: list[Any] = [0, -1, 1, 2, 3, 64, 65, 4096, 4097, 10**6, 2**31, 2**62, 10**30, -(10**300)]
VALUES += [True, False, None, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), "", "x", "digits", "none", "../x"]
VALUES += ["convnet", "vit", "vgg11", "densenet121", "layer", [], {}, [[]], {"a": 1}, [1, 8, 8], [0], [1] * 1000]
VALUES += [[2**60] * 3, [3, 4096, 4096], [1.0, 8, 8], ["a"], [None], [float("nan")], {"experts": 3}, "\ud800", "a\nb"]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everywhere in JSON: a list or table, and an index or key of it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def lie(value: Any, rng: random.Random) -> Any:
    """`value`, JSON, with something in it replaced, left out, added or repeated."""
    value = json.loads(json.dumps(value))
    place, key = rng.choice([*places(value)])
    how, other = rng.randrange(8), copy.deepcopy(rng.choice(VALUES))
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place, list):
        place.insert(key, place[key])
    elif how == 2 and isinstance(place, dict):
        place["more"] = other
    else:
        place[key] = other
    return value


TYPES = (torch.double, torch.half, torch.int, torch.bool, torch.float8_e5m2)
TENSOR_LIES: list[Callable[[Tensor], Tensor]] = [
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in TYPES),
    lambda t: t[None],
    *(lambda t, part=part: t.flatten()[part] for part in (slice(None), slice(0), slice(1), 0)),
    lambda t: torch.cat([t.flatten()] * 3),
    lambda t: t.transpose(0, -1) if t.ndim else t,
    lambda t: -t,
    lambda t: t * 0,
    *(lambda t, number=number: t.float() + float(number) for number in ("nan", "inf")),
    lambda t: t + 1,
    *(lambda t, shape=shape: t.new_zeros(shape) for shape in ([0, 2**60], [2**40, 0], [1] * 20)),
]


def lie_in_tensors(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """The tensors with one of them changed, left out, added or renamed."""
    name, how, changed = rng.choice(sorted(tensors)), rng.randrange(8), dict(tensors)
    if how == 0:
        del changed[name]
    elif how == 1:
        changed["more"] = changed.pop(name)
    elif how == 2:
        changed[name] = changed[rng.choice(sorted(tensors))].clone()
    elif how != 3:
        changed[name] = rng.choice(TENSOR_LIES)(changed[name]).contiguous()
    return changed


@pytest.mark.parametrize("name", TENSORS)
def test_lies_in_tensors_and_headers(memory: Path, note: Note, name: str) -> None:
    loader = LOADERS[name]
    path, _ = written(loader, memory)
    whole, wanted = path.read_bytes(), loader.read(path)
    tensors, length = load(whole), int.from_bytes(whole[:8], "little")
    ((kind, text),) = json.loads(whole[8 : 8 + length])["__metadata__"].items()
    header = verify_checksum(text, "the valid file")
    known = {id(tensor): signature(tensor) for tensor in tensors.values()}

    def attempt(rng: random.Random) -> bool:
        told, said = lie_in_tensors(tensors, rng), dict(header)
        if "digests" in said:
            said["digests"] = {part: known.get(id(tensor)) or signature(tensor) for part, tensor in told.items()}
        if "vectors" in said:
            with contextlib.suppress(KeyError, IndexError, RuntimeError):  # they have no vectors that could be digested
                said["vectors"] = [
                    tensor_digest(torch.cat([told[part][epoch].flatten() for part in NETWORK.shapes]))
                    for epoch in range(3)
                ]
        if rng.random() < 0.5:
            said = lie(said, rng)
        path.write_bytes(save(told, {kind: json.dumps(add_checksum(said))}))
        return loader.read(path) == wanted

    fuzz(note, name, "lying", attempt)


def read_buffer(path: Path) -> None:
    buffer = Buffer(path.parent)
    assert isinstance(buffer.preprocessing, Normalisation)
    buffer.parameters(0, buffer.epochs)


def read_config(path: Path) -> None:
    """As `cddlib evaluate` does."""
    trainer = evaluate.Trainer(path.parent, None, root=path.parent, device="cpu")
    assert trainer.config.evaluation_epochs <= protocol.MOST_EPOCHS


ACCURACIES = {"synthetic": [0.5, 1.0], "random_real": [0.25], "full": []}
CONFIG = as_dict(cddlib.distill_recipe("contra", "digits", 1))
RECORDS: dict[str, tuple[str, dict[str, Any], Callable[[Path], object]]] = {
    "buffer.json": ("buffer.json", {}, read_buffer),
    "config.json": ("config.json", {**CONFIG, "data_fingerprint": data.load("digits").fingerprint}, read_config),
    "evaluation record": (
        "evaluation-0.json",
        {"accuracies": ACCURACIES, "by_class": {"synthetic": [[0.5] * 10] * 2}, "seconds": 1.5, "seed": 0},
        lambda path: evaluate._resume(path, [("synthetic", 2), ("full", 0)])[1],
    ),
}
"""Files of JSON: what a valid one says, if not what `write_buffer` writes, and what reads it."""


@pytest.mark.parametrize("name", RECORDS)
def test_lies_in_records(memory: Path, note: Note, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, honest, read = RECORDS[name]
    write_buffer(memory, 0)
    honest = honest or read_json(memory / file)
    own = {"images": torch.zeros(10, 1, 8, 8), "labels": torch.arange(10), "label_logits": None, "subsets": 1}
    start = small_set(0, **own, classes=tuple("0123456789"))
    start.save(memory / "synthetic.safetensors")
    monkeypatch.setattr(SyntheticSet, "load", lambda path: start)

    def attempt(rng: random.Random) -> bool:
        told = honest
        for _ in range(rng.randrange(3)):
            told = lie(told, rng)
        (memory / file).write_text(json.dumps(add_checksum(told)))
        read(memory / file)
        return told == honest

    assert fuzz(note, name, "lying", attempt)["unchanged"]


# --- Options ----------------------------------------------------------------------------------------------------

FIELDS = [field.name for field in dataclasses.fields(cddlib.DistillConfig)]
PIECES = [*FIELDS[:8], *METHODS, *data.DATA_NAMES, *"=,.-_ 0123456789²", "10,30", "1e999", "nan", "none", "true"]
PIECES += ["9" * 5000, "0x1", "--", "../", "~", "$(true)", "';'", "\ud800", "\u2028"]
OPTIONS = ["--method", "--data", "--ipc", "--segments", "--buffer", "--experts", "--"]


def words(rng: random.Random, most: int) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(most)))


def test_grids_of_a_search(note: Note) -> None:
    def attempt(rng: random.Random) -> bool:
        assert parse_grid([rng.choice((f"{rng.choice(FIELDS)}=", "")) + words(rng, 4)]).keys() <= set(FIELDS)
        return False  # there is no original

    fuzz(note, "grid of a search", "any", attempt)


def test_options_that_choose_a_recipe(note: Note) -> None:
    def attempt(rng: random.Random) -> bool:
        pairs = [(rng.choice(OPTIONS), words(rng, 3)) for _ in range(rng.randrange(4))]
        chosen = cli.recipe_choices(["distill", *(word for pair in pairs for word in pair)])
        try:
            experts = cli.chosen_buffer_recipe(chosen)
            assert cli.chosen_recipe(chosen).data.data == experts.data.data
        except OSError as error:  # of a name that no file can have, which `main` reports
            raise UserError(f"the system says {error}") from None
        return False

    fuzz(note, "options", "any", attempt)
