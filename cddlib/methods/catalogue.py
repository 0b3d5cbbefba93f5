"""The methods of trajectory matching, each in one place: a name, an idea, and what it sets on the engine.

A method stands on a *base*, whose values it takes over, and says what differs on every data set. The values that
belong to one cell, (data set, images per class), are lines of `cells.csv` beside this file; `cddlib.methods.recipes`
reads them.

To add a method, add a block here and its lines there; the command line, the tables and the book find it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """A method as configuration of the engine."""

    name: str
    """As on the command line and in `cells.csv`."""
    paper: str
    """Authors, year, arXiv number."""
    idea: str
    """In a line."""
    loss: str
    """What is minimised, where it is not the base's; formulas in TeX, between dollars."""
    base: "Method | None" = None
    """The method whose values hold where this one sets none."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `DistillConfig` and `BufferConfig` that differ from the base's in every cell."""
    source: str = ""
    """Where the values in `cells.csv` come from, except those found by search."""


MTT = Method(
    name="mtt",
    paper="Cazenavette et al. 2022, arXiv 2203.11932",
    idea="Match one segment of one expert's trajectory, drawn anew every iteration.",
    loss=r"$\lVert\theta_N-\theta^*_{t+M}\rVert^2 / \lVert\theta^*_t-\theta^*_{t+M}\rVert^2$",
    source="the author's commands (dc_benchmark, methods/tm/readme.md)",
)

TESLA = Method(
    name="tesla",
    paper="Cui et al. 2023, arXiv 2211.10586",
    idea="Memory that does not grow with N, by a truncated gradient; soft labels from the target for 1000 classes.",
    loss="MTT's; its gradient leaves out how an image acts through later parameters, and the released code halves it",
    base=MTT,
    settings={"gradient": "halved"},
    source="the repository's README (justincui03/tesla)",
)

FTD = Method(
    name="ftd",
    paper="Du et al. 2023, arXiv 2211.11004",
    idea="Experts trained towards flat minima, so that a student that is off their path stays near; images averaged.",
    loss=r"MTT's; the experts' is $L(\theta)+\alpha\max_{\lVert e\rVert\le\rho}(L(\theta+e)-L(\theta))$",
    base=MTT,
    settings={"sharpness_radius": 0.01},
    source="the paper, Table 7",
)

DATM = Method(
    name="datm",
    paper="Guo et al. 2024, arXiv 2310.05773",
    idea="Early segments for few images, late ones for many; a growing window; learned soft labels; easy first images.",
    loss="MTT's, with soft cross-entropy on learned logits; iterations above a threshold are skipped",
    base=FTD,
    settings={"labels": "learned", "init": "correct", "ema": None, "loss_threshold": 1.0, "sharpness_weight": 0.3},
    source="the repository's configurations (NUS-HPC-AI-Lab/DATM)",
)

PAD = Method(
    name="pad",
    paper="Li et al. 2024, arXiv 2408.03360",
    idea="Experts see easy images first and lose the easiest later; the loss leaves out shallow layers, which in the "
    "released code are the parameters that are matched best.",
    loss="DATM's, over the parameters with the largest errors only",
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

ATT = Method(
    name="att",
    paper="Liu et al. 2024, arXiv 2407.14245",
    idea="Match the student at the step that is nearest to the target, not always at the last one.",
    loss=r"MTT's at $n^*=\arg\min_i\lVert\theta_i-\theta^*_{t+M}\rVert_1$ in place of $N$",
    base=MTT,
    settings={"match_step": "nearest", "batch_size": 512},
    source="the repository's README (NiaLiu/ATT): its figure; iterations and averages from its commands",
)

MCT = Method(
    name="mct",
    paper="Zhong et al. 2025, arXiv 2406.19827",
    idea="Straighten each expert's trajectory into a line, and start anywhere on it.",
    loss=r"MTT's, on the line from $\theta^*_0$ to $\theta^*_T$ instead of the expert's path",
    base=MTT,
    settings={"convex": True, "zca": False, "gradient": "halved"},
    source="the repository's run_command.md (Zhong0x29a/MCT), whose code never reads the step size given there",
)

SEQMATCH = Method(
    name="seqmatch",
    paper="Du et al. 2023, arXiv 2311.01570",
    idea="Optimise parts of the synthetic set one after the other, each on a later part of the trajectory.",
    loss="MTT's in the subset's part of the window; students learn all subsets so far, and only the last is optimised",
    base=MTT,
    settings={"subsets": 2},
    source="the repository's run.sh (shqii1j/seqmatch), which trains new experts, and learns another step size, for "
    "every subset; here the window is cut instead",
)

CONTRA = Method(
    name="contra",
    paper="ICLR 2025 submission 5068",
    idea="Match K segments at once, so that none is forgotten while another is matched.",
    loss="the mean over K start epochs t, R apart, of the base's loss",
    base=DATM,
    settings={"segments": 4},
    source="tesla's values on ImageNet-1K, as reviews report of the paper; mtt's on the small data sets, where K "
    "alone differs",
)

METHODS = {method.name: method for method in (MTT, TESLA, FTD, DATM, PAD, ATT, MCT, SEQMATCH, CONTRA)}
