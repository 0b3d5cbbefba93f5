"""Files of the published codes, pictures, loaders and Parquet: round trips, and what is refused."""

import copy
import dataclasses
import itertools
import json
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from loaders import described
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

import cddlib
from cddbook.records import collect
from cddlib.data import dataset as data
from cddlib.data.dataset import DataConfig
from cddlib.data.preprocessing import fit_preprocessing
from cddlib.exchange import export
from cddlib.exchange import published as exchange
from cddlib.exchange.export import export_parquet, export_png
from cddlib.exchange.published import export_buffer, export_set, import_buffer, import_set
from cddlib.experts.buffer import Buffer
from cddlib.experts.config import BufferConfig
from cddlib.runtime.config import configure
from cddlib.runtime.errors import UserError
from cddlib.synthetic import SyntheticConfig, SyntheticSet, initialise

CPU = torch.device("cpu")
DIGITS = configure(BufferConfig, data="digits", depth=2, width=8, holdout=False)


BLOCK = [(8,), (8,), (8,)]
SHAPES = [(8, 1, 3, 3), *BLOCK, (8, 8, 3, 3), *BLOCK, (10, 8 * 2 * 2), (10,)]
"""Of the parameters of the published codes' ConvNet, in their order; `tests/networks` computes with it."""


def published_experts(experts: int = 1, epochs: int = 2) -> list[list[list[Tensor]]]:
    """What the published codes save."""
    rng = cddlib.generator("published")
    return [
        [[torch.randn(shape, generator=rng) / 4 for shape in SHAPES] for _ in range(epochs + 1)] for _ in range(experts)
    ]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file of one expert as the published codes write it."""
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(published_experts(), path)
    return path


@pytest.fixture(params=["hard", "soft"])
def synthetic(request: pytest.FixtureRequest, buffer: Buffer) -> SyntheticSet:
    """A set whose step size is no round number."""
    start = initialise(SyntheticConfig(ipc=2, step_size=0.1 / 3), data.load("digits"), buffer, 0, CPU)
    logits = torch.randn(20, 10, generator=cddlib.generator("logits"))
    return dataclasses.replace(start, label_logits=logits if request.param == "soft" else None)


def snapshot(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# --- Buffers ----------------------------------------------------------------------------------------------------


def test_an_imported_buffer_says_what_is_known_and_gets_no_experts_of_ours(published: Path, tmp_path: Path) -> None:
    found = import_buffer(published, tmp_path / "out", DIGITS, device="cpu")
    assert (found.epochs, found.config["experts"], found.config["epochs"]) == (2, 1, 2)
    (expert,) = found.experts
    assert expert["validation_accuracy"][:2] == [None, None]
    assert (expert["train_loss"], expert["seed"]) == ([], None)
    digest = cddlib.runtime.files.file_digest(published)
    assert expert["source"] == {"file": "replay_buffer_0.pt", "sha256": digest, "expert": 0}
    assert collect(tmp_path / "out")["result"]["experts_imported"] == 1
    config = dataclasses.replace(DIGITS, experts=2, epochs=2)
    with pytest.raises(UserError, match=r"holds another run \(imported is True there and None here\)"):
        cddlib.train_buffer(config, tmp_path / "out", device="cpu")


@pytest.mark.parametrize(("experts_per_file", "sizes"), [(1, [1, 1]), (3, [2])])
def test_our_buffer_goes_out_in_plain_tensors_and_comes_back(
    buffer: Buffer, tmp_path: Path, experts_per_file: int, sizes: list[int]
) -> None:
    paths = export_buffer(buffer, tmp_path / "pt", experts_per_file=experts_per_file)
    assert [path.name for path in paths] == [f"replay_buffer_{number}.pt" for number in range(len(sizes))]
    contents = [torch.load(path, weights_only=True) for path in paths]
    assert [len(content) for content in contents] == sizes and len(contents[0][0]) == 7
    for tensors in (tensors for content in contents for trajectory in content for tensors in trajectory):
        assert type(tensors) is list
        assert [tuple(tensor.shape) for tensor in tensors] == list(buffer.network.shapes.values())
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in tensors)
    found = import_buffer(tmp_path / "pt", tmp_path / "back", cddlib.buffer_recipe("digits", width=8), device="cpu")
    for expert in range(2):
        for epoch in range(7):
            assert torch.equal(found.parameters(expert, epoch), buffer.parameters(expert, epoch))
        assert found.experts[expert]["test_accuracy"] == buffer.experts[expert]["test_accuracy"]
        assert found.experts[expert]["validation_accuracy"][-1] == buffer.experts[expert]["validation_accuracy"][-1]


def test_files_are_read_in_numeric_order_and_parameters_as_tensors(tmp_path: Path) -> None:
    experts = published_experts(experts=11, epochs=1)
    for number, trajectory in enumerate(experts):
        saved = [[nn.Parameter(tensor) for tensor in epoch] for epoch in trajectory]
        torch.save([saved], tmp_path / f"replay_buffer_{number}.pt")
    found = import_buffer(tmp_path, tmp_path / "out", DIGITS, device="cpu")
    for expert, epoch in itertools.product(range(11), range(2)):
        wanted = torch.cat([tensor.flatten() for tensor in experts[expert][epoch]])
        assert torch.equal(found.parameters(expert, epoch), wanted)


def test_a_full_folder_is_not_written_to_an_empty_one_is(buffer: Buffer, published: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    for write in (
        lambda: import_buffer(published, tmp_path, DIGITS, device="cpu"),
        lambda: export_buffer(buffer, tmp_path),
        lambda: export_buffer(buffer, published),
    ):
        with pytest.raises(UserError, match=r"exists and is not an empty folder; choose another\.$"):
            write()
    with pytest.raises(UserError, match=r"^experts_per_file is 0; it must be at least 1\.$"):
        export_buffer(buffer, tmp_path / "pt", experts_per_file=0)
    assert snapshot(tmp_path) == before
    (tmp_path / "pt").mkdir()
    assert all(path.exists() for path in export_buffer(buffer, tmp_path / "pt"))


def test_a_write_that_fails_leaves_nothing(buffer: Buffer, tmp_path: Path, monkeypatch) -> None:
    def fail(path: Path, value: object) -> None:
        if path.name == "replay_buffer_1.pt":
            raise OSError("disk full")
        torch.save(value, path)

    monkeypatch.setattr(exchange, "_save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_buffer(buffer, tmp_path / "pt", experts_per_file=1)
    assert snapshot(tmp_path) == set()


def put(epoch: int, place: int, value: object) -> Callable[[list], None]:
    """Put a value in the place of one of an epoch's parameters."""
    return lambda content: content[0][epoch].__setitem__(place, value)


DAMAGE = {
    "another width": (
        put(1, 4, torch.zeros(16, 8, 3, 3)),
        r"replay_buffer_0\.pt, expert 0, epoch 1, parameter conv1\.weight is float32\[16, 8, 3, 3\]; "
        r"it must be float32\[8, 8, 3, 3\]\.$",
    ),
    "fewer parameters": (lambda c: c[0][1].pop(), r"epoch 1, is a list of 9; it must be a list of the 10 p"),
    "aliased epochs": (
        lambda c: c[0].__setitem__(slice(None), [c[0][0]] * 3),
        r"replay_buffer_0\.pt holds tensors that share their numbers: they were saved without being",
    ),
    "shorter expert": (
        lambda c: c.append(copy.deepcopy(c[0][:2])),
        r"replay_buffer_0\.pt, expert 1, has 1 epochs and the first one 2; all need the same\.$",
    ),
    "no epochs": (lambda c: c.__setitem__(0, c[0][:1]), r"expert 0, is a list of 1; it must be a list of the init"),
    "no experts": (lambda c: c.clear(), r"replay_buffer_0\.pt is a list of 0; it must be a list of trajectories\.$"),
    "a number": (put(1, 2, 3.0), r"epoch 1, parameter norm0\.weight is a float; it must be float32\[8\]\.$"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_other_contents_are_refused_before_anything_is_written(published: Path, tmp_path: Path, case: str) -> None:
    content = torch.load(published, weights_only=True)
    damage, message = DAMAGE[case]
    damage(content)
    torch.save(content, published)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=message):
        import_buffer(published, tmp_path / "out", DIGITS, device="cpu")
    assert snapshot(tmp_path) == before


def test_places_without_files_and_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no replay_buffer_\*\.pt\.$"):
        import_buffer(tmp_path / "empty", tmp_path / "out", DIGITS)
    with pytest.raises(UserError, match=r"none\.pt is not a file\.$"):
        import_buffer(tmp_path / "none.pt", tmp_path / "out", DIGITS)
    for content in (b"hello world", pickle.dumps([1])):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.pt cannot be read: .* which are never loaded because they can run"):
            import_buffer(tmp_path / "x.pt", tmp_path / "out", DIGITS, device="cpu")


# --- Synthetic sets ---------------------------------------------------------------------------------------------


@pytest.fixture
def good(buffer: Buffer, tmp_path: Path) -> Path:
    """A folder with a set that can be imported."""
    export_set(initialise(SyntheticConfig(), data.load("digits"), buffer, 0, CPU), tmp_path / "good")
    return tmp_path / "good"


def take(folder: Path, step_size: float | None = None, zca: bool = False) -> SyntheticSet:
    images, labels, lr = (folder / f"{name}_best.pt" for name in ("images", "labels", "lr"))
    return import_set(images, labels, DataConfig(zca=zca), step_size=lr if step_size is None else step_size)


@pytest.mark.parametrize("zca", [False, True])
def test_our_set_goes_out_and_comes_back(synthetic: SyntheticSet, tmp_path: Path, zca: bool) -> None:
    preprocessing = fit_preprocessing(data.load("digits"), zca=zca)
    synthetic = dataclasses.replace(synthetic, preprocessing=preprocessing)
    for variable in synthetic.variables():
        variable.requires_grad_()  # as in distillation
    export_set(synthetic, tmp_path / "pt")
    assert described(take(tmp_path / "pt", zca=zca)) == described(synthetic)


def test_an_imported_set_has_memory_of_its_own(good: Path) -> None:
    found = take(good)
    wanted = described(found)
    with open(good / "images_best.pt", "r+b") as file:  # the same file, so a map of it would change
        file.write(bytes(os.path.getsize(file.name)))
    assert described(found) == wanted


def test_the_user_gives_the_step_size_where_no_file_has_it(good: Path) -> None:
    (good / "lr_best.pt").unlink()
    assert take(good, step_size=0.02).step_size == torch.tensor(0.02)
    for value in (0.0, math.nan, math.inf):
        with pytest.raises(UserError, match=rf"^the step size is {value:g}; it must be positive\.$"):
            take(good, step_size=value)


ONES = torch.ones(10, 1, 8, 8)
WRONG = [
    ("images", torch.ones(10, 3, 8, 8), r"images_best\.pt is float32\[10, 3, 8, 8\]; it must be float"),
    ("images", torch.ones(9, 1, 8, 8), r"images_best\.pt is float32\[9, 1, 8, 8\]; it must be a tensor of images, as"),
    ("images", [ONES], r"is a list of 1; it must be a tensor of images, as many for each of the 10 classes of digits"),
    ("images", ONES * math.nan, r"images_best\.pt holds numbers that are not finite\.$"),
    ("labels", torch.arange(9, -1, -1), r"labels_best\.pt is not class-major: image 0 of 10 has label 9, not 0\.$"),
    ("labels", torch.arange(9), r"labels_best\.pt is int64\[9\]; it must be int64\[10\]\.$"),
    ("lr", torch.ones(2), r"lr_best\.pt is float32\[2\]; it must be a step size, one number\.$"),
    ("lr", torch.tensor(-1.0), r"^the step size in .*lr_best\.pt is -1; it must be positive\.$"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_sets_that_do_not_fit_are_refused(good: Path, name: str, value: object, message: str) -> None:
    torch.save(value, good / f"{name}_best.pt")
    with pytest.raises(UserError, match=message):
        take(good)


def test_pictures_that_are_called_whitened_are_refused(good: Path) -> None:
    (good / "images_best.pt").rename(good / "images_zca_500.pt")
    with pytest.raises(
        UserError, match=r"images_zca_500\.pt holds pictures with the whitening undone; import images_5"
    ):
        import_set(good / "images_zca_500.pt", good / "labels_best.pt", DataConfig(), step_size=0.1)


# --- Pictures, loaders, Parquet ---------------------------------------------------------------------------------


@pytest.mark.parametrize("zca", [False, True])
def test_pictures_of_real_images_are_those_images(buffer: Buffer, tmp_path: Path, zca: bool) -> None:
    digits = data.load("digits")
    start = initialise(SyntheticConfig(ipc=3), digits, buffer, 0, CPU)
    levels = buffer.preprocessing.inverse(start.images).mul(255).round().to(torch.uint8)
    preprocessing = fit_preprocessing(digits, zca=zca)
    start = dataclasses.replace(start, images=preprocessing(levels), preprocessing=preprocessing)
    folders = export_png(start, tmp_path / "png")
    assert [folder.name for folder in folders] == list("0123456789")
    found = ImageFolder(str(tmp_path / "png"))
    assert found.classes == list(start.classes)
    assert found.targets == start.labels.tolist()
    for (path, _), wanted in zip(found.samples, levels, strict=True):
        with Image.open(path) as picture:
            assert picture.mode == "L"
            assert list(picture.tobytes()) == wanted.flatten().tolist()


def test_colours_keep_their_order_and_are_clipped(tmp_path: Path) -> None:
    identity = cddlib.data.preprocessing.Normalisation(torch.zeros(3), torch.ones(3))
    colour = torch.tensor([3.0, 0.5, -2.0])[None, :, None, None].expand(1, 3, 4, 4)
    labels, step_size = torch.zeros(1, dtype=torch.int64), torch.tensor(0.1)
    red = SyntheticSet(
        images=colour, labels=labels, label_logits=None, step_size=step_size, preprocessing=identity, classes=("red",)
    )
    export_png(red, tmp_path / "png")
    with Image.open(tmp_path / "png" / "red" / "00000.png") as picture:
        assert picture.getpixel((2, 1)) == (255, 128, 0)


def test_names_of_classes_stay_where_they_can() -> None:
    assert export._folder_names(("airplane", "bird", "cat")) == ["airplane", "bird", "cat"]
    assert export._folder_names(("Dress", "T-shirt/top")) == ["0_Dress", "1_T-shirt_top"]
    assert export._folder_names(("b", "a")) == ["0_b", "1_a"]
    assert export._folder_names(("A", "a")) == ["0_A", "1_a"]  # one folder on some systems
    assert export._folder_names((".", "..")) == ["0_.", "1_.."]


@hypothesis.given(st.lists(st.text(max_size=300), min_size=1, max_size=30, unique=True))
def test_folders_sort_as_the_classes_do(classes: list[str]) -> None:
    names = export._folder_names(tuple(classes))
    assert sorted(names) == names
    assert len({name.casefold() for name in names}) == len(classes)
    for name in names:
        assert re.fullmatch(r"\w[\w.-]*", name)
        assert len(name.encode()) <= 255


def test_hugging_face_reads_the_parquet_file(synthetic: SyntheticSet, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets
    import pyarrow.parquet

    path = export_parquet(synthetic, tmp_path / "set.parquet")
    found = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    assert type(found.features["image"]) is datasets.Image
    assert found.features["label"] == datasets.ClassLabel(names=list("0123456789"))
    assert found.features["soft_label"] == datasets.List(datasets.Value("float32"), length=10)
    assert found["label"][:] == synthetic.labels.tolist()
    assert torch.equal(torch.tensor(found["soft_label"][:]), synthetic.targets())
    levels = (synthetic.pictures() * 255).round().to(torch.uint8)
    for row, wanted in zip(found, levels, strict=True):
        assert list(row["image"].tobytes()) == wanted.flatten().tolist()
    metadata = pyarrow.parquet.read_schema(path).metadata
    assert json.loads(metadata[b"cddlib"]) == {"step_size": float(synthetic.step_size)}


def test_parquet_refuses_what_is_there_and_says_what_is_missing(
    synthetic: SyntheticSet, tmp_path: Path, monkeypatch
) -> None:
    path = export_parquet(synthetic, tmp_path / "set.parquet")
    with pytest.raises(UserError, match=r"set\.parquet exists; choose another file\.$"):
        export_parquet(synthetic, path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"^form 'parquet' needs the package pyarrow; .* `pip install \"pyarrow\"`\.$"):
        export_parquet(synthetic, tmp_path / "other.parquet")
