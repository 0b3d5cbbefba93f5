"""At least 10,000 hostile inputs for everything that reads a file or an option.

Two kinds of inputs. *Damage*: a small valid file with bits flipped, bytes overwritten, pieces cut out, inserted, moved,
or taken from another valid file. Of our own formats it must be refused, or hold exactly what it held; so must the
published codes' files, whose checksums are verified; an image must be refused or be one. *Lies*: files whose
checksums are right, because whoever made them knows how, but which say what no file of ours would: values that are
absurd, missing, or of another type, tensors of other types and shapes. They must be refused, or be valid objects.

Refused means a `UserError`; any other exception fails. Memory is limited to a gigabyte more than at the start, and an
input may take half a minute.
"""

import contextlib
import copy
import dataclasses
import json
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from bounds import little_memory, little_time
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

import cddlib
from cddbook.__main__ import parse_grid
from cddlib import cli, evaluate, protocol
from cddlib.data import dataset as data
from cddlib.data.dataset import DataConfig
from cddlib.data.pictures import read_picture
from cddlib.data.preprocessing import Normalisation, fit_preprocessing
from cddlib.distillation.checkpoint import CHECKPOINT, State
from cddlib.exchange import published
from cddlib.experts.buffer import PREPROCESSING, Buffer, expert_path, read_preprocessing, write_trajectory
from cddlib.methods.recipes import METHODS
from cddlib.networks.convnet import Network
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import as_dict
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import (
    add_checksum,
    read_json,
    signature,
    tensor_digest,
    verify_checksum,
    write_json,
    write_tensors,
)
from cddlib.runtime.random import generator
from cddlib.runtime.run_folder import Metrics, parse_metrics
from cddlib.synthetic import SyntheticSet

INPUTS = 10_000
BATCH = 20
"""Inputs that hypothesis chooses at a time, which it does not do fast."""
PREPARE = sys.modules["cddlib.data.download"]  # whose function hides it


# --- Counts ------------------------------------------------------------------------------------------


class Tally:
    """What became of the inputs of a loader."""

    def __init__(self, notes: dict[str, Any], loader: str, kind: str) -> None:
        self.loader, self.kind, self.notes = loader, kind, notes
        self.inputs = self.refused = self.unchanged = 0
        self.sentences: set[str] = set()

    def run(self, size: int, attempt: Callable[[bytes], bool]) -> None:
        """Give `attempt` inputs made from `size` bytes each; it says whether the object it read is the original."""
        length = BATCH * size

        @hypothesis.settings(max_examples=-(-INPUTS // BATCH), database=None)
        @hypothesis.given(st.binary(min_size=length, max_size=length))
        def several(choices: bytes) -> None:
            for start in range(0, length, size):
                self._try(attempt, choices[start : start + size])

        with little_memory():
            several()
        found = {name: getattr(self, name) for name in ("loader", "kind", "inputs", "refused", "unchanged")}
        found["valid"] = self.inputs - self.refused - self.unchanged  # other objects, as valid as the original
        self.notes.setdefault("loaders", []).append({**found, "sentences": len(self.sentences)})
        assert self.inputs >= INPUTS
        assert self.refused > INPUTS // 100

    def _try(self, attempt: Callable[[bytes], bool], choice: bytes) -> None:
        self.inputs += 1
        try:
            with little_time():
                self.unchanged += attempt(choice)
        except UserError as error:
            self.refused += 1
            self.sentences.add(re.sub(r"\(.*\)|'.*'|\".*\"|[\d./]+|: .*", "", str(error).split(" ", 1)[1]))
            assert "\n" not in str(error)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder, in memory if there is such a file system: disks are slow at writing a file anew."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


# --- Damage -----------------------------------------------------------------------------------------------------

EXTREMES = [struct.pack("<Q", value) for value in (0, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**64 - 1)]
EDIT = struct.Struct("<BIIIB")


def damaged(whole: bytes, other: bytes, edit: bytes) -> bytes:
    """`whole` after what `edit` says was done to it, perhaps nothing."""
    kind, first, second, length, value = EDIT.unpack(edit)
    at, to = first % (len(whole) + 1), second % (len(whole) + 1)
    size = length % (16 if length % 2 else len(whole) // 2)
    match kind % 10:
        case 0:  # a flipped bit
            at %= len(whole)
            return whole[:at] + bytes([whole[at] ^ 1 << value % 8]) + whole[at + 1 :]
        case 1:  # another byte
            return whole[:at] + bytes([value]) + whole[at + 1 :]
        case 2:  # a run of one byte
            return whole[:at] + bytes([value]) * len(whole[at : at + size]) + whole[at + size :]
        case 3:  # cut off
            return whole[:at]
        case 4:  # something inserted
            return whole[:at] + (bytes([value]) * size if value % 2 else whole[to : to + size]) + whole[at:]
        case 5:  # something cut out
            return whole[:at] + whole[at + size :]
        case 6:  # two pieces change places
            a, b = sorted((at, to))
            n = min(size, b - a)
            return whole[:a] + whole[b : b + n] + whole[a + n : b] + whole[a : a + n] + whole[b + n :]
        case 7:  # a number that is a length somewhere
            return whole[:at] + EXTREMES[value % 8][: 2 ** (length % 4)] + whole[at + 2 ** (length % 4) :]
        case 8:  # the beginning of another file
            return other[: first % (len(other) + 1)] + whole[at if value % 2 else to :]
        case _:  # several bits
            spoilt = bytearray(whole)
            for number in range(value % 8):
                spoilt[(first + number * second) % len(whole)] ^= 1 << (length + number) % 8
            return bytes(spoilt)


@dataclasses.dataclass
class Loader:
    """A small valid file, another one of its kind, and how it is read."""

    path: Path
    other: Path
    read: Callable[[Path], Any]
    """What it returns for another file is compared with what it returns for the valid one."""


def json_file(folder: Path) -> Loader:
    write_json(folder / "a", {"α": [1, 2.5, None, True, "x" * 20, {"b": -1e-9}], "experts": []})
    write_json(folder / "b", {"α": [1, 2.5, None, True, "y" * 20, {"b": -2e-9}], "classes": {}})
    return Loader(folder / "a", folder / "b", lambda path: json.dumps(read_json(path)))


def bits(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: signature(tensor) for name, tensor in tensors.items()}


RECIPE = {"depth": 1, "width": 2, "experts": 1, "epochs": 2}


def tiny_network() -> Network:
    return build_network(cddlib.buffer_recipe("digits", **RECIPE).network, (1, 8, 8), 10)


def tiny_buffer(folder: Path, key: int = 0) -> Path:
    """A buffer of one expert of a network of 366 parameters."""
    config = cddlib.buffer_recipe("digits", **RECIPE)
    network = tiny_network()
    expert = [network.init(generator("fuzz", key, epoch)) for epoch in range(3)]
    record = {"buffer": "0123456789ab", "seed": key, "train_loss": [1.0, 0.5], "validation_accuracy": [0.1, 0.5, 0.6]}
    write_trajectory(expert_path(folder, 0), network, expert, record)
    digits = {"name": "digits", "fingerprint": "0" * 16, "shape": [1, 8, 8], "classes": 10}
    write_json(folder / "buffer.json", {"config": as_dict(config), "data": digits, "experts": [record]})
    normalisation = Normalisation(torch.tensor([0.5]), torch.tensor([0.25]))
    write_tensors(folder / PREPROCESSING, normalisation.tensors(), "preprocessing")
    return folder


def manifest(folder: Path) -> Loader:
    path, other = (tiny_buffer(folder / name, key) / "buffer.json" for key, name in enumerate("ab"))
    return Loader(path, other, lambda path: Buffer(path.parent).id)


def preprocessing_file(folder: Path) -> Loader:
    path, other = (tiny_buffer(folder / name) / PREPROCESSING for name in "ab")
    write_tensors(other, {"mean": torch.tensor([0.5]), "std": torch.tensor([0.75])}, "preprocessing")
    return Loader(path, other, lambda path: bits(read_preprocessing(path.parent, (1, 8, 8)).tensors()))


def expert_file(folder: Path) -> Loader:
    path, other = (expert_path(tiny_buffer(folder / name, key), 0) for key, name in enumerate("ab"))
    buffer = Buffer(folder / "a")

    def read(path: Path) -> list[str]:
        buffer._files.clear()  # which it opened before
        return [tensor_digest(buffer.parameters(0, epoch)) for epoch in range(3)]

    return Loader(path, other, read)


def small_set(key: int = 0) -> SyntheticSet:
    """Two images for each of three classes."""
    rng = generator("fuzz", key)
    return SyntheticSet(
        images=torch.randn(6, 1, 2, 3, generator=rng),
        labels=torch.arange(3).repeat_interleave(2),
        label_logits=torch.randn(6, 3, generator=rng),
        step_size=torch.tensor(0.125),
        preprocessing=Normalisation(torch.tensor([0.5]), torch.tensor([0.25])),
        classes=("a", "β", "c"),
        subsets=2,
    )


def described(synthetic: SyntheticSet) -> Any:
    tensors = {**synthetic.variable_tensors(), "labels": synthetic.labels, **synthetic.preprocessing.tensors()}
    return bits(tensors), synthetic.classes, synthetic.subsets


def synthetic_file(folder: Path) -> Loader:
    for key, name in enumerate("ab"):
        small_set(key).save(folder / name)
    return Loader(folder / "a", folder / "b", lambda path: described(SyntheticSet.load(path)))


REMEDIED = cddlib.distill_recipe("contra", "digits", 1, ema=0.99, momentum_images=0.5, consolidation="ewc")


def checkpoint(folder: Path) -> Loader:
    for name in "ab":
        state = State(REMEDIED, small_set())
        gradients = [torch.ones_like(variable) for variable in state.synthetic.variables()]
        state.optimizer.step(gradients, torch.arange(6), 1)
        state.progress.iteration = 1
        state.consider(state.optimizer.candidate(), 0.5 if name == "a" else 0.75)
        state.save(folder / name)

    def read(path: Path) -> Any:
        state = State(REMEDIED, small_set())
        state.read(path)
        tensors = bits(state.optimizer.tensors)
        return (
            tensors,
            described(state.synthetic),
            state.best and described(state.best),
            dataclasses.astuple(state.progress),
        )

    return Loader(*(folder / name / CHECKPOINT for name in "ab"), read)


def cache(folder: Path) -> Loader:
    for key, name in enumerate("ab"):
        rng = generator("fuzz", key)
        parts = [
            data.Images(torch.randint(256, (n, 3, 2, 2), generator=rng).byte(), torch.arange(n) % 2) for n in (4, 2)
        ]
        tensors = {"train_images": parts[0].store, "train_labels": parts[0].labels}
        tensors |= {"test_images": parts[1].store, "test_labels": parts[1].labels}
        header = {"classes": ["a", "b"], "fingerprint": data.fingerprint(*parts)}
        write_tensors(folder / name / "cifar10.safetensors", tensors, "dataset", header, digests=False)

    def read(path: Path) -> Any:
        found = data.load("cifar10", path.parent)
        return found.fingerprint, found.classes, found.shape

    return Loader(folder / "a" / "cifar10.safetensors", folder / "b" / "cifar10.safetensors", read)


def metrics_file(folder: Path) -> Loader:
    """Four lines of metrics, whose digest the reader knows."""
    digests = []
    for number, name in enumerate("ab"):
        metrics = Metrics(folder / name, resume_at=-1)
        for iteration in range(4):
            metrics.write({"iteration": iteration, "loss": 0.5 * iteration + number, "matched": [[0, 1], [0, 3]]})
        digests.append(metrics.sync())
        metrics.close()
    return Loader(folder / "a", folder / "b", lambda path: json.dumps(parse_metrics(path, digests[0])))


def published_set(folder: Path) -> Loader:
    rng = generator("fuzz", "published")
    for name in "ab":
        torch.save(torch.randn(10, 1, 8, 8, generator=rng), folder / name)
    torch.save(torch.randn(10, 10, generator=rng), folder / "labels")

    def read(path: Path) -> Any:
        config = DataConfig(data="digits")
        return described(published.import_set(path, folder / "labels", config, step_size=0.5))

    return Loader(folder / "a", folder / "b", read)


def replay_buffer(folder: Path) -> Loader:
    network = tiny_network()
    rng = generator("fuzz", "replay")
    for name in "ab":
        epochs = [[torch.randn(shape, generator=rng) for shape in network.shapes.values()] for _ in range(2)]
        torch.save([epochs], folder / name)

    def read(path: Path) -> Any:
        experts = published._read_experts([path], network)
        return [[signature(theta) for theta in snapshots] for _, _, snapshots in experts]

    return Loader(folder / "a", folder / "b", read)


LOADERS: dict[str, Callable[[Path], Loader]] = {
    "JSON file": json_file,
    "buffer.json": manifest,
    "preprocessing": preprocessing_file,
    "expert": expert_file,
    "synthetic set": synthetic_file,
    "checkpoint": checkpoint,
    "data set": cache,
    "metrics": metrics_file,
    "published set (.pt)": published_set,
    "replay buffer (.pt)": replay_buffer,
}


@pytest.mark.parametrize("name", LOADERS)
def test_damage_is_refused_or_harmless(
    memory: Path, notes: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit_preprocessing(data.load("digits"), zca=False)
    monkeypatch.setattr(published, "fit_preprocessing", lambda dataset, zca: fitted)  # which takes long
    loader = LOADERS[name](memory)
    whole, other = loader.path.read_bytes(), loader.other.read_bytes()
    wanted, contents = loader.read(loader.path), [loader.read(loader.path)]
    with contextlib.suppress(UserError):  # of an expert that the buffer does not have
        shutil.copy(loader.other, loader.path)
        contents.append(loader.read(loader.path))
    tally = Tally(notes, name, "damaged")

    def attempt(edit: bytes) -> bool:
        loader.path.write_bytes(damaged(whole, other, edit))
        found = loader.read(loader.path)
        assert found in contents[: 1 + (edit[0] % 10 == 8)]  # nothing may be left of a file but the other's beginning
        return found == wanted

    tally.run(EDIT.size, attempt)
    assert tally.unchanged > 0


def test_damaged_images_are_refused_or_images(memory: Path, notes: dict[str, Any]) -> None:
    """No checksum tells whether an image is damaged."""
    forms: list[tuple[str, dict[str, Any]]]
    forms = [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("BMP", {}), ("PPM", {})]
    files = []
    for number, (form, options) in enumerate(forms):
        pixels = torch.randint(256, (9, 11, 3), generator=generator("fuzz", number)).byte()
        Image.fromarray(pixels.numpy()).save(memory / "image", form, **options)
        files.append((memory / "image").read_bytes())

    def attempt(choice: bytes) -> bool:
        number = choice[-1] % len(files)
        spoilt = damaged(files[number], files[number - 1], choice[:-1])
        (memory / "image").write_bytes(spoilt)
        assert len(read_picture(str(memory / "image"), 4)) == 3 * 4 * 4
        return spoilt == files[number]

    Tally(notes, "image", "damaged").run(EDIT.size + 1, attempt)


# --- Lies -------------------------------------------------------------------------------------------------------

VALUES: list[Any] = [0, -1, 1, 2, 3, 64, 65, 4096, 4097, 10**6, 2**31, 2**62, 10**30, -(10**300)]
VALUES += [True, False, None, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), "", "x", "digits", "none", "../x"]
VALUES += ["convnet", "vit", "vgg11", "densenet121", "layer", [], {}, [[]], {"a": 1}, [1, 8, 8], [0], [1] * 1000]
VALUES += [[2**60] * 3, [3, 4096, 4096], [1.0, 8, 8], ["a"], [None], [float("nan")], {"experts": 3}, "\ud800", "a\nb"]


def lie(value: Any, choice: bytes) -> Any:
    """`value`, JSON, with something in it replaced, left out, added or repeated."""
    value = json.loads(json.dumps(value))
    for start in range(0, len(choice) - 4, 5):
        where, which, how = struct.unpack_from("<HHB", choice, start)
        places: list[tuple[Any, Any]] = []
        waiting = [value]
        while waiting:
            place = waiting.pop()
            keys = list(place) if isinstance(place, dict) else range(len(place))
            places += [(place, key) for key in keys]
            waiting += [place[key] for key in keys if isinstance(place[key], dict | list)]
        if not places:
            return value
        place, key = places[where % len(places)]
        if how % 8 == 0:
            del place[key]
        elif how % 8 == 1 and isinstance(place, list):
            place.insert(key, place[key])
        elif how % 8 == 2 and isinstance(place, dict):
            place["more"] = copy.deepcopy(VALUES[which % len(VALUES)])
        else:
            place[key] = copy.deepcopy(VALUES[which % len(VALUES)])
    return value


TENSOR_LIES: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.int(),
    lambda t: t.bool(),
    lambda t: t.to(torch.float8_e5m2),
    lambda t: t[None],
    lambda t: t.flatten(),
    lambda t: t.flatten()[:0],
    lambda t: t.flatten()[:1],
    lambda t: t.flatten()[0],
    lambda t: torch.cat([t.flatten()] * 3),
    lambda t: t.transpose(0, -1) if t.ndim else t,
    lambda t: -t,
    lambda t: t * 0,
    lambda t: t.float() * float("nan"),
    lambda t: t.float() + float("inf"),
    lambda t: t + 1,
    lambda t: t.new_zeros(0, 2**60),
    lambda t: t.new_zeros(2**40, 0),
    lambda t: t.new_zeros([1] * 20),
]


def lie_in_tensors(tensors: dict[str, Tensor], choice: bytes) -> dict[str, Tensor]:
    """The tensors with one of them changed, left out, added or renamed."""
    where, which, how = struct.unpack_from("<HHB", choice)
    name = sorted(tensors)[where % len(tensors)]
    changed = dict(tensors)
    if how % 8 == 0:
        del changed[name]
    elif how % 8 == 1:
        changed["more"] = changed.pop(name)
    elif how % 8 == 2:
        changed[name] = changed[sorted(tensors)[which % len(tensors)]].clone()
    elif how % 8 != 3:
        changed[name] = TENSOR_LIES[which % len(TENSOR_LIES)](changed[name]).contiguous()
    return changed


def sealed(value: Any) -> str:
    return json.dumps(add_checksum(value) if isinstance(value, dict) else value)


def test_lies_in_a_manifest(memory: Path, notes: dict[str, Any]) -> None:
    folder = tiny_buffer(memory)
    honest = read_json(folder / "buffer.json")

    def attempt(choice: bytes) -> bool:
        told = lie(honest, choice[:10])
        (folder / "buffer.json").write_text(sealed(told))
        buffer = Buffer(folder)
        assert isinstance(buffer.preprocessing, Normalisation)
        return told == honest and buffer.parameters(0, buffer.epochs).numel() > 0

    Tally(notes, "buffer.json", "lying").run(15, attempt)


@pytest.mark.parametrize("name", ["preprocessing", "expert", "synthetic set", "checkpoint", "data set"])
def test_lies_in_tensors_and_headers(memory: Path, notes: dict[str, Any], name: str) -> None:
    loader = LOADERS[name](memory)
    whole = loader.path.read_bytes()
    wanted = loader.read(loader.path)
    tensors = load(whole)
    length = int.from_bytes(whole[:8], "little")
    ((kind, text),) = json.loads(whole[8 : 8 + length])["__metadata__"].items()
    header = verify_checksum(text, "the valid file")
    known = {id(tensor): signature(tensor) for tensor in tensors.values()}
    order = list(tiny_network().shapes)

    def attempt(choice: bytes) -> bool:
        told = lie_in_tensors(tensors, choice)
        said = dict(header)
        if "digests" in said:
            said["digests"] = {part: known.get(id(tensor)) or signature(tensor) for part, tensor in told.items()}
        if "vectors" in said:
            with contextlib.suppress(KeyError, IndexError, RuntimeError):  # they have no vectors that could be digested
                said["vectors"] = [
                    tensor_digest(torch.cat([told[part][epoch].flatten() for part in order])) for epoch in range(3)
                ]
        if choice[-1] % 2:
            said = lie(said, choice[5:10])
        loader.path.write_bytes(save(told, {kind: sealed(said)}))
        return loader.read(loader.path) == wanted

    Tally(notes, name, "lying").run(15, attempt)


def test_lies_in_a_configuration(memory: Path, notes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As `cddlib evaluate` reads it."""
    config = as_dict(cddlib.distill_recipe("contra", "digits", 1))
    digits = data.load("digits")
    honest = {**config, "data_fingerprint": digits.fingerprint}
    start = dataclasses.replace(
        small_set(),
        images=torch.zeros(10, 1, 8, 8),
        labels=torch.arange(10),
        label_logits=None,
        classes=digits.classes,
        subsets=1,
    )
    start.save(memory / "synthetic.safetensors")
    monkeypatch.setattr(SyntheticSet, "load", lambda path: start)

    def attempt(choice: bytes) -> bool:
        told = lie(honest, choice)
        (memory / "config.json").write_text(sealed(told))
        trainer = evaluate.Trainer(memory, None, root=memory, device="cpu")
        assert trainer.config.evaluation_epochs <= protocol.MOST_EPOCHS
        return told == honest

    Tally(notes, "config.json", "lying").run(15, attempt)


def test_lies_in_the_record_of_an_evaluation(memory: Path, notes: dict[str, Any]) -> None:
    path = memory / "evaluation-0.json"
    honest = {"accuracies": {"synthetic": [0.5, 1.0], "random_real": [0.25], "full": []}, "seconds": 1.5, "seed": 0}

    def attempt(choice: bytes) -> bool:
        told = lie(honest, choice[:5])
        path.write_text(sealed(told))
        missing = evaluate._resume(path, [("synthetic", 2), ("full", 0)])[1]
        return told == honest and missing == [("synthetic", 2), ("full", 0)]

    Tally(notes, "evaluation record", "lying").run(15, attempt)


def test_lies_in_the_annotations_of_tiny_imagenet(memory: Path, notes: dict[str, Any]) -> None:
    path = memory / "val_annotations.txt"
    whole = b"".join(b"val_%d.JPEG\tn0144%d\t0\t32\t44\t62\n" % (i, i % 3) for i in range(5))
    classes = {f"n0144{i}": i for i in range(3)}
    other = b"../../a.png\tn01440\t0\n..\tn01441\n/etc/passwd\tn01442\n"

    def attempt(edit: bytes) -> bool:
        path.write_bytes(damaged(whole, other, edit))
        found = PREPARE._annotated(path, classes)
        assert found and all(Path(file).parent == memory / "images" for file, _ in found)
        return len(found) == 5

    Tally(notes, "annotations", "damaged").run(EDIT.size, attempt)


# --- Options ----------------------------------------------------------------------------------------------------

FIELDS = [field.name for field in dataclasses.fields(cddlib.DistillConfig)]
PIECES = [
    *FIELDS[:8],
    *METHODS,
    *data.DATA_NAMES,
    *"=,.-_ 0123456789²",
    "10,30",
    "1e999",
    "nan",
    "none",
    "true",
    "9" * 5000,
]
PIECES += ["0x1", "--", "../", "~", "$(true)", "';'", "\ud800", "\u2028"]
OPTIONS = ["--method", "--data", "--ipc", "--segments", "--buffer", "--experts", "--"]


def test_grids_of_a_search(notes: dict[str, Any]) -> None:
    def attempt(choice: bytes) -> bool:
        values = "".join(PIECES[byte % len(PIECES)] for byte in choice[2 : 2 + choice[1] % 4])
        grid = f"{FIELDS[choice[0] % len(FIELDS)]}={values}" if choice[-1] % 8 else values
        assert parse_grid([grid]).keys() <= set(FIELDS)
        return False  # there is no original

    Tally(notes, "grid of a search", "any").run(6, attempt)


def test_options_that_choose_a_recipe(notes: dict[str, Any]) -> None:
    def attempt(choice: bytes) -> bool:
        words = ["distill"]
        for place in range(choice[0] % 4):
            option, first, second = choice[1 + 3 * place : 4 + 3 * place]
            words.append(OPTIONS[option % len(OPTIONS)])
            words.append(PIECES[first % len(PIECES)] + PIECES[second % len(PIECES)] * (second % 3 == 0))
        chosen = cli.recipe_choices(words)
        try:
            experts = cli.chosen_buffer_recipe(chosen)
            assert cli.chosen_recipe(chosen).data.data == experts.data.data
        except OSError as error:  # of a name that no file can have, which `main` reports
            raise UserError(f"the system says {error}") from None
        return False

    Tally(notes, "options", "any").run(10, attempt)
