"""The methods of trajectory matching, each in one place: a name, an idea, and what it sets on the engine.

A method stands on a *base*, whose values it takes over, and says what differs: `settings` everywhere, and a row of `cells`
for each (data set, IPC) whose values were published. A column is a field of `DistillConfig` or `BufferConfig`. `searched`
has the same form for the data sets on which nobody published values; they come from the searches recorded in
`book/results`. `accuracies` are published test accuracies in percent; none was measured here.

To add a method, add a block here; the command line, the tables and the book find it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["published", "searched", "derived"]
"""Where values are from."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """A method as configuration of the engine."""

    name: str
    """As on the command line."""
    paper: str
    """Authors, year, arXiv number."""
    idea: str
    """In a line."""
    loss: str
    """What is minimised, where it is not the base's; formulas in TeX, between dollars."""
    base: "Method | None" = None
    """The method whose values hold where this one sets none."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What differs from the base everywhere."""
    source: str = ""
    """Where `cells` come from."""
    kind: Kind = "published"
    """What `cells` are."""
    cells: str = ""
    """Values, as a line of field names and then a line for each data set and IPC. A `-` leaves the base's."""
    searched: str = ""
    """Values found by search, in the same form."""
    accuracies: str = ""
    """Published accuracies in percent. A line has a data set, IPC, mean and deviation of every cell, and the source."""


MTT = Method(
    name="mtt",
    paper="Cazenavette et al. 2022, arXiv 2203.11932",
    idea="Match one segment of one expert's trajectory, drawn anew every iteration.",
    loss=r"$\lVert\theta_N-\theta^*_{t+M}\rVert^2 / \lVert\theta^*_t-\theta^*_{t+M}\rVert^2$",
    source="the author's commands (dc_benchmark, methods/tm/readme.md)",
    cells="""
        data        ipc student_steps expert_epochs window_end student_batch lr_images lr_step_size step_size zca
        cifar10       1 50 2  2 none  100 1e-7 0.01  true
        cifar10      10 30 2 20 none  100 1e-5 0.001 true
        cifar10      50 30 2 40 none 1000 1e-5 0.001 false
        cifar100      1 20 3 20 none 1000 1e-5 0.01  true
        cifar100     10 20 2 20 none 1000 1e-5 0.01  false
        cifar100     50 80 2 40  125 1000 1e-5 0.01  true
        tiny_imagenet 1 10 2 10 none  1e4 1e-4 0.01  false
        tiny_imagenet 10 20 2 40  200  1e4 1e-4 0.01  false
        tiny_imagenet 50 20 2 40  300  1e4 1e-4 0.01  false""",
    searched="""
        data          ipc iterations student_steps expert_epochs window_end student_batch lr_images lr_step_size step_size evaluation_epochs validate_every
        digits          1  100 20 2 12 none  30 1e-5 0.05 300  25
        digits         10  100 20 2 12 none 300 1e-5 0.05 300  25
        fashion_mnist   1 1000 20 2 12 none 100 1e-6 0.03 300 100
        fashion_mnist  10 1000 20 2 12 50   100 1e-6 0.02 300 100""",
    accuracies="""
        cifar10       1:46.3±0.8 10:65.3±0.7 50:71.6±0.2             NCFM paper, Table 1
        cifar100      1:24.3±0.3 10:40.1±0.4 50:47.7±0.2 100:49.2±0.4 NCFM paper, Table 1
        tiny_imagenet 1:8.8±0.3  10:23.2±0.2 50:28.0±0.3             NCFM paper, Table 1""",
)

TESLA = Method(
    name="tesla",
    paper="Cui et al. 2023, arXiv 2211.10586",
    idea="Memory that does not grow with N, by a truncated gradient; soft labels from the target for 1000 classes.",
    loss="MTT's; its gradient leaves out how an image acts through later parameters, and the released code halves it",
    base=MTT,
    settings={"gradient": "halved"},
    source="the repository's README (justincui03/tesla)",
    cells="""
        data      ipc student_steps expert_epochs window_end student_batch lr_images lr_step_size step_size zca labels experts iterations
        cifar10     1 50 2  5 none 1000 1e-7 0.01 false hard    -  10000
        cifar100   50 80 2 40  125 1000 1e-5 0.01 true  hard    -  10000
        imagenet    1 10 3 10  100  1e4 1e-4 0.01 false teacher 50 10000""",
    accuracies="""
        cifar10   1:48.5±0.8 10:66.4±0.8 50:72.6±0.7              PAD paper, Table 1
        cifar100  1:24.8±0.4 10:41.7±0.3 50:47.9±0.3 100:49.2±0.4 PAD paper, Table 1
        imagenet  1:7.7±0.2 10:17.8±1.3 50:27.9±1.2               InfoUtil paper""",
    searched="""
        data ipc lr_images
        digits 1 30""",
)

FTD = Method(
    name="ftd",
    paper="Du et al. 2023, arXiv 2211.11004",
    idea="Experts trained towards flat minima, so that a student that is off their path stays near; images averaged.",
    loss=r"MTT's; the experts' is $L(\theta)+\alpha\max_{\lVert e\rVert\le\rho}(L(\theta+e)-L(\theta))$",
    base=MTT,
    settings={"sharpness_radius": 0.01},
    source="the paper, Table 7",
    cells="""
        data        ipc student_steps expert_epochs window_end student_batch lr_images lr_step_size step_size sharpness_weight ema
        cifar10       1 50 2  2 none  100 1e-7 0.01  0.3 0.9999
        cifar10      10 30 2 20 none  100 1e-5 0.001 0.3 0.9995
        cifar10      50 30 2 40 none 1000 1e-5 0.01  1   0.999
        cifar100      1 40 3 20 none 1000 1e-5 0.01  1   0.9995
        cifar100     10 20 2 40 none 1000 1e-5 0.01  1   0.9995
        cifar100     50 80 2 40 1000 1000 1e-5 0.01  1   0.999
        tiny_imagenet 1 30 2 10 none  1e4 1e-4 0.01  1   0.999
        tiny_imagenet 10 20 2 40  500  1e4 1e-4 0.01  1   0.999""",
    accuracies="""
        cifar10       1:46.8±0.3 10:66.6±0.3 50:73.8±0.2 FTD paper, Table 1
        cifar100      1:25.2±0.2 10:43.4±0.3 50:50.7±0.3 FTD paper, Table 1
        tiny_imagenet 1:10.4±0.3 10:24.5±0.2             FTD paper, Table 1""",
)

DATM = Method(
    name="datm",
    paper="Guo et al. 2024, arXiv 2310.05773",
    idea="Early segments for few images, late ones for many; a growing window; learned soft labels; easy first images.",
    loss="MTT's, with soft cross-entropy on learned logits; iterations above a threshold are skipped",
    base=FTD,
    settings={"labels": "learned", "init": "correct", "ema": None, "loss_threshold": 1.0, "sharpness_weight": 0.3},
    source="the repository's configurations (NUS-HPC-AI-Lab/DATM)",
    searched="""
        data ipc lr_images lr_labels
        digits 1 30 2""",
    cells="""
        data        ipc student_steps expert_epochs window_start window_end_initial window_end expansion_iterations student_batch lr_images lr_labels lr_step_size step_size loss_threshold init zca epochs iterations evaluation_batch
        cifar10       1  80 2  0 none  4    -   10  100  5 1e-7 0.01 1.1 correct true 100 10000 128
        cifar10      10  80 2  0 10   20 1000  100  100  2 1e-5 0.01 1.0 correct true 100 10000 128
        cifar10      50  80 2  0 20   40 2000  500 1000  2 1e-5 0.01 1.0 correct true 100 10000 128
        cifar10     500  40 2 40 none 60    - 1000   50 10 1e-5 0.01 1.0 correct true 100 10000 128
        cifar10    1000 100 2 40 none 60    - 1000   50 10 1e-5 0.01 1.0 correct true 100 10000 128
        cifar100      1  40 3  0 10   20 1000 1000 1000 10 1e-5 0.01 1.0 correct true 100 10000 128
        cifar100     10  80 2  0 30   50 2000 1000 1000 10 1e-5 0.01 1.0 correct true 100 10000 128
        cifar100     50  80 2 20 none 70    - 1000 1000 10 1e-5 0.01 1.0 real    true 100 10000 128
        cifar100    100  80 2 30 none 70    - 1000   50 10 1e-5 0.01 1.0 correct true 100 10000 128
        tiny_imagenet 1  40 2  0 15   20 2000 1000  1e4 10 1e-4 0.01 1.0 correct true 100 10000 128
        tiny_imagenet 10 40 2 10 none 50    -  500  100 10 1e-4 0.01 1.0 correct true 100 10000 128
        tiny_imagenet 50 20 2 40 none 70    - 1000  100 10 1e-4 0.01 1.0 correct true 100 10000 128""",
    accuracies="""
        cifar10       1:46.9±0.5 10:66.8±0.2 50:76.1±0.3 500:83.5±0.2 1000:85.5±0.4 DATM README
        cifar100      1:27.9±0.2 10:47.2±0.4 50:55.0±0.2 100:57.5±0.2               DATM README
        tiny_imagenet 1:17.1±0.3 10:31.1±0.3 50:39.7±0.3                            DATM README""",
)

PAD = Method(
    name="pad",
    paper="Li et al. 2024, arXiv 2408.03360",
    idea="Experts see easy images first and lose the easiest later; parameters that are matched already are left out.",
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
    cells="""
        data        ipc student_steps window_start window_end_initial window_end expansion_iterations dropped_fraction
        cifar10       1  80  0 none  4    - 0
        cifar10      10  80  0 10   20 1000 0.5
        cifar10      50  80  0 20   40 2000 0.5
        cifar10     500  80 40 none 60    - 0.5
        cifar10    1000  80 40 none 60    - 0.5
        cifar100      1  40  0 10   20 1000 0.5
        cifar100     10  80  0 20   40 2000 0.5
        cifar100     50  80 40 60   80 2000 0
        cifar100    100  80 40 none 80    - 0.5
        tiny_imagenet 1  60  0 15   30 2000 0.5
        tiny_imagenet 10 60  0 20   40 2000 0.5
        tiny_imagenet 50 80 20 40   60 2000 0.5""",
    accuracies="""
        cifar10       1:47.2±0.6 10:67.4±0.3 50:77.0±0.5 500:84.6±0.3 1000:86.7±0.2 PAD paper, Table 1
        cifar100      1:28.4±0.5 10:47.8±0.2 50:55.9±0.3 100:58.5±0.3               PAD paper, Table 1
        tiny_imagenet 1:17.7±0.2 10:32.3±0.4 50:41.6±0.4                            PAD paper, Table 1""",
)

ATT = Method(
    name="att",
    paper="Liu et al. 2024, arXiv 2407.14245",
    idea="Match the student at the step that is nearest to the target, not always at the last one.",
    loss=r"MTT's at $n^*=\arg\min_i\lVert\theta_i-\theta^*_{t+M}\rVert_1$ in place of $N$",
    base=MTT,
    settings={"match_step": "nearest"},
    source="the repository's README figure (NiaLiu/ATT)",
    cells="""
        data        ipc student_steps expert_epochs window_end student_batch lr_images lr_step_size step_size zca ema batch_size
        cifar10       1 80 4  2 none  100 1e-7 0.01  true  0.999 512
        cifar10      10 30 2 20 none  1e4 1e-4 0.01  true  0.999 512
        cifar10      50 50 2 40 none  100 1e-5 0.001 false 0.999 512
        cifar100      1 50 4 20 none  500 1e-5 0.01  true  0.999 512
        cifar100     10 20 2 40 none 1000 1e-5 0.01  false 0.999 512
        cifar100     50 80 2 40 1200 1000 1e-5 0.01  true  0.999 512
        tiny_imagenet 1 30 2 10 none  1e4 1e-4 0.01  false 0.999 512
        tiny_imagenet 10 20 2 40 none  1e4 1e-5 1e-4  false 0.999 512""",
    searched="""
        data ipc student_steps lr_images
        digits 1 20 30""",
    accuracies="""
        cifar10       1:48.3±1.0 10:67.7±0.6 50:74.5±0.4 ATT paper, Table 2
        cifar100      1:26.1±0.3 10:44.2±0.5 50:51.2±0.3 ATT paper, Table 2
        tiny_imagenet 1:11.0±0.5 10:25.8±0.4             ATT paper, Table 2""",
)

MCT = Method(
    name="mct",
    paper="Zhong et al. 2025, arXiv 2406.19827",
    idea="Straighten each expert's trajectory into a line, and start anywhere on it.",
    loss=r"MTT's, on the line from $\theta^*_0$ to $\theta^*_T$ instead of the expert's path",
    base=MTT,
    settings={"convex": True, "zca": False},
    source="the repository's run_command.md (Zhong0x29a/MCT)",
    cells="""
        data    ipc student_steps expert_epochs window_end lr_images lr_step_size step_size
        cifar10   1 60  6  4 1000 1e-7 0.01
        cifar10  10 30 15  8 1000 1e-5 0.01
        cifar10  50 30  2 40 1000 1e-5 0.001""",
    searched="""
        data ipc expert_epochs lr_images
        digits 1 4 30""",
)

SEQMATCH = Method(
    name="seqmatch",
    paper="Du et al. 2023, arXiv 2311.01570",
    idea="Optimise parts of the synthetic set one after the other, each on a later part of the trajectory.",
    loss="MTT's, over one subset of the images in the subset's part of the window",
    base=MTT,
    settings={"subsets": 2},
    source="the repository's run.sh (shqii1j/seqmatch), which trains new experts after every subset; here the window is "
    "cut instead",
    cells="""
        data    ipc subsets student_steps expert_epochs window_end lr_images lr_step_size step_size zca
        cifar10  50 3 30 2 48 100 1e-5 0.001 true""",
)

CONTRA = Method(
    name="contra",
    paper="ICLR 2025 submission 5068",
    idea="Match K segments at once, so that none is forgotten while another is matched.",
    loss="the mean over K start epochs t, R apart, of the base's loss",
    base=DATM,
    settings={"segments": 4},
    kind="derived",
    source="tesla's values on ImageNet-1K, as reviews report of the paper; mtt's on the small data sets, where K alone differs",
    cells="""
        data         ipc student_steps expert_epochs window_start window_end_initial window_end student_batch lr_images lr_step_size step_size zca labels init loss_threshold gradient sharpness_radius experts epochs iterations
        imagenet       1 10 3 0 none 10 100 1e4 1e-4 0.01 false teacher real none truncated 0 50 50 10000
        digits         1 - - - - - - - - - - hard real none - 0 - - -
        digits        10 - - - - - - - - - - hard real none - 0 - - -
        digits        50 - - - - - - - - - - hard real none - 0 - - -
        fashion_mnist  1 - - - - - - - - - - hard real none - 0 - - -
        fashion_mnist 10 - - - - - - - - - - hard real none - 0 - - -
        fashion_mnist 50 - - - - - - - - - - hard real none - 0 - - -""",
    accuracies="""
        cifar10  1:50.0 10:68.3   our arithmetic from gains over DATM that reviews quote""",
)

METHODS = {method.name: method for method in (MTT, TESLA, FTD, DATM, PAD, ATT, MCT, SEQMATCH, CONTRA)}

REFERENCES = """
    random_real cifar10       1:15.4±0.3 10:31.0±0.5 50:50.6±0.3 500:73.2±0.3 1000:78.4±0.2 PAD paper, Table 1
    random_real cifar100      1:4.2±0.3 10:14.6±0.5 50:33.4±0.4 100:42.8±0.3                PAD paper, Table 1
    random_real tiny_imagenet 1:1.4±0.1 10:5.0±0.2 50:15.0±0.4                              PAD paper, Table 1"""
"""Random real images of the same number, under the published protocol: name, then a line of `accuracies`."""
