"""Files of the published codes, pictures, loaders and Parquet: round trips, and what is refused."""

import dataclasses
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
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
from cddlib.exchange.export import as_dataset, export_parquet, export_png
from cddlib.exchange.published import export_buffer, export_set, import_buffer, import_set
from cddlib.experts.buffer import Buffer
from cddlib.experts.config import BufferConfig
from cddlib.runtime.config import configure
from cddlib.runtime.errors import UserError
from cddlib.synthetic import SyntheticConfig, SyntheticSet, initialise

CPU = torch.device("cpu")
DIGITS = configure(BufferConfig, data="digits", depth=2, width=8, holdout=False)


class MttConvNet(nn.Module):
    """The ConvNet of the published codes, written from its description."""

    def __init__(self, depth: int, width: int, channels: int, side: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block in range(depth):
            layers += [nn.Conv2d(width if block else channels, width, 3, padding=1), nn.GroupNorm(width, width)]
            layers += [nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (side >> depth) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


def published_nets(experts: int = 1, epochs: int = 2) -> list[list[MttConvNet]]:
    """Networks with parameters of their own, norms included."""
    rng = cddlib.generator("published")
    nets = [[MttConvNet(2, 8, 1, 8, 10) for _ in range(epochs + 1)] for _ in range(experts)]
    for parameter in (p for expert in nets for net in expert for p in net.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=rng) / 4
    return nets


def lists(nets: list[list[MttConvNet]]) -> list[list[list[Tensor]]]:
    """What the published codes save."""
    return [[[p.detach().cpu().clone() for p in net.parameters()] for net in expert] for expert in nets]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file of one expert as the published codes write it."""
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(lists(published_nets()), path)
    return path


@pytest.fixture(params=["hard", "soft"])
def synthetic(request: pytest.FixtureRequest, buffer: Buffer) -> SyntheticSet:
    """A set whose step size is no round number."""
    start = initialise(SyntheticConfig(ipc=2, step_size=0.1 / 3), data.load("digits"), buffer, 0, CPU)
    logits = torch.randn(20, 10, generator=cddlib.generator("logits"))
    return dataclasses.replace(start, label_logits=logits if request.param == "soft" else None)


def same(left: SyntheticSet, right: SyntheticSet) -> bool:
    """Every tensor and name is the same."""
    tensors = [{**s.variable_tensors(), **s.preprocessing.tensors(), "labels": s.labels} for s in (left, right)]
    return (
        tensors[0].keys() == tensors[1].keys()
        and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*(t.values() for t in tensors), strict=True))
        and left.classes == right.classes
    )


def snapshot(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path for path in snapshot(tmp_path) if path.name.endswith(".tmp")]


# --- Buffers ----------------------------------------------------------------------------------------------------


def test_networks_of_the_published_codes_compute_the_same_here(tmp_path: Path) -> None:
    nets = published_nets(experts=2, epochs=3)
    torch.save(lists(nets), tmp_path / "replay_buffer_0.pt")
    found = import_buffer(tmp_path / "replay_buffer_0.pt", tmp_path / "out", DIGITS, device="cpu")
    images = found.preprocessing(data.load("digits").test.images[:50])
    for expert in range(2):
        for epoch in range(4):
            wanted = nets[expert][epoch](images)
            assert torch.allclose(found.network(found.parameters(expert, epoch), images), wanted, atol=1e-5)


def test_an_imported_buffer_says_what_is_known(published: Path, tmp_path: Path) -> None:
    found = import_buffer(published, tmp_path / "out", DIGITS, device="cpu")
    assert (found.epochs, found.config["experts"], found.config["epochs"]) == (2, 1, 2)
    (expert,) = found.experts
    digits = data.load("digits")
    accuracies = []
    for part in (digits.split[1], digits.test):
        right = found.network(found.parameters(0, 2), found.preprocessing(part.images)).argmax(1) == part.labels
        accuracies.append(right.double().mean().item())
    assert expert["validation_accuracy"] == [None, None, pytest.approx(accuracies[0])]
    assert expert["test_accuracy"] == pytest.approx(accuracies[1])
    assert (expert["train_loss"], expert["seed"]) == ([], None)
    digest = cddlib.runtime.files.file_digest(published)
    assert expert["source"] == {"file": "replay_buffer_0.pt", "sha256": digest, "expert": 0}
    assert collect(tmp_path / "out")["result"]["experts_imported"] == 1


def test_our_buffer_goes_out_and_comes_back(buffer: Buffer, tmp_path: Path) -> None:
    paths = export_buffer(buffer, tmp_path / "pt", experts_per_file=1)
    assert [path.name for path in paths] == ["replay_buffer_0.pt", "replay_buffer_1.pt"]
    config = cddlib.buffer_recipe("digits", width=8)
    found = import_buffer(tmp_path / "pt", tmp_path / "back", config, device="cpu")
    for expert in range(2):
        for epoch in range(7):
            assert torch.equal(found.parameters(expert, epoch), buffer.parameters(expert, epoch))
        assert found.experts[expert]["test_accuracy"] == buffer.experts[expert]["test_accuracy"]
        assert found.experts[expert]["validation_accuracy"][-1] == buffer.experts[expert]["validation_accuracy"][-1]


def test_files_hold_plain_tensors_of_their_own(buffer: Buffer, tmp_path: Path) -> None:
    (path,) = export_buffer(buffer, tmp_path / "pt")
    content = torch.load(path, weights_only=True)
    assert [type(content), len(content), len(content[0])] == [list, 2, 7]
    for tensors in (tensors for trajectory in content for tensors in trajectory):
        assert type(tensors) is list
        assert [tuple(tensor.shape) for tensor in tensors] == list(buffer.network.shapes.values())
        for tensor in tensors:
            assert type(tensor) is Tensor
            assert tensor.dtype == torch.float32
            assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


@pytest.mark.parametrize(("experts_per_file", "sizes"), [(1, [1, 1]), (2, [2]), (3, [2])])
def test_the_remainder_is_not_lost(buffer: Buffer, tmp_path: Path, experts_per_file: int, sizes: list[int]) -> None:
    paths = export_buffer(buffer, tmp_path / "pt", experts_per_file=experts_per_file)
    assert [len(torch.load(path, weights_only=True)) for path in paths] == sizes


def test_files_are_read_in_numeric_order(tmp_path: Path) -> None:
    experts = lists(published_nets(experts=11, epochs=1))
    paths = [tmp_path / f"replay_buffer_{number}.pt" for number in range(11)]
    for path, trajectory in zip(paths, experts, strict=True):
        torch.save([trajectory], path)
    found = import_buffer(tmp_path, tmp_path / "out", DIGITS, device="cpu")
    for expert in range(11):
        wanted = torch.cat([tensor.flatten() for tensor in experts[expert][0]])
        assert torch.equal(found.parameters(expert, 0), wanted)


def test_an_imported_buffer_can_be_distilled(buffer: Buffer, tmp_path: Path, quick: dict[str, object]) -> None:
    export_buffer(buffer, tmp_path / "pt")
    found = import_buffer(tmp_path / "pt", tmp_path / "back", cddlib.buffer_recipe("digits", width=8), device="cpu")
    config = cddlib.distill_recipe("contra", "digits", ipc=1, segments=2, **{**quick, "iterations": 2})
    result = cddlib.distill(config, found, tmp_path / "run", device="cpu")
    assert same(result, cddlib.distill(config, buffer, tmp_path / "direct", device="cpu"))


def test_no_experts_are_added_to_imported_ones(published: Path, tmp_path: Path) -> None:
    import_buffer(published, tmp_path / "out", DIGITS, device="cpu")
    config = dataclasses.replace(DIGITS, experts=2, epochs=2)
    with pytest.raises(UserError, match=r"holds another run \(imported is True there and None here\)"):
        cddlib.train_buffer(config, tmp_path / "out", device="cpu")


def test_a_full_folder_is_not_written_to(buffer: Buffer, published: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    for write in (
        lambda: import_buffer(published, tmp_path, DIGITS, device="cpu"),
        lambda: export_buffer(buffer, tmp_path),
        lambda: export_buffer(buffer, published),
    ):
        with pytest.raises(UserError, match=r"exists and is not an empty folder; choose another\.$"):
            write()
    assert snapshot(tmp_path) == before


def test_an_empty_folder_may_be_there(buffer: Buffer, tmp_path: Path) -> None:
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


def test_no_experts_in_a_file_is_refused(buffer: Buffer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^experts_per_file is 0; it must be at least 1\.$"):
        export_buffer(buffer, tmp_path / "pt", experts_per_file=0)


def alias(content: list) -> None:
    content[0][2] = content[0][0]


def repeat(content: list) -> None:
    content[0][2] = [tensor.clone() for tensor in content[0][0]]


def set_to(value: object) -> Callable[[list], None]:
    return lambda content: content[0][1].__setitem__(2, value)


SAME = r"expert 0, has the same parameters at epochs 0 and 2: they were saved without being"
SHARED = r"replay_buffer_0\.pt holds tensors that share their numbers: they were saved without being copied"

DAMAGE = {
    "another width": (
        lambda content: content[0][1].__setitem__(4, torch.zeros(16, 8, 3, 3)),
        r"replay_buffer_0\.pt, expert 0, epoch 1, parameter conv1\.weight is float32\[16, 8, 3, 3\]; "
        r"it must be float32\[8, 8, 3, 3\]\.$",
    ),
    "fewer parameters": (
        lambda content: content[0][1].pop(),
        r"expert 0, epoch 1, is a list of 9; it must be a list of the 10 parameters of the network that",
    ),
    "aliased epochs": (alias, SAME),
    "repeated epochs": (repeat, SAME),
    "shorter expert": (
        lambda content: content.append([[tensor.clone() for tensor in epoch] for epoch in content[0][:2]]),
        r"replay_buffer_0\.pt, expert 1, has 1 epochs and the first one 2; all need the same\.$",
    ),
    "no epochs": (lambda content: content.__setitem__(0, content[0][:1]), r"expert 0, is a list of 1; it must be a l"),
    "no experts": (lambda content: content.clear(), r"replay_buffer_0\.pt is a list of 0; it must be a list of traj"),
    "one nesting less": (lambda content: content.__setitem__(0, content[0][0]), r"epoch 0, is float32\[8, 1, 3, 3\]; "),
    "itself": (
        lambda content: content.__setitem__(0, content),
        SHARED,
    ),
    "a number": (set_to(3.0), r"epoch 1, parameter norm0\.weight is a float; it must be float32\[8\]\.$"),
    "doubles": (set_to(torch.zeros(8).double()), r"norm0\.weight is float64\[8\]; it must be float32\[8\]\.$"),
    "a nan": (set_to(torch.tensor([1.0] * 7 + [float("nan")])), r"norm0\.weight holds numbers that are not finite\.$"),
    "one number for all": (set_to(torch.ones(1).expand(10**5)), SHARED),
    "no memory": (set_to(torch.ones(8, device="meta")), r"it names torch\._utils\._rebuild_meta_tensor"),
    "an absurd shape": (set_to(torch.ones(1).expand(10**15)), SHARED),
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


def test_parameters_instead_of_tensors_are_read(published: Path, tmp_path: Path) -> None:
    content = torch.load(published, weights_only=True)
    as_parameters = [[[nn.Parameter(tensor) for tensor in epoch] for epoch in expert] for expert in content]
    torch.save(as_parameters, published)
    found = import_buffer(published, tmp_path / "out", DIGITS, device="cpu")
    assert torch.equal(found.parameters(0, 1), torch.cat([tensor.flatten() for tensor in content[0][1]]))


def test_places_without_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no replay_buffer_\*\.pt\.$"):
        import_buffer(tmp_path / "empty", tmp_path / "out", DIGITS)
    with pytest.raises(UserError, match=r"none\.pt is not a file\.$"):
        import_buffer(tmp_path / "none.pt", tmp_path / "out", DIGITS)


# --- Safety -----------------------------------------------------------------------------------------------------


class Intruder:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.path),)


def intruders(path: Path, target: Path) -> Iterator[None]:
    """Write files to `path` that create `target` when they are loaded without care, one after another."""
    for save in (
        lambda: torch.save([[Intruder(target)]], path),
        lambda: torch.save(Intruder(target), path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(Intruder(target))),
    ):
        save()
        yield


def other_files(path: Path) -> Iterator[None]:
    """Write files to `path` that `torch.save` did not."""
    torch.save([torch.zeros(100)], path)
    whole = path.read_bytes()
    for content in (b"", b"hello world", whole[: len(whole) // 2], whole[:-1], whole[10:]):
        path.write_bytes(content)
        yield
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02]q\x00(K\x01K\x02e")
    yield


def readers(path: Path, good: Path) -> list[Callable[[], object]]:
    """Every way in which a file of others is read, given `path` in place of each."""
    images, labels, lr = (good / f"{name}_best.pt" for name in ("images", "labels", "lr"))
    digits = DataConfig(data="digits")
    return [
        lambda: import_buffer(path, path.parent / "out", DIGITS, device="cpu"),
        lambda: import_set(path, labels, digits, lr=lr),
        lambda: import_set(images, path, digits, lr=lr),
        lambda: import_set(images, labels, digits, lr=path),
    ]


@pytest.fixture
def good(buffer: Buffer, tmp_path: Path) -> Path:
    """A folder with a set that can be imported."""
    start = initialise(SyntheticConfig(), data.load("digits"), buffer, 0, CPU)
    export_set(start, tmp_path / "good")
    return tmp_path / "good"


def test_code_in_a_file_is_refused_and_does_not_run(good: Path, tmp_path: Path) -> None:
    path, target = tmp_path / "x.pt", tmp_path / "created"
    for _ in intruders(path, target):
        for read in readers(path, good):
            with pytest.raises(
                UserError, match=r"x\.pt cannot be read: .* which are never loaded because they can run"
            ):
                read()
            assert not target.exists()
    torch.save(Intruder(target), path)
    torch.load(path, weights_only=False)
    assert target.exists()  # the intruder is real


def test_files_of_others_are_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for _ in other_files(path):
        for read in readers(path, good):
            with pytest.raises(UserError, match=r"x\.pt (cannot be read: |is a list of 2|, expert 0, is a)"):
                read()


@hypothesis.settings(max_examples=60)
@hypothesis.given(place=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, place: int, byte: int) -> None:
    path = tmp_path_factory.mktemp("byte") / "x.pt"
    torch.save(torch.tensor(0.5), path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content)
    try:
        assert exchange._read_step_size(path).shape == ()
    except UserError as error:
        assert str(error).startswith(str(path))


# --- Synthetic sets ---------------------------------------------------------------------------------------------


def take(folder: Path, **options: object) -> SyntheticSet:
    config = DataConfig(data="digits", zca=bool(options.pop("zca", False)))
    options = options or {"lr": folder / "lr_best.pt"}
    return import_set(folder / "images_best.pt", folder / "labels_best.pt", config, **options)


@pytest.mark.parametrize("zca", [False, True])
def test_our_set_goes_out_and_comes_back(synthetic: SyntheticSet, tmp_path: Path, zca: bool) -> None:
    preprocessing = fit_preprocessing(data.load("digits"), zca=zca)
    synthetic = dataclasses.replace(synthetic, preprocessing=preprocessing)
    for variable in synthetic.variables():
        variable.requires_grad_()  # as in distillation
    export_set(synthetic, tmp_path / "pt")
    assert same(take(tmp_path / "pt", zca=zca), synthetic)


def test_a_set_goes_out_as_datm_writes_it(synthetic: SyntheticSet, tmp_path: Path) -> None:
    paths = export_set(synthetic, tmp_path / "pt")
    images, labels, lr = (torch.load(path, weights_only=True) for path in paths)
    assert [path.name for path in paths] == ["images_best.pt", "labels_best.pt", "lr_best.pt"]
    assert [type(images), type(labels), type(lr)] == [Tensor] * 3
    assert (images.dtype, images.shape) == (torch.float32, (20, 1, 8, 8))
    soft = synthetic.label_logits is not None
    assert (labels.dtype, labels.shape) == ((torch.float32, (20, 10)) if soft else (torch.int64, (20,)))
    assert (lr.dtype, lr.shape) == (torch.float32, ())


def test_an_imported_set_has_memory_of_its_own(good: Path) -> None:
    found = take(good)
    wanted = found.copy()
    with open(good / "images_best.pt", "r+b") as file:  # the same file, so a map of it would change
        file.write(bytes(os.path.getsize(file.name)))
    assert same(found, wanted)


def test_the_user_gives_the_step_size_where_no_file_has_it(good: Path) -> None:
    (good / "lr_best.pt").unlink()
    assert take(good, step_size=0.02).step_size == torch.tensor(0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": None}, r"^neither of lr and step_size given; one is needed"),
        ({"lr": Path("lr_best.pt"), "step_size": 0.1}, r"^both of lr and step_size given; one is needed"),
        ({"step_size": 0.0}, r"^the step size is 0; it must be positive\.$"),
        ({"step_size": float("nan")}, r"^the step size is nan; it must be positive\.$"),
    ],
)
def test_impossible_step_sizes_are_refused(good: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        take(good, **options)


ONES = torch.ones(10, 1, 8, 8)
WRONG = {
    "three channels": (
        "images",
        torch.ones(10, 3, 8, 8),
        r"images_best\.pt is float32\[10, 3, 8, 8\]; it must be float",
    ),
    "no whole IPC": ("images", torch.ones(9, 1, 8, 8), r"images_best\.pt is float32\[9, 1, 8, 8\]; it must be a tens"),
    "no images": ("images", torch.ones(0, 1, 8, 8), r"images_best\.pt is float32\[0, 1, 8, 8\]; it must be a ten"),
    "a list": ("images", [ONES], r"is a list of 1; it must be a tensor of images, as many for each of the 10 classes"),
    "bytes": ("images", ONES.byte(), r"images_best\.pt is uint8\[10, 1, 8, 8\]; it must be float32\[10, 1, 8, 8\]\.$"),
    "a nan": ("images", ONES * float("nan"), r"images_best\.pt holds numbers that are not finite\.$"),
    "absurdly many": (
        "images",
        torch.ones(1).expand(10**12, 1, 8, 8),
        r"images_best\.pt holds tensors that share their numbers",
    ),
    "not class-major": ("labels", torch.arange(9, -1, -1), r"best\.pt is not class-major: image 0 of 10 has label 9, "),
    "fewer labels": ("labels", torch.arange(9), r"labels_best\.pt is int64\[9\]; it must be int64\[10\]\.$"),
    "a label too high": ("labels", torch.arange(1, 11), r"image 0 of 10 has label 1, not 0\.$"),
    "int32": ("labels", torch.arange(10).int(), r"labels_best\.pt is int32\[10\]; it must be int64\[10\]\.$"),
    "fewer classes": (
        "labels",
        torch.ones(10, 9),
        r"labels_best\.pt is float32\[10, 9\]; it must be float32\[10, 10\]",
    ),
    "infinite logits": ("labels", torch.ones(10, 10) / 0, r"labels_best\.pt holds numbers that are not finite\.$"),
    "two step sizes": ("lr", torch.ones(2), r"lr_best\.pt is float32\[2\]; it must be a step size, one number\.$"),
    "negative": ("lr", torch.tensor(-1.0), r"^the step size in .*lr_best\.pt is -1; it must be positive\.$"),
    "int": ("lr", torch.tensor(1), r"lr_best\.pt is int64\[\]; it must be float32\[\]\.$"),
}


@pytest.mark.parametrize("case", WRONG)
def test_sets_that_do_not_fit_are_refused(good: Path, case: str) -> None:
    name, value, message = WRONG[case]
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


def test_pictures_are_clipped(buffer: Buffer, tmp_path: Path) -> None:
    start = initialise(SyntheticConfig(), data.load("digits"), buffer, 0, CPU)
    loud = dataclasses.replace(start, images=1000 * torch.randn(start.images.shape, generator=cddlib.generator(0)))
    export_png(loud, tmp_path / "png")
    with Image.open(tmp_path / "png" / "0" / "00000.png") as picture:
        assert set(picture.tobytes()) == {0, 255}


def test_colours_keep_their_order(tmp_path: Path) -> None:
    identity = cddlib.data.preprocessing.Normalisation(torch.zeros(3), torch.ones(3))
    colour = torch.tensor([1.0, 0.5, 0.0])[None, :, None, None].expand(1, 3, 4, 4)
    red = SyntheticSet(
        images=colour,
        labels=torch.zeros(1, dtype=torch.int64),
        label_logits=None,
        step_size=torch.tensor(0.1),
        preprocessing=identity,
        classes=("red",),
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


def test_a_data_loader_gives_images_and_probabilities(synthetic: SyntheticSet) -> None:
    for pixels, wanted in ((False, synthetic.images), (True, synthetic.pictures())):
        loader = torch.utils.data.DataLoader(as_dataset(synthetic, pixels=pixels), batch_size=7)
        images, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert torch.equal(images, wanted)
        assert torch.equal(targets, synthetic.targets())
    assert not any(tensor.requires_grad for tensor in as_dataset(synthetic).tensors)


def test_hugging_face_reads_the_parquet_file(synthetic: SyntheticSet, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

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


def test_the_parquet_file_keeps_the_step_size(synthetic: SyntheticSet, tmp_path: Path) -> None:
    import pyarrow.parquet

    path = export_parquet(synthetic, tmp_path / "set.parquet")
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
