"""The synthetic set: initialisation, saving and loading."""

import dataclasses
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jaxtyping
import pytest
import torch
from loaders import described, small_set
from safetensors.torch import load_file

from cddlib.data import dataset as data
from cddlib.data.preprocessing import fit_preprocessing
from cddlib.experts.buffer import Buffer
from cddlib.runtime import files
from cddlib.runtime.errors import UserError
from cddlib.synthetic import SyntheticConfig, SyntheticSet, initialise

CPU = torch.device("cpu")


def start(buffer: Buffer, seed: int = 0, **config: object) -> SyntheticSet:
    return initialise(SyntheticConfig(**config), data.load("digits"), buffer, seed, CPU)


def rows(images: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(image.flatten().tolist()) for image in images]


def last_logits(buffer: Buffer, images: torch.Tensor) -> list[torch.Tensor]:
    """Logits of every finished expert."""
    return [buffer.network(buffer.parameters(expert, buffer.epochs), images) for expert in range(len(buffer.experts))]


def right(buffer: Buffer, synthetic: SyntheticSet) -> torch.Tensor:
    """experts x images: who classifies which image correctly."""
    return torch.stack([logits.argmax(1) == synthetic.labels for logits in last_logits(buffer, synthetic.images)])


def test_real_images_are_distinct_training_images_class_major(buffer: Buffer) -> None:
    synthetic = start(buffer, ipc=20)
    assert torch.equal(start(buffer, ipc=20).images, synthetic.images)
    assert not torch.equal(start(buffer, ipc=20, seed=1).images, synthetic.images)
    assert synthetic.labels.tolist() == [label for label in range(10) for _ in range(20)]
    assert synthetic.label_logits is None
    assert synthetic.step_size == torch.tensor(0.01)
    assert synthetic.classes == tuple("0123456789")
    train, validation = data.load("digits").split
    allowed = set(zip(rows(buffer.preprocessing(train.images)), train.labels.tolist(), strict=True))
    chosen = list(zip(rows(synthetic.images), synthetic.labels.tolist(), strict=True))
    assert set(chosen) <= allowed
    assert len(set(chosen)) == 200
    assert not set(rows(synthetic.images)) & set(rows(buffer.preprocessing(validation.images)))


def test_correct_images_are_classified_correctly_by_an_expert(buffer: Buffer) -> None:
    assert not right(buffer, start(buffer, ipc=20, init="real")).all(1).any()
    synthetic = start(buffer, ipc=20, init="correct")
    assert right(buffer, synthetic).all(1).any()


def test_noise_is_standard_normal(buffer: Buffer) -> None:
    synthetic = start(buffer, ipc=50, init="noise")
    assert synthetic.images.shape == (500, 1, 8, 8)
    assert synthetic.images.mean().abs() < 0.03
    assert (synthetic.images.std() - 1).abs() < 0.03


def test_soft_labels_average_over_the_experts_that_are_right(buffer: Buffer) -> None:
    synthetic = start(buffer, ipc=60, labels="learned")
    every = last_logits(buffer, synthetic.images)
    how_many = right(buffer, synthetic).sum(0)
    assert set(how_many.tolist()) == {0, 1, 2}  # all cases are there
    for i, label in enumerate(synthetic.labels):
        good = [logits[i] for logits in every if logits[i].argmax() == label] or [logits[i] for logits in every]
        assert torch.allclose(synthetic.label_logits[i], sum(good) / len(good), atol=1e-4)


def test_soft_labels_of_noise_are_those_of_real_images(buffer: Buffer) -> None:
    noise, real = (start(buffer, ipc=2, labels="learned", init=init) for init in ("noise", "real"))
    teacher = start(buffer, ipc=2, labels="teacher")
    assert torch.equal(noise.label_logits, real.label_logits) and torch.equal(teacher.label_logits, real.label_logits)


@pytest.mark.parametrize("init", ["real", "correct", "noise"])
def test_more_images_than_a_class_has_are_refused(buffer: Buffer, init: str) -> None:
    with pytest.raises(UserError, match=r"^ipc is 500, but class 0 has only \d+ images to choose from\.$"):
        start(buffer, ipc=500, init=init)


@pytest.mark.parametrize("zca", [False, True])
@pytest.mark.parametrize("labels", ["hard", "learned"])
def test_a_saved_set_comes_back(buffer: Buffer, tmp_path: Path, zca: bool, labels: str) -> None:
    path = tmp_path / "synthetic.safetensors"
    preprocessing = fit_preprocessing(data.load("digits"), zca=zca)
    saved = dataclasses.replace(start(buffer, ipc=2, labels=labels), preprocessing=preprocessing, subsets=2)
    for variable in saved.variables():
        variable.requires_grad_()  # as in distillation
    saved.save(path, iteration=7, buffer_id="b")
    again = tmp_path / "again" / path.name
    saved.save(again, iteration=7, buffer_id="b")
    assert again.read_bytes() == path.read_bytes()
    found = SyntheticSet.load(path)
    assert described(found) == described(saved)
    assert not any(tensor.requires_grad for tensor in found.variables())
    assert found.subsets == saved.copy().subsets == saved.to(CPU).subsets == 2
    assert files.read_tensors(path, "synthetic")[1]["iteration"] == 7


NOT_WHOLE = [
    *({name: None} for name in ("images", "labels", "step_size", "preprocessing.mean")),
    *({"label_logits": change} for change in (lambda t: t[1:].clone(), lambda t: t[:, 1:].clone())),
    *(
        {"labels": change, "label_logits": None}
        for change in (lambda t: t.float(), lambda t: t + 1, lambda t: t[1:].clone())
    ),
    {"images": lambda t: t.flatten(1)},
    {"step_size": lambda t: torch.ones(2)},
    {"preprocessing.mean": lambda t: torch.ones(3)},
    *({"subsets": number} for number in (0, -1, 4, 1.5, "2", None, [1])),
    {"classes": 10},
    {"classes": [], "label_logits": None, **dict.fromkeys(("images", "labels"), lambda t: t[:0].clone())},
]
"""What is left out of the tensors, replaced in them or in the header."""


@pytest.mark.parametrize("change", NOT_WHOLE)
def test_a_set_that_is_not_whole_is_refused(buffer: Buffer, tmp_path: Path, monkeypatch, change: dict) -> None:
    path, header = tmp_path / "set.safetensors", {"classes": [*"0123456789"], "subsets": 1}
    start(buffer, ipc=3, labels="learned").save(path)
    tensors = load_file(path)
    files.write_tensors(path, tensors, "synthetic", header)
    assert SyntheticSet.load(path).subsets == 1
    changed = {name: value(tensors[name]) if callable(value) else value for name, value in change.items()}
    told = {name: tensor for name, tensor in (tensors | changed).items() if torch.is_tensor(tensor)}
    header |= {name: value for name, value in changed.items() if name in header}
    files.write_tensors(path, told, "synthetic", header)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it, without shape checks
    with pytest.raises(UserError, match=r"set\.safetensors (is not a synthetic set \(|has classes in its header)"):
        SyntheticSet.load(path)


@hypothesis.given(classes=st.integers(1, 6), ipc=st.integers(1, 12), data=st.data())
def test_every_image_is_in_one_subset(classes: int, ipc: int, data: st.DataObject) -> None:
    subsets = data.draw(st.integers(1, ipc))
    labels = torch.arange(classes).repeat_interleave(ipc)
    images, names = torch.zeros(len(labels), 1, 2, 3), tuple("abcdef"[:classes])
    synthetic = small_set(0, images=images, labels=labels, label_logits=None, classes=names, subsets=subsets)
    first = ipc * torch.arange(classes)[:, None]
    parts = [synthetic.subset(number).view(classes, -1) - first for number in range(subsets)]
    assert all((part == part[0]).all() for part in parts)  # the same places of every class
    assert torch.cat([part[0] for part in parts]).tolist() == list(range(ipc))  # the first subset first
    assert all(
        {*synthetic.learned(number).tolist()}
        == {*torch.cat([(part + first).flatten() for part in parts[: number + 1]]).tolist()}
        for number in range(subsets)
    )
    sizes = [part.shape[1] for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_whitening_s_matrices_are_stored_once(buffer: Buffer, tmp_path: Path) -> None:
    """Beside the sets of a folder, which say what they need."""
    digits = data.load("digits")
    fewer = dataclasses.replace(digits, train=digits.split[0])
    whitenings = [fit_preprocessing(part, zca=True) for part in (digits, fewer)]
    first, other = (dataclasses.replace(start(buffer), preprocessing=whitening) for whitening in whitenings)
    beside = tmp_path / "preprocessing.safetensors"
    first.save(tmp_path / "one.safetensors")
    first.save(tmp_path / "two.safetensors")
    assert (tmp_path / "two.safetensors").stat().st_size < beside.stat().st_size / 3
    assert described(SyntheticSet.load(tmp_path / "two.safetensors")) == described(first)
    with pytest.raises(UserError, match=r"preprocessing\.safetensors holds another whitening than that of three"):
        other.save(tmp_path / "three.safetensors")
    beside.unlink()
    with pytest.raises(UserError, match=r"preprocessing\.safetensors does not exist"):
        SyntheticSet.load(tmp_path / "one.safetensors")
    other.save(tmp_path / "three.safetensors")
    with pytest.raises(UserError, match=r"preprocessing\.safetensors does not hold the whitening of one\.safetensors"):
        SyntheticSet.load(tmp_path / "one.safetensors")
