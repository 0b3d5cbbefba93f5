"""PAD's curriculum: which images which epoch sees, and how hard an image is, each written out slowly."""

from math import exp, sqrt
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

import cddlib
from cddlib.data import augment
from cddlib.data.preprocessing import fit_preprocessing
from cddlib.experts import curriculum
from cddlib.experts.curriculum import CurriculumConfig, difficulty, rank_in_class


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Any possible curriculum. As values: beartype, which checks the class, draws random numbers of its own."""
    whole = draw(st.integers(1, 20))
    drops = sorted(draw(st.sets(st.integers(whole, 30), max_size=4)))
    fractions = draw(st.lists(st.floats(0, 0.9), min_size=len(drops), max_size=len(drops)))
    return {
        "easiest_fraction": draw(st.floats(0.05, 1)),
        "all_from_epoch": whole,
        "drop_epochs": tuple(drops),
        "drop_fractions": tuple(fractions),
    }


def wanted_bounds(config: CurriculumConfig, epoch: int) -> tuple[float, float]:
    """PAD's schedule, epoch by epoch as its code has it."""
    if epoch <= config.all_from_epoch:
        p = config.easiest_fraction
        return 0.0, p + (1 - p) * epoch / config.all_from_epoch
    dropped = 0.0
    for last, fraction in zip(config.drop_epochs, config.drop_fractions, strict=True):
        if epoch > last:
            dropped = fraction
    return dropped, 1.0


@hypothesis.given(values=configurations(), epoch=st.integers(0, 40))
def test_the_schedule_is_pad_s(values: dict[str, Any], epoch: int) -> None:
    config = CurriculumConfig(**values)
    assert config.bounds(epoch) == pytest.approx(wanted_bounds(config, epoch))
    assert config.ranks_images == any(config.bounds(epoch) != (0, 1) for epoch in range(40))


@hypothesis.given(images=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=40))
def test_ranks_count_what_is_easier_in_the_class(images: list[tuple[int, int]]) -> None:
    """Labels and scores; scores with ties, of which the earlier image is the easier."""
    labels, scores = (torch.tensor(values) for values in zip(*images, strict=True))
    found = rank_in_class(scores.float(), labels)
    for i, (label, score) in enumerate(images):
        same = [(s, j) for j, (other, s) in enumerate(images) if other == label]
        assert found[i].item() == pytest.approx(sum(pair < (score, i) for pair in same) / max(1, len(same) - 1))


def test_difficulty_is_el2n(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum, "SCORERS", 3)
    monkeypatch.setattr(curriculum, "SCORER_EPOCHS", 2)
    network = cddlib.ConvNet(cddlib.NetworkConfig(depth=1, width=4), (1, 8, 8), 10)
    digits = cddlib.load("digits")
    train, preprocessing = digits.split[0].select(torch.arange(150)), fit_preprocessing(digits, zca=False)
    found = difficulty(network, train, preprocessing, batch_size=40, learning_rate=0.2, strategy="crop")
    images = preprocessing(train.images)
    wanted = [0.0] * len(images)
    for scorer in range(3):
        theta = network.init(cddlib.generator("difficulty", scorer, "init"))
        for epoch in range(2):
            rng = cddlib.generator("difficulty", scorer, epoch)
            for indices in torch.randperm(len(images), generator=rng).split(40):
                inputs = augment.apply(augment.draw("crop", len(indices), rng), images[indices])
                theta.requires_grad_()
                loss = F.cross_entropy(network(theta, inputs), train.labels[indices])
                theta = (theta - 0.2 * torch.autograd.grad(loss, theta)[0]).detach()
        for i, (logits, label) in enumerate(zip(network(theta, images).tolist(), train.labels.tolist(), strict=True)):
            total = sum(exp(logit) for logit in logits)
            errors = [exp(logit) / total - (c == label) for c, logit in enumerate(logits)]
            wanted[i] += sqrt(sum(error**2 for error in errors)) / 3
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)
    assert max(wanted) - min(wanted) > 0.1
