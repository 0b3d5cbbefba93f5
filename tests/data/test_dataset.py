"""Data sets: splits, fingerprints, normalisation, whitening, lazy selections, cached files."""

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from works import refusal

import cddlib
from cddlib.data import dataset as data
from cddlib.data.dataset import Dataset, Images
from cddlib.data.preprocessing import fit_preprocessing
from cddlib.runtime import files
from cddlib.runtime.errors import UserError
from cddlib.training.epoch import fetch_real

CLASSES = ["a", "b", "c"]


def random_arrays(seed: int = 0, shape: tuple[int, ...] = (3, 4, 4)) -> dict[str, np.ndarray]:
    """A small data set as `cddlib.data.download` holds it before writing."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, n in (("train", 30), ("test", 9)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(n, dtype=np.int64) % len(CLASSES)
    return arrays


def fingerprint_of(arrays: dict[str, np.ndarray]) -> str:
    """The hash of all shapes and bytes."""
    digest = hashlib.sha256()
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        digest.update(str(arrays[name].shape).encode() + arrays[name].tobytes())
    return digest.hexdigest()[:16]


def write_cache(root: Path, arrays: dict[str, np.ndarray], name: str = "cifar10", **header: object) -> Path:
    """Write a data set as `cddlib.data.download` does, with some of the `header` changed."""
    path = root / f"{name}.safetensors"
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    fingerprint = {} if "fingerprint" in header else {"fingerprint": fingerprint_of(arrays)}
    files.write_tensors(path, tensors, "dataset", {"classes": CLASSES, **fingerprint, **header}, digests=False)
    return path


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A small data set, written and read where `CDDLIB_DATA` says."""
    monkeypatch.setenv("CDDLIB_DATA", str(tmp_path))
    write_cache(tmp_path, random_arrays())
    return data.load("cifar10")


# --- Digits and splits ------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_divided_by_class() -> None:
    digits, bunch = data.load("digits"), load_digits()
    assert (digits.shape, digits.classes) == ((1, 8, 8), tuple("0123456789"))
    images, labels = (
        torch.cat([getattr(part, name) for part in (digits.train, digits.test)]) for name in ("images", "labels")
    )
    wanted = np.round(bunch.images * 255 / 16).astype(np.uint8)
    found = Counter(zip((image.numpy().tobytes() for image in images), labels.tolist(), strict=True))
    assert found == Counter(zip((image.tobytes() for image in wanted), bunch.target.tolist(), strict=True))
    assert np.array_equal(digits.test.labels.bincount(), np.round(np.bincount(bunch.target) / 5))


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


def test_fingerprint_is_the_hash_of_all_bytes(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK", 7)
    keep, held_out = dataset.split
    for found in (dataset, dataclasses.replace(dataset, train=keep, test=held_out, recorded=None)):
        arrays = {
            f"{name}_{kind}": getattr(part, kind).numpy()
            for name, part in (("train", found.train), ("test", found.test))
            for kind in ("images", "labels")
        }
        assert found.fingerprint == fingerprint_of(arrays)


# --- Selections of images ---------------------------------------------------------------------------------------

positions = st.integers(-(2**40), 2**40)


@hypothesis.given(st.lists(st.lists(positions, min_size=1, max_size=30), max_size=3), st.lists(positions, max_size=9))
def test_a_selection_of_selections_is_what_indexing_gives(steps: list[list[int]], last: list[int]) -> None:
    arrays = random_arrays()
    images, labels = (torch.from_numpy(arrays[f"train_{name}"]) for name in ("images", "labels"))
    found = Images(images, labels)
    for step in steps:
        indices = torch.tensor(step) % len(labels)
        found, images, labels = found.select(indices), images[indices], labels[indices]
    assert torch.equal(found.images, images)
    assert torch.equal(found.labels, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK", 7)
        assert torch.equal(torch.cat(list(found.chunks())), images)
        elsewhere = found.to(torch.device("meta"))
    assert (elsewhere.images.shape, elsewhere.labels.shape) == (images.shape, labels.shape)
    assert elsewhere.images.device == elsewhere.labels.device == torch.device("meta")
    indices = torch.tensor(last, dtype=torch.long) % len(labels)
    assert torch.equal(found.take(indices), images[indices])


def test_preprocessing_fits_a_selection_as_it_fits_a_copy(dataset: Dataset) -> None:
    unknown = dataclasses.replace(dataset, name="digits", train=dataset.split[0])
    copied = dataclasses.replace(unknown, train=Images(unknown.train.images, unknown.train.labels))
    for zca in (False, True):
        wanted = fit_preprocessing(copied, zca=zca).tensors()
        torch.testing.assert_close(fit_preprocessing(unknown, zca=zca).tensors(), wanted, rtol=0, atol=0)


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


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet", "imagenet", "imagefolder"])
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


# --- Cached files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "source"), [("cifar10", ""), ("tiny_imagenet", " --source FOLDER")])
def test_a_missing_data_set_says_what_to_run(tmp_path: Path, name: str, source: str) -> None:
    said = f"{name} is not in {tmp_path}; run `cddlib data {name}{source} --root {tmp_path}` first."
    assert refusal(data.load, name, tmp_path) == said


def test_unknown_names_are_refused() -> None:
    for call in (lambda: data.load("mnist"), lambda: cddlib.prepare("mnist"), lambda: data.DataConfig(data="mnist")):
        with pytest.raises(UserError, match="unknown data set 'mnist'; choose one of digits, fashion_mnist, cifar10"):
            call()


ARRAYS = random_arrays()
NOT_BOTH = "are .*, not U8\\[n, c, h, w\\] and I64\\[n\\]"


@pytest.mark.parametrize(
    ("arrays", "header", "reason"),
    [
        ({"train_images": np.zeros((30, 3, 4, 4), np.float32)}, {}, f"train_images and train_labels {NOT_BOTH}"),
        ({"test_images": np.zeros((9, 48), np.uint8)}, {}, f"test_images and test_labels {NOT_BOTH}"),
        ({"test_images": np.zeros((9, 3, 5, 5), np.uint8)}, {}, f"test_images and test_labels {NOT_BOTH}"),
        ({"train_labels": np.zeros(29, np.int64)}, {}, f"train_images and train_labels {NOT_BOTH}"),
        ({name: ARRAYS[name][:0] for name in ("test_images", "test_labels")}, {}, f"test_images and .* {NOT_BOTH}"),
        ({name: array[:, :0] for name, array in ARRAYS.items() if "images" in name}, {}, f"train_images .* {NOT_BOTH}"),
        ({"test_labels": None}, {}, "it has no 'test_labels'"),
        ({"test_labels": np.full(9, 3)}, {}, "test_labels reach from 3 to 3, with 3 classes named"),
        ({}, {"fingerprint": "short"}, "its fingerprint is short"),
        ({}, {"fingerprint": 3}, "expected string or bytes-like object"),
        *(({}, {"classes": classes}, "classes in its header") for classes in (3, None, [1, 2])),
    ],
)
def test_a_cached_file_of_another_kind_is_refused(tmp_path: Path, arrays: dict, header: dict, reason: str) -> None:
    found = {name: array for name, array in {**ARRAYS, **arrays}.items() if array is not None}
    write_cache(tmp_path, found, **{"fingerprint": "0" * 16, **header})
    with pytest.raises(UserError, match=rf"cifar10\.safetensors (is not a cddlib data set \(|has ).*{reason}"):
        data.load("cifar10", tmp_path)


def test_a_flipped_bit_is_noticed_by_whoever_asks_for_the_fingerprint(tmp_path: Path) -> None:
    path = write_cache(tmp_path, ARRAYS)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    damaged = data.load("cifar10", tmp_path)
    found = data.fingerprint(damaged.train, damaged.test)
    assert refusal(lambda: damaged.fingerprint) == (
        f"{path} is damaged: its images and labels have the fingerprint {found}, not {fingerprint_of(ARRAYS)}, which "
        f"it names; delete it and run `cddlib data cifar10` again."
    )


# --- Sets larger than memory ------------------------------------------------------------------------------------


def anonymous_mb() -> float:
    """Memory of this process that is no file's, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_data_set_stays_in_its_file(tmp_path: Path) -> None:
    blank = {"train_images": np.zeros((20_000, 3, 64, 64), np.uint8), "train_labels": np.arange(20_000) % 3}
    write_cache(tmp_path, {**ARRAYS, "test_images": blank["train_images"][:9], **blank}, fingerprint="0" * 16)  # 234 MB
    del blank
    before = anonymous_mb()
    dataset = data.load("cifar10", tmp_path)
    train, _ = dataset.split
    assert data.fingerprint(dataset.train, dataset.test)
    fetch = fetch_real(train, fit_preprocessing(dataset, zca=False))
    for indices in torch.randperm(len(train.labels)).split(256):
        fetch(indices)
    assert train.to(torch.device("cpu")) is train
    assert anonymous_mb() - before < 120  # a chunk of 4096 images is 48 MB
