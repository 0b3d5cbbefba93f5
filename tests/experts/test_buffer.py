"""Straightened trajectories: MCT's formula written tensor by tensor, and what it must keep."""

import itertools
import math
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from loaders import NETWORK, write_experts
from torch import Tensor

import cddlib
from cddlib.experts.buffer import Buffer
from cddlib.networks.convnet import unflatten

EPOCHS = 5


def wandering(key: object, epochs: int = EPOCHS) -> list[Tensor]:
    """Steps in all directions, of unequal length."""
    rng = cddlib.generator("wander", str(key))
    path = [NETWORK.init(rng)]
    for epoch in range(epochs):
        path.append(path[-1] + 0.3 / (epoch + 1) * torch.randn(path[0].shape, generator=rng))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Buffer:
    return write_experts(tmp_path_factory.mktemp("wandering"), [wandering(0), wandering(1)], {})


def straightened(buffer: Buffer, expert: int, epoch: float) -> dict[str, np.ndarray[Any, Any]]:
    """MCT's formula for each tensor, with numpy in float64."""
    named = [unflatten(buffer.network, buffer.parameters(expert, e)) for e in range(buffer.epochs + 1)]
    found = {}
    for name in buffer.network.shapes:
        points = [tensors[name].double().numpy() for tensors in named]
        lengths = [math.sqrt(((b - a) ** 2).sum()) for a, b in itertools.pairwise(points)]
        travelled = [sum(lengths[:e]) / sum(lengths) for e in range(len(points))]
        fraction = np.interp(epoch, range(len(points)), travelled)
        found[name] = points[0] + fraction * (points[-1] - points[0])
    return found


@hypothesis.given(expert=st.integers(0, 1), epoch=st.floats(0, EPOCHS) | st.integers(0, EPOCHS))
def test_the_convexified_trajectory_is_mct_s(written: Buffer, expert: int, epoch: float) -> None:
    found = unflatten(written.network, Buffer(written.folder, convex=True).parameters(expert, epoch))
    for name, wanted in straightened(written, expert, epoch).items():
        np.testing.assert_allclose(found[name].numpy(), wanted, atol=2e-6)


def test_tensors_that_stand_still_or_come_back_do_not_move(tmp_path: Path) -> None:
    path = wandering("still", 4)
    for epoch, theta in enumerate(path):
        tensors = unflatten(NETWORK, theta)
        tensors["norm0.weight"].fill_(1.0)
        tensors["norm0.bias"].fill_([0.0, 1.0, 2.0, 1.0, 0.0][epoch])
    convex = Buffer(write_experts(tmp_path, [path], {}).folder, convex=True)
    for epoch in (0, 1, 1.5, 3.9, 4):
        theta = convex.parameters(0, epoch)
        assert theta.isfinite().all()
        tensors = unflatten(convex.network, theta)
        assert torch.equal(tensors["norm0.weight"], torch.ones(2))
        assert torch.equal(tensors["norm0.bias"], torch.zeros(2))


@pytest.mark.parametrize("epoch", [-0.5, -1, EPOCHS + 0.25, EPOCHS + 1])
def test_epochs_outside_the_trajectory_are_refused(written: Buffer, epoch: float) -> None:
    with pytest.raises(cddlib.UserError, match=rf"expert-000.*: epoch {epoch} of {EPOCHS} cannot be read"):
        Buffer(written.folder, convex=True).parameters(0, epoch)


def test_the_trajectory_is_measured_once(written: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    read, stored = [], Buffer._stored
    monkeypatch.setattr(Buffer, "_stored", lambda self, *which: read.append(which[1]) or stored(self, *which))
    convex = Buffer(written.folder, convex=True)
    convex.parameters(0, 2.5)
    assert set(read) == set(range(EPOCHS + 1))
    read.clear()
    convex.parameters(0, 3.5)
    assert read == []
