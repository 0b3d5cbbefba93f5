"""What can be found of a GPU without one: an iteration, an epoch and an evaluation on a pretended one.

A fake tensor has a device and strides but no numbers. Whatever mixes devices fails, and copies, waits, launches and the
order of convolutions in memory are counted.
"""

import collections
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import run
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cddlib
from cddlib.data.augment import CHANGES, AugmentConfig
from cddlib.distillation.checkpoint import State
from cddlib.distillation.loop import iterate
from cddlib.evaluate import EvaluateConfig, correct_of_set
from cddlib.matching import loss as losses
from cddlib.matching.student import MatchingConfig, Walk
from cddlib.networks.convnet import parameter_count
from cddlib.runtime.distributed import Ranks
from cddlib.synthetic import initialise
from cddlib.training import graphs
from cddlib.training.convnet_step import ConvNetStep
from cddlib.training.step import ComputeConfig

CUDA = torch.device("cuda:0")
STRATEGY = AugmentConfig().augment
WAITING = ("_local_scalar_dense", "equal")
"""Operations that wait for a number."""


class PretendedGPU(TorchDispatchMode):
    """Tensors on `cuda` are fake, those on the CPU real. Whoever waits for a number is told 1, and for a truth, no."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.launches: collections.Counter[str] = collections.Counter()
        self.uploads = 0
        self.waits = 0
        self.unordered: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, FakeTensor) and x.is_cuda for x in given)
        goal = kwargs.get("device")
        if not there and (goal is None or torch.device(goal).type == "cpu"):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in WAITING:
            self.waits += 1
            return 1.0 if given[0].dtype.is_floating_point else False
        if there and goal is not None and torch.device(goal).type == "cpu":
            self.waits += 1
            return torch.ones(given[0].shape, dtype=given[0].dtype)
        self.uploads += any(not x.is_cuda and x.dim() for x in given)
        with self.fakes:
            result = function(*args, **kwargs)
        self.launches[name] += not (function.is_view or function.namespace == "prim")
        if name.startswith("convolution"):
            results = torch.utils._pytree.tree_leaves(result)
            maps = [x for x in (*given, *results) if isinstance(x, Tensor) and x.dim() == 4]
            wrong = [x for x in maps if not x.is_contiguous(memory_format=torch.channels_last)]
            self.unordered += [f"{name}: {tuple(x.shape)}, strides {x.stride()}" for x in wrong]
        return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGPU]:
    """A pretended GPU. Graphs call what they would replay; autograd, which no fake tensor passes, gives zeros."""
    answers = {"_lazy_init": None, "current_device": 0, "mem_get_info": (10**10, 10**10), "empty_cache": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, answer=answer: answer)
    monkeypatch.setattr(F, "grid_sample", lambda x, grid, **options: x + grid.sum())  # the real one asks the driver
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, variables, **options: [x.detach() for x in variables])
    monkeypatch.setattr(Tensor, "isfinite", lambda self: torch.ones(1, dtype=torch.bool))
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: tolist(self.cpu()) if self.is_cuda else tolist(self))
    monkeypatch.setattr(losses, "branches", one_after_the_other)
    monkeypatch.setattr(losses, "capture_streams", lambda device, count: [None] * count)
    monkeypatch.setattr(graphs.Graph, "__call__", lambda self, *arguments: self._build()(*arguments))
    graphs._LATEST.graph.cache_clear()
    yield PretendedGPU()
    graphs._LATEST.graph.cache_clear()


def one_after_the_other(function: Any, streams: list[None], *stacked: Tensor) -> tuple[Tensor, ...]:
    """What branches do, without streams."""
    rows = [function(*(tensor[k : k + 1] for tensor in stacked)) for k in range(len(streams))]
    return tuple(torch.cat(found) for found in zip(*rows, strict=True))


CHANGED: list[dict[str, Any]] = [
    {"segments": 2}, {"segments": 2, "combine": "pcgrad"}, {"labels": "learned", "ema": 0.9}, {"labels": "teacher"},
    {"ipc": 2, "subsets": 2}, {"ipc": 2, "student_batch": 7}, {"replay": 1, "consolidation": "ewc"},
    {"match_step": "nearest"}, {"dropped_fraction": 0.1}, {"convex": True},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGED, ids=str)
def test_an_iteration_keeps_to_its_device(
    changes: dict[str, Any], gpu: PretendedGPU, buffer: cddlib.Buffer, quick: dict[str, Any]
) -> None:
    own = {"student_steps": 3, "augment": STRATEGY, "window_end": 3, **changes}
    config = cddlib.distill_recipe("mtt", "digits", **{**quick, **own})
    experts = cddlib.Buffer(buffer.folder, convex=config.schedule.convex)
    where = config.seed, torch.device("cpu"), config.schedule.subsets
    start = initialise(config.synthetic, cddlib.load("digits"), experts, *where)
    with gpu:
        state = State(config, start.copy().to(CUDA))
        for state.progress.iteration in (1, 2):  # so that something can be replayed
            before = gpu.uploads, gpu.waits
            iterate(state, config, experts, Ranks())
    assert bool(experts._on_gpu) != config.schedule.convex, "of the vectors of a line hardly one is asked for twice"
    uploads, waits = gpu.uploads - before[0], gpu.waits - before[1]
    assert all(variable.is_cuda for variable in state.synthetic.variables())
    segments = config.schedule.segments_in_all
    assert uploads <= 4 + len(CHANGES) + 4 * segments, "more copies to the GPU than indices, draws and parameters"
    assert waits <= 6 + 2 * segments, "more waits for the GPU than losses, norms and checks"
    assert config.synthetic.labels == "teacher" or not gpu.unordered


WALK = {"convolution": 8, "convolution_backward": 12}
"""A step's, of three blocks; a convolution's backward gives one gradient or two."""
MOST_LAUNCHES = 410
"""A step's and its derivatives', uncompiled, of three blocks."""


@pytest.mark.parametrize("side", [32, 28])
def test_a_walk_asks_for_nothing_and_its_convolutions_are_channels_last(side: int, gpu: PretendedGPU) -> None:
    network = cddlib.ConvNet(cddlib.NetworkConfig(width=8), (3, side, side), 10)
    with gpu:
        thetas = [torch.empty(1, parameter_count(network), device=CUDA) for _ in range(2)]
        inputs = torch.empty(1, 30, 3, side, side, device=CUDA)
        targets, step_size = torch.empty(1, 30, 10, device=CUDA), torch.empty(1, device=CUDA)
        counts = []
        for steps in (2, 3):
            before = gpu.launches.copy()
            walk = Walk(ConvNetStep(network, "float32", False), (10,) * steps, 10**6, 10**12)
            batches = inputs[:, : 10 * steps], targets[:, : 10 * steps]
            losses._losses_and_gradients(walk, MatchingConfig(), True, *thetas, *batches, step_size)
            counts.append(gpu.launches - before)
    step = counts[1] - counts[0]
    assert (gpu.uploads, gpu.waits, gpu.unordered) == (0, 0, [])
    assert {name: count for name, count in step.items() if name.startswith("conv")} == WALK
    assert step.total() <= MOST_LAUNCHES


@pytest.mark.parametrize("zca", [False, True])
def test_training_and_testing_keep_to_their_device(zca: bool, gpu: PretendedGPU, buffer: cddlib.Buffer) -> None:
    """An epoch on real images, and a network on a synthetic set."""
    dataset, network = cddlib.load("digits"), buffer.network
    config = cddlib.distill_recipe("mtt", "digits", width=8, zca=zca)
    synthetic = dataclasses.replace(
        initialise(config.synthetic, dataset, buffer, config.seed, torch.device("cpu")),
        preprocessing=cddlib.data.preprocessing.fit_preprocessing(dataset, zca=zca),
    )
    with gpu:
        on_gpu, how = synthetic.to(CUDA), EvaluateConfig(evaluation_epochs=30)
        uploads = gpu.uploads
        test = dataset.test.to(CUDA)
        right = correct_of_set(on_gpu, network, how, STRATEGY, ComputeConfig(), test, purpose="evaluation", seed=0)
        found = right.mean().item()
    assert found == 1.0
    assert gpu.uploads - uploads <= 20, "the steps that one graph takes share their copies"


def test_a_cpu_is_told_that_this_is_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu", "--to", str(tmp_path)])
    assert "the device is cpu; this is for a GPU. A CPU does all of it with --tiny." in capsys.readouterr().err


def test_the_gpu_s_stages_run_here_in_tiny_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `make gpu` does; asked again, it does nothing."""
    assert run.main(["--tiny", "--device", "cpu", "--to", str(tmp_path), "--seconds", "600"]) == 0
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in run.STAGES}
    assert all(record["complete"] for record in records.values())
    assert all(row["images"] < 1e-5 for row in records["gradients"]["walks"] if "ieee" in row["what"])
    tested = [(row["segments"], row["iteration"]) for row in records["evaluate"]["rows"]]
    assert tested == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1), (2, 2)]
    assert len(records["evaluate"]["random_real"]) == run.TINY.networks
    capsys.readouterr()
    assert run.main(["--tiny", "--device", "cpu", "--to", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("its record is there") == len(run.STAGES)
    shutil.rmtree(tmp_path / "buffer")  # which did not come back with the records
    assert run.main(["--tiny", "--device", "cpu", "--to", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("its record is there") == len(run.STAGES) - 1


def test_runs_that_time_cuts_off_are_not_complete_and_go_on(tmp_path: Path) -> None:
    reached = []
    for _ in range(2):
        how = ["--tiny", "--device", "cpu", "--to", str(tmp_path), "--seconds", "3", "--set", "segments=100000"]
        assert run.main([*how, "--stages", "experts", "distil", "evaluate"]) == 2
        records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("distil", "evaluate")}
        assert all("they go on from their checkpoints" in record["why"] for record in records.values())
        reached.append([one["iterations"] for one in records["distil"]["runs"]])
    assert all(later > first > 0 for first, later in zip(*reached, strict=True))
