"""What the tests of distillation share."""

from collections.abc import Callable
from typing import Any

import pytest

import cddlib
from cddlib.distillation.config import DistillConfig


@pytest.fixture(scope="session")
def recipe(quick: dict[str, Any]) -> Callable[..., DistillConfig]:
    """Configurations of a second; `validate_every=0` for those that need the last iterate."""
    return lambda **overrides: cddlib.distill_recipe("contra", **{**quick, "segments": 2, **overrides})
