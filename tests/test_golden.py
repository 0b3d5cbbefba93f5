"""Losses of experts and of distillation against a golden record, which tests/golden/write.py rewrites."""

from typing import Any

import pytest
from golden.write import GOLDEN, RUNS, golden

from cddbook.records import read_record

TOLERANCE = 1e-4
"""Relative. Other kernels and instruction sets stay below 1e-5 here, and real changes far above."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of this code on this machine."""
    return golden(tmp_path_factory.mktemp("golden"))


def test_experts(found: dict[str, Any]) -> None:
    wanted = read_record(GOLDEN)["train_loss"]
    assert found["train_loss"] == [pytest.approx(losses, rel=TOLERANCE) for losses in wanted]


@pytest.mark.parametrize("name", RUNS)
def test_distillation(found: dict[str, Any], name: str) -> None:
    wanted = read_record(GOLDEN)[name]
    for drawn in ("matched", "anchor"):
        assert found[name][drawn] == wanted[drawn]
    assert found[name]["step_size"] == pytest.approx(wanted["step_size"], rel=TOLERANCE)
    assert found[name]["losses"] == [pytest.approx(losses, rel=TOLERANCE) for losses in wanted["losses"]]
