"""How much work a chapter does."""

import ast
import itertools
from typing import Any, NamedTuple

from cddlib.runtime.errors import UserError


class Profile(NamedTuple):
    """Overrides of the recipes of a buffer and a distillation, the lengths of a study's runs, and repetitions."""

    buffer: dict[str, Any]
    distill: dict[str, Any]
    correlate_iterations: int
    compare_iterations: int
    """Matched segments of each run."""
    seeds: int = 3


PROFILES = {
    "ci": Profile(
        buffer={"width": 8, "experts": 2, "epochs": 10},
        distill={"width": 8, "window_end": 8, "iterations": 4, "student_steps": 3}
        | {"validate_every": 2, "evaluation_epochs": 5},
        correlate_iterations=3,
        compare_iterations=8,
        seeds=2,
    ),
    "quick": Profile(
        buffer={"experts": 3},
        distill={"iterations": 32, "validate_every": 8, "evaluation_epochs": 200},
        correlate_iterations=16,
        compare_iterations=64,
    ),
    "full": Profile(buffer={}, distill={}, correlate_iterations=200, compare_iterations=5000),
}


def profile(name: str) -> Profile:
    """The profile called `name`: ci (seconds), quick (minutes on a CPU, the digits) or full (the whole recipe).

    Raises:
        UserError: there is no such profile, or papermill gave the chapter that asks a parameter that it does not have.
    """
    from IPython import get_ipython

    shell = get_ipython()
    for declared, given in itertools.pairwise(shell.history_manager.input_hist_raw if shell else []):
        if given.startswith("# Parameters\n") and (unknown := [*_assigned(given).keys() - _assigned(declared).keys()]):
            raise UserError(f"there is no parameter {unknown[0]}; the chapter has {', '.join(_assigned(declared))}.")
    if not isinstance(name, str) or name not in PROFILES:
        raise UserError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}.")
    return PROFILES[name]


def _assigned(cell: str) -> dict[str, None]:
    """The names that a cell of parameters assigns, in order."""
    assignments = (statement for statement in ast.parse(cell).body if isinstance(statement, ast.Assign))
    return {ast.unparse(target): None for statement in assignments for target in statement.targets}
