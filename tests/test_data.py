"""Data sets: splits, fingerprints, normalisation, whitening, cached files, and preparing them."""

import dataclasses
import json
import pickle
import struct
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cddlib import data
from cddlib.data import Dataset, Images
from cddlib.preprocessing import fit_preprocessing, preprocessing_from
from cddlib.runs import UserError

CLASSES = ["a", "b", "c"]


def random_arrays(seed: int = 0, shape: tuple[int, int, int] = (3, 4, 4)) -> dict[str, np.ndarray]:
    """A small data set as unpack_data.py holds it before writing."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, n in (("train", 30), ("test", 9)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(n, dtype=np.int64) % len(CLASSES)
    return arrays


def write_cache(root: Path, arrays: dict[str, np.ndarray], name: str = "cifar10", classes: object = CLASSES) -> Path:
    """Write a data set as unpack_data.py does."""
    path = root / f"{name}.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"classes": json.dumps(classes)})
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    write_cache(tmp_path, random_arrays())
    return data.load("cifar10", tmp_path)


# --- Digits and splits ------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_divided_by_class() -> None:
    digits = data.load("digits")
    assert digits.shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    pairs = [(i.numpy().tobytes(), int(y)) for part in (digits.train, digits.test) for i, y in zip(*part, strict=True)]
    bunch = load_digits()
    wanted = [
        (np.round(i * 255 / 16).astype(np.uint8).tobytes(), y)
        for i, y in zip(bunch.images, bunch.target.tolist(), strict=True)
    ]
    assert len(pairs) == 1797
    assert Counter(pairs) == Counter(wanted)  # every image once: test and training are disjoint
    every, test = np.bincount(bunch.target), digits.test.labels.bincount().numpy()
    assert np.array_equal(test, np.round(every / 5))


def test_validation_images_are_no_test_images() -> None:
    digits = data.load("digits")
    train, validation = digits.split
    held_out = {image.numpy().tobytes() for image in validation.images}
    assert len(train.labels) + len(validation.labels) == len(digits.train.labels)
    assert not held_out & {image.numpy().tobytes() for image in train.images}
    assert not held_out & {image.numpy().tobytes() for image in digits.test.images}


@hypothesis.given(
    st.lists(st.integers(0, 4), min_size=1, max_size=200).map(torch.tensor), st.sampled_from([0.1, 0.2, 0.5])
)
def test_split_is_disjoint_covering_stratified(labels: torch.Tensor, fraction: float) -> None:
    keep, held_out = data.stratified_split(labels, fraction)
    assert sorted(keep.tolist() + held_out.tolist()) == list(range(len(labels)))
    for label in labels.unique():
        count, held = int((labels == label).sum()), int((labels[held_out] == label).sum())
        assert held == max(1, round(fraction * count))
    again = data.stratified_split(labels, fraction)
    assert torch.equal(keep, again[0])
    assert torch.equal(held_out, again[1])


def test_split_is_random_within_a_class() -> None:
    _, held_out = data.stratified_split(torch.zeros(1000, dtype=torch.long), 0.1)
    assert 300 < held_out.float().mean() < 700  # neither the first nor the last images


def test_fingerprint_changes_with_one_pixel_or_label(dataset: Dataset) -> None:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        other = tensor.clone()
        other.view(-1)[-1] ^= 1
        return other

    same = dataclasses.replace(dataset, train=Images(*(tensor.clone() for tensor in dataset.train)))
    others = [
        dataclasses.replace(dataset, **{part: getattr(dataset, part)._replace(**{field: changed(value)})})
        for part in ("train", "test")
        for field, value in getattr(dataset, part)._asdict().items()
    ]
    fingerprints = [found.fingerprint for found in (dataset, *others)]
    assert same.fingerprint == dataset.fingerprint
    assert len(dataset.fingerprint) == 16
    assert len(set(fingerprints)) == 5


# --- What a network sees ----------------------------------------------------------------------------------------


def test_normalisation_gives_each_channel_mean_zero_and_deviation_one(dataset: Dataset) -> None:
    unknown = dataclasses.replace(dataset, name="fashion_mnist")  # no published numbers
    fitted = fit_preprocessing(unknown, zca=False)
    pixels = unknown.train.images.numpy() / 255.0
    assert np.allclose(fitted.tensors()["mean"], pixels.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(fitted.tensors()["std"], pixels.std((0, 2, 3)), atol=1e-6)
    normal = fitted(unknown.train.images)
    assert torch.allclose(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(fitted.inverse(normal), unknown.train.images / 255, atol=1e-6)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet", "imagefolder"])
def test_normalisation_takes_the_published_numbers(dataset: Dataset, name: str) -> None:
    tensors = fit_preprocessing(dataclasses.replace(dataset, name=name), zca=False).tensors()
    cifar = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mean, std = cifar if name.startswith("cifar") else imagenet
    assert torch.equal(tensors["mean"], torch.tensor(mean))
    assert torch.equal(tensors["std"], torch.tensor(std))


def kornia_zca(images: np.ndarray, epsilon: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, transform and inverse of kornia's ZCAWhitening(eps=0.1), by the singular value decomposition."""
    x = images.reshape(len(images), -1) / 255.0
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / (len(x) - 1)
    u, s, _ = np.linalg.svd(covariance)
    return mean, u @ np.diag(1 / np.sqrt(s + epsilon)) @ u.T, u @ np.diag(np.sqrt(s + epsilon)) @ u.T


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_whitening_is_kornias(tmp_path: Path, name: str) -> None:
    write_cache(tmp_path, random_arrays())  # 30 images of 48 pixels: a singular covariance
    found = data.load(name, tmp_path)
    whitening = fit_preprocessing(found, zca=True)
    mean, transform, inverse = kornia_zca(found.train.images.numpy())
    test = found.test.images
    wanted = (test.flatten(1).numpy() / 255.0 - mean) @ transform.T
    assert np.allclose(whitening(test).flatten(1), wanted, atol=2e-5)
    assert whitening(test).dtype == torch.float32
    noise = torch.randn(5, *found.shape, generator=torch.Generator().manual_seed(0))
    assert np.allclose(whitening.inverse(noise).flatten(1), noise.flatten(1).numpy() @ inverse.T + mean, atol=2e-5)


@pytest.mark.parametrize("zca", [False, True])
def test_preprocessing_is_invertible_and_survives_a_file(zca: bool) -> None:
    digits = data.load("digits")
    fitted = fit_preprocessing(digits, zca=zca)
    seen = fitted(digits.test.images)
    assert torch.allclose(fitted.inverse(seen), digits.test.images / 255, atol=1e-5)
    again = preprocessing_from(fitted.tensors())
    assert type(again) is type(fitted)
    assert torch.equal(again(digits.test.images), seen)


# --- Cached files -----------------------------------------------------------------------------------------------


def test_a_cached_file_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = random_arrays()
    write_cache(tmp_path, arrays)
    monkeypatch.setenv("CDDLIB_DATA", str(tmp_path))
    for found in (data.load("cifar10", tmp_path), data.load("cifar10")):
        assert found.name == "cifar10"
        assert found.classes == ("a", "b", "c")
        assert found.shape == (3, 4, 4)
        for part, images in (("train", found.train), ("test", found.test)):
            assert np.array_equal(images.images, arrays[f"{part}_images"])
            assert np.array_equal(images.labels, arrays[f"{part}_labels"])


@pytest.mark.parametrize(("name", "source"), [("cifar10", ""), ("tiny_imagenet", " --source FOLDER")])
def test_a_missing_data_set_says_what_to_run(tmp_path: Path, name: str, source: str) -> None:
    with pytest.raises(UserError) as caught:
        data.load(name, tmp_path)
    assert str(caught.value) == (
        f"{name} is not in {tmp_path}; run `cddlib data {name}{source} --root {tmp_path}` first."
    )


def test_unknown_names_are_refused() -> None:
    for call in (lambda: data.load("mnist"), lambda: data.prepare("mnist"), lambda: data.DataConfig(data="mnist")):
        with pytest.raises(UserError, match="unknown data set 'mnist'; choose one of digits, fashion_mnist, cifar10"):
            call()


WRONG = {
    "float images": ({"train_images": np.zeros((30, 3, 4, 4), np.float32)}, r"train_images is torch\.float32\[30"),
    "flat images": ({"test_images": np.zeros((9, 48), np.uint8)}, r"test_images is torch\.uint8\[9, 48\], not uint8"),
    "other size": ({"test_images": np.zeros((9, 3, 5, 5), np.uint8)}, r"test_images is torch\.uint8\[9, 3, 5, 5\]"),
    "int32 labels": ({"train_labels": np.zeros(30, np.int32)}, r"train_labels is torch\.int32\[30\], not int64\[30\]"),
    "few labels": ({"train_labels": np.zeros(29, np.int64)}, r"train_labels is torch\.int64\[29\], not int64\[30\]"),
    "high label": ({"test_labels": np.full(9, 3)}, "test_labels reach from 3 to 3, with 3 classes named"),
    "low label": ({"train_labels": np.full(30, -1)}, "train_labels reach from -1 to -1, with 3 classes named"),
    "no images": (
        {"test_images": np.zeros((0, 3, 4, 4), np.uint8), "test_labels": np.zeros(0, np.int64)},
        "test has no images",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_cached_file_of_another_kind_is_refused(tmp_path: Path, case: str) -> None:
    arrays, reason = WRONG[case]
    write_cache(tmp_path, random_arrays() | arrays)
    with pytest.raises(UserError, match=rf"cifar10\.safetensors is not a cddlib data set: {reason}"):
        data.load("cifar10", tmp_path)


def test_a_cached_file_that_lacks_tensors_or_classes_is_refused(tmp_path: Path) -> None:
    arrays = random_arrays()
    images = {key: value for key, value in arrays.items() if key.endswith("images")}
    path = write_cache(tmp_path, images)
    with pytest.raises(UserError, match=r"cifar10\.safetensors lacks the tensors test_labels, train_labels: "):
        data.load("cifar10", tmp_path)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(UserError, match=r"cifar10\.safetensors has no readable 'classes' in its header"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("classes", [3, None, [1, 2, 3]])
def test_class_names_of_another_kind_are_refused(tmp_path: Path, classes: object) -> None:
    write_cache(tmp_path, random_arrays(), classes=classes)
    with pytest.raises(UserError, match=r"cifar10\.safetensors .*classes"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:5], lambda b: b"", lambda b: b"no" * 999])
def test_a_damaged_file_is_refused(tmp_path: Path, damage) -> None:
    path = write_cache(tmp_path, random_arrays())
    path.write_bytes(damage(path.read_bytes()))
    for call in (data.load, data.prepare):
        with pytest.raises(UserError, match=r"cifar10\.safetensors is truncated or not a safetensors file"):
            call("cifar10", tmp_path)


# --- Preparing from a folder ------------------------------------------------------------------------------------

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save_image(path: Path, colour: object, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, quality=95)


def assert_one_colour(image: torch.Tensor, colour: tuple[int, int, int]) -> None:
    difference = image.int() - torch.tensor(colour)[:, None, None]
    assert difference.abs().max() <= 3  # JPEG


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder in Tiny ImageNet's original layout: two classes, validation in one folder with annotations."""
    source = tmp_path / "tiny-imagenet-200"
    for wnid, colour in (("n01", RED), ("n02", GREEN)):
        for i in range(2):
            save_image(source / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", colour)
        (source / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    rows = []
    for i, (wnid, colour) in enumerate([("n02", GREEN), ("n01", RED), ("n02", GREEN)]):
        save_image(source / "val" / "images" / f"val_{i}.JPEG", colour)
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (source / "val" / "val_annotations.txt").write_text("".join(rows))
    save_image(source / "test" / "images" / "test_0.JPEG", BLUE)  # unlabelled: not used
    return source


def test_tiny_imagenet_in_its_original_layout(tmp_path: Path, tiny: Path) -> None:
    path = data.prepare("tiny_imagenet", tmp_path / "root", source=tiny)
    assert path == tmp_path / "root" / "tiny_imagenet.safetensors"
    found = data.load("tiny_imagenet", tmp_path / "root")
    assert found.classes == ("n01", "n02")
    assert found.shape == (3, 64, 64)
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.test.labels.tolist() == [1, 0, 1]
    for part in (found.train, found.test):
        for image, label in zip(part.images, part.labels, strict=True):
            assert_one_colour(image, (RED, GREEN)[label])


def test_tiny_imagenet_without_annotations_is_refused(tmp_path: Path, tiny: Path) -> None:
    (tiny / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match=r"val_annotations\.txt does not exist: .* is not in Tiny ImageNet's original"):
        data.prepare("tiny_imagenet", tmp_path / "root", source=tiny)
    assert not (tmp_path / "root" / "tiny_imagenet.safetensors").exists()


def test_a_missing_validation_image_is_named(tmp_path: Path, tiny: Path) -> None:
    (tiny / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UserError, match=r"val_1\.JPEG"):
        data.prepare("tiny_imagenet", tmp_path / "root", source=tiny)


def test_preparing_writes_nothing_that_loading_refuses(tmp_path: Path, tiny: Path) -> None:
    (tiny / "val" / "val_annotations.txt").write_text("")
    with pytest.raises(UserError):
        data.prepare("tiny_imagenet", tmp_path / "root", source=tiny)
    assert not (tmp_path / "root" / "tiny_imagenet.safetensors").exists()


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """A folder in ImageNet's layout: images of several sizes and modes."""
    source = tmp_path / "imagenet"
    save_image(source / "train" / "n01" / "wide.JPEG", RED, (50, 20))
    save_image(source / "train" / "n01" / "tall.JPEG", RED, (17, 40))
    save_image(source / "train" / "n02" / "grey.JPEG", 100, (9, 9), "L")
    save_image(source / "train" / "n02" / "transparent.png", (0, 255, 0, 10), (33, 8), "RGBA")
    save_image(source / "val" / "n01" / "a.JPEG", RED, (3, 5))
    save_image(source / "val" / "n02" / "b.png", 1, (16, 16), "1")
    return source


def test_imagenets_layout_with_images_of_any_size_and_mode(tmp_path: Path, imagenet: Path) -> None:
    data.prepare("imagefolder", tmp_path, source=imagenet, size=16)
    found = data.load("imagefolder", tmp_path)
    assert found.classes == ("n01", "n02")
    assert found.shape == (3, 16, 16)
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.test.labels.tolist() == [0, 1]
    colours = [RED, RED, (100, 100, 100), GREEN, RED, (255, 255, 255)]
    for image, colour in zip([*found.train.images, *found.test.images], colours, strict=True):
        assert_one_colour(image, colour)


def test_images_are_cut_in_the_middle_after_resizing_the_shorter_side(tmp_path: Path, imagenet: Path) -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = BLUE
    Image.fromarray(pixels).save(imagenet / "val" / "n01" / "a.png")
    (imagenet / "val" / "n01" / "a.JPEG").unlink()
    data.prepare("imagefolder", tmp_path, source=imagenet, size=10)
    assert_one_colour(data.load("imagefolder", tmp_path).test.images[0][:, :, 1:-1], BLUE)  # borders blend


def png_with_a_bad_chunk(good: bytes) -> bytes:
    at = good.index(b"IDAT")
    return good[:at] + b"\x00\x01\x02\x03" + good[at + 4 :]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("wide.JPEG", lambda good: good[: len(good) // 2]),
        ("wide.JPEG", lambda good: b"not an image"),
        ("wide.JPEG", lambda good: b""),
        ("late.png", png_with_a_bad_chunk),
        ("late.png", lambda good: good[:-30]),
    ],
)
def test_a_broken_image_is_named(tmp_path: Path, imagenet: Path, file: str, damage) -> None:
    path = imagenet / "train" / "n01" / file
    save_image(path, RED, (40, 40))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        data.prepare("imagefolder", tmp_path, source=imagenet, size=16)
    assert str(caught.value).startswith(f"{path} is not a readable image (")
    assert not (tmp_path / "imagefolder.safetensors").exists()


def test_a_broken_image_among_thousands_is_named_in_one_sentence(tmp_path: Path, imagenet: Path) -> None:
    folder = imagenet / "train" / "n01"
    for i in range(1024):  # enough for worker processes
        (folder / f"{i}.JPEG").hardlink_to(folder / "wide.JPEG")
    (folder / "bad.JPEG").write_bytes(b"not an image")
    with pytest.raises(UserError) as caught:
        data.prepare("imagefolder", tmp_path, source=imagenet, size=8)
    assert str(caught.value).startswith(f"{folder / 'bad.JPEG'} is not a readable image (")
    assert "\n" not in str(caught.value)


def test_thousands_of_images_keep_their_order(tmp_path: Path, imagenet: Path) -> None:
    for i in range(1024):
        folder = imagenet / "train" / ("n01", "n02")[i % 2]
        (folder / f"{i:04d}.JPEG").hardlink_to(folder / ("wide.JPEG", "grey.JPEG")[i % 2])
    data.prepare("imagefolder", tmp_path, source=imagenet, size=8)
    found = data.load("imagefolder", tmp_path)
    assert len(found.train.labels) == 1028
    red = found.train.images[:, 0].float().mean((1, 2)) - found.train.images[:, 2].float().mean((1, 2)) > 200
    assert torch.equal(red, found.train.labels == 0)


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagefolder"])
def test_a_source_without_train_and_val_is_refused(tmp_path: Path, name: str) -> None:
    for source in (None, tmp_path / "none"):
        with pytest.raises(UserError, match=rf"{name} needs --source, a folder that holds train/ and val/; got "):
            data.prepare(name, tmp_path, source=source)


def test_folders_with_different_classes_are_refused(tmp_path: Path, imagenet: Path) -> None:
    save_image(imagenet / "val" / "n03" / "c.png", 0, (8, 8), "L")
    with pytest.raises(UserError, match=r"do not have the same classes; they differ in \['n03'\]"):
        data.prepare("imagefolder", tmp_path, source=imagenet)


def test_a_class_without_images_is_refused(tmp_path: Path, imagenet: Path) -> None:
    (imagenet / "train" / "n00").mkdir()
    with pytest.raises(UserError, match="n00"):
        data.prepare("imagefolder", tmp_path, source=imagenet)


def test_a_prepared_file_is_kept(tmp_path: Path) -> None:
    path = write_cache(tmp_path, random_arrays())
    before = path.read_bytes()
    assert data.prepare("cifar10", tmp_path) == path
    assert path.read_bytes() == before


def test_digits_need_no_preparation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="digits comes with scikit-learn"):
        data.prepare("digits", tmp_path)


# --- Preparing with torchvision ---------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    """Fashion-MNIST's format: a magic number, the sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> dict[str, np.ndarray]:
    """Small Fashion-MNIST files where torchvision looks for them."""
    arrays = random_arrays(1, (1, 28, 28))
    raw = tmp_path / "downloads" / "FashionMNIST" / "raw"
    for part, file in (("train", "train"), ("test", "t10k")):
        write_idx(raw / f"{file}-images-idx3-ubyte", arrays[f"{part}_images"][:, 0])
        write_idx(raw / f"{file}-labels-idx1-ubyte", arrays[f"{part}_labels"].astype(np.uint8))
    return arrays


def test_fashion_mnist_from_torchvisions_files(tmp_path: Path, fashion: dict[str, np.ndarray]) -> None:
    data.prepare("fashion_mnist", tmp_path)
    found = data.load("fashion_mnist", tmp_path)
    assert np.array_equal(found.train.images, fashion["train_images"])
    assert np.array_equal(found.test.labels, fashion["test_labels"])
    assert len(found.classes) == 10
    assert found.classes[9] == "Ankle boot"


def test_half_unpacked_fashion_mnist_is_refused(tmp_path: Path, fashion: dict[str, np.ndarray]) -> None:
    path = tmp_path / "downloads" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="fashion_mnist"):
        data.prepare("fashion_mnist", tmp_path)


def write_cifar(folder: Path, arrays: dict[str, np.ndarray], name: str) -> list[str]:
    """The original pickles; returns the class names."""
    classes = [f"class {i}" for i in range(10 if name == "cifar10" else 100)]
    if name == "cifar10":
        folder, label, meta, label_names = folder / "cifar-10-batches-py", "labels", "batches.meta", "label_names"
        files = {f"data_batch_{i + 1}": ("train", slice(6 * i, 6 * i + 6)) for i in range(5)}
        files["test_batch"] = ("test", slice(None))
    else:
        folder, label, meta, label_names = folder / "cifar-100-python", "fine_labels", "meta", "fine_label_names"
        files = {"train": ("train", slice(None)), "test": ("test", slice(None))}
    folder.mkdir(parents=True)
    (folder / meta).write_bytes(pickle.dumps({label_names: classes}))
    for file, (part, rows) in files.items():
        images, labels = arrays[f"{part}_images"][rows], arrays[f"{part}_labels"][rows]
        content = {"data": images.reshape(len(images), -1), label: labels.tolist()}
        (folder / file).write_bytes(pickle.dumps(content))
    return classes


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_the_original_batches(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    arrays = random_arrays(2, (3, 32, 32))
    classes = write_cifar(tmp_path / "downloads", arrays, name)
    data.prepare(name, tmp_path)
    found = data.load(name, tmp_path)
    assert found.classes == tuple(classes)
    for part, images in (("train", found.train), ("test", found.test)):
        assert np.array_equal(images.images, arrays[f"{part}_images"])
        assert np.array_equal(images.labels, arrays[f"{part}_labels"])


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_a_failing_download_gives_one_sentence(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args, **_kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(UserError) as caught:
        data.prepare(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{name} cannot be downloaded to {tmp_path / 'downloads'} (")
    assert "no network" in message
    assert "\n" not in message
    assert not (tmp_path / f"{name}.safetensors").exists()
