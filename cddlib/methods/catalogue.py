"""The methods of trajectory matching, each in one place: a name, and what it sets on the engine.

A method stands on a *base*, whose values it takes over, and says what differs on every data set. The values that
belong to one cell, (data set, images per class), are lines of `cells.csv` beside this file; `cddlib.methods.recipes`
reads them.

To add a method, add a block here and its lines there; the command line and the tables find it. `book/methods.md` says
what each method is about.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """A method as configuration of the engine."""

    name: str
    """As on the command line and in `cells.csv`."""
    base: "Method | None" = None
    """The method whose values hold where this one sets none."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `DistillConfig` and `BufferConfig` that differ from the base's in every cell."""
    source: str = ""
    """Where the values in `cells.csv` come from, except those found by search."""


# Cazenavette et al. 2022, arXiv 2203.11932
MTT = Method(name="mtt", source="the author's commands (dc_benchmark, methods/tm/readme.md)")

# Cui et al. 2023, arXiv 2211.10586
TESLA = Method(
    name="tesla", base=MTT, settings={"gradient": "halved"}, source="the repository's README (justincui03/tesla)"
)

# Du et al. 2023, arXiv 2211.11004
FTD = Method(name="ftd", base=MTT, settings={"sharpness_radius": 0.01}, source="the paper, Table 7")

# Guo et al. 2024, arXiv 2310.05773
DATM = Method(
    name="datm",
    base=FTD,
    settings={"labels": "learned", "init": "correct", "ema": None, "loss_threshold": 1.0, "sharpness_weight": 0.3},
    source="the repository's configurations (NUS-HPC-AI-Lab/DATM)",
)

# Li et al. 2024, arXiv 2408.03360
PAD = Method(
    name="pad",
    base=DATM,
    settings={
        "dropped_fraction": 0.5,
        "easiest_fraction": 0.75,
        "all_from_epoch": 20,
        "drop_epochs": (40, 60),
        "drop_fractions": (0.1, 0.2),
    },
    source="the paper, Table 7; dropped fractions and expert schedule from the repository (NUS-HPC-AI-Lab/PAD)",
)

# Liu et al. 2024, arXiv 2407.14245
ATT = Method(
    name="att",
    base=MTT,
    settings={"match_step": "nearest"},
    source="the repository's README (NiaLiu/ATT): its figure; iterations and averages from its commands",
)

# Zhong et al. 2025, arXiv 2406.19827
MCT = Method(
    name="mct",
    base=MTT,
    settings={"convex": True, "zca": False},
    source="the repository's run_command.md (Zhong0x29a/MCT), whose code never reads the step size given there",
)

# Du et al. 2023, arXiv 2311.01570
SEQMATCH = Method(
    name="seqmatch",
    base=MTT,
    settings={"subsets": 2},
    source="the repository's run.sh (shqii1j/seqmatch), which trains new experts, and learns another step size, for "
    "every subset; here the window is cut instead",
)

# ICLR 2025 submission 5068
CONTRA = Method(
    name="contra",
    base=DATM,
    settings={"segments": 4},
    source="tesla's values on ImageNet-1K, as reviews report of the paper; mtt's on the small data sets, where K "
    "alone differs",
)

METHODS = {method.name: method for method in (MTT, TESLA, FTD, DATM, PAD, ATT, MCT, SEQMATCH, CONTRA)}
