"""Steps: the written-out ones against automatic differentiation, with residuals kept or not, compiled or not."""

import functools
import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cddlib
from cddlib.data.augment import AugmentConfig
from cddlib.matching.loss import matching_loss
from cddlib.matching.student import MatchingConfig, plan_student
from cddlib.networks.convnet import ConvNet, Network, NetworkConfig
from cddlib.networks.zoo import build_network
from cddlib.runtime import device as devices
from cddlib.runtime import distributed
from cddlib.training import compiling, counting, graphs
from cddlib.training import engine as engines
from cddlib.training.convnet_step import ConvNetStep, is_standard_convnet
from cddlib.training.engine import make_step, worth_compiling
from cddlib.training.step import AutogradStep, ComputeConfig

USUAL = NetworkConfig(depth=2, width=6)
ENGINES = [AutogradStep, functools.partial(ConvNetStep, precision="float32", compiled=False)]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def problem(shape: tuple[int, int, int], config: NetworkConfig = USUAL, batch: int = 4, seed: int = 0) -> Any:
    """A network, and a step's arguments in float64: parameters, inputs, soft targets that do not add up to 1, λ."""
    rng = cddlib.generator("steps", seed)
    network = build_network(config, shape, 5)
    theta = network.init(rng).double()
    theta += 0.1 * torch.randn(len(theta), generator=rng, dtype=torch.float64)  # norms that scale and shift
    inputs = torch.randn(batch, *shape, generator=rng, dtype=torch.float64)
    targets = torch.rand(batch, 5, generator=rng, dtype=torch.float64)
    return network, theta, inputs, targets, torch.randn(len(theta), generator=rng, dtype=torch.float64)


def obvious(
    network: Network, theta: Tensor, inputs: Tensor, targets: Tensor, direction: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """g, and ⟨g, λ⟩ with its derivatives."""
    leaves = [x.clone().requires_grad_() for x in (theta, inputs, targets)]
    loss = -(leaves[2] * network(leaves[0], leaves[1]).log_softmax(1)).sum() / len(inputs)
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    inner = (gradient * direction).sum()
    return gradient.detach(), (inner.detach(), *torch.autograd.grad(inner, leaves))


def agree(engine: Any, network: Network, *networks: tuple[Tensor, ...]) -> None:
    """Steps of networks side by side, each with arguments of its own, are each network's."""
    *step, direction = (torch.stack(tensors) for tensors in zip(*networks, strict=True))
    gradient, memory = engine.forward(*step)
    along = engine.vjp(memory, direction)
    loss, alone = engine.gradient(*step)
    classes = step[2].argmax(2)
    by_class = engine.gradient(*step[:2], classes)
    for found, wanted in zip(by_class, engine.gradient(*step[:2], F.one_hot(classes, 5).double()), strict=True):
        torch.testing.assert_close(found, wanted)
    for k, (theta, inputs, targets, _) in enumerate(networks):
        wanted, derivatives = obvious(network, *networks[k])
        torch.testing.assert_close(gradient[k], wanted, rtol=1e-9, atol=1e-11)
        for found, value in zip(along, derivatives, strict=True):
            torch.testing.assert_close(found[k], value, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(alone[k], wanted, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(loss[k], F.cross_entropy(network(theta, inputs), targets), rtol=1e-9, atol=1e-11)


def all_results(step: Any, theta: Tensor, inputs: Tensor, targets: Tensor, direction: Tensor) -> list[Tensor]:
    """Everything that a step computes."""
    gradient, residuals = step.forward(theta, inputs, targets)
    return [gradient, *step.gradient(theta, inputs, targets), *step.vjp(residuals, direction)]


def alone(*tensors: Tensor) -> list[Tensor]:
    """The arguments of one network's step."""
    return [tensor[None] for tensor in tensors]


@hypothesis.given(
    depth=st.integers(1, 3),
    width=st.integers(1, 7),
    channels=st.integers(1, 4),
    side=st.sampled_from([8, 16, 24, 28]),
    batch=st.integers(1, 5),
    networks=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_steps_are_those_of_automatic_differentiation(
    depth: int, width: int, channels: int, side: int, batch: int, networks: int, seed: int
) -> None:
    config = NetworkConfig(depth=depth, width=width)
    problems = [problem((channels, side, side), config, batch, seed + k) for k in range(networks)]
    network = problems[0][0]
    assert is_standard_convnet(network)
    for engine in ENGINES:
        agree(engine(network), network, *(tuple(arguments) for _, *arguments in problems))
    theta, inputs, *rest = (torch.stack(tensors) for tensors in zip(*(p[1:] for p in problems), strict=True))
    padded = F.pad(inputs, (0, 0, 0, 0, 0, 1))  # a GPU's convolutions like a multiple of four channels
    results = [all_results(ENGINES[1](network), theta, seen, *rest) for seen in (inputs, padded)]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


CHANGES: list[dict[str, Any]] = [{"norm": "group"}, {"activation": "leakyrelu"}, {"pooling": "max"}]
UNUSUAL = [NetworkConfig(depth=2, width=4, **changes) for changes in CHANGES]


def test_only_the_standard_convnet_is_written_out() -> None:
    fast = ComputeConfig(precision="bfloat16", compiled=True)
    usual = build_network(USUAL, (3, 8, 8), 5)
    assert isinstance(make_step(usual, ComputeConfig(), CPU), AutogradStep)
    assert isinstance(make_step(usual, ComputeConfig(), CUDA), ConvNetStep)
    for compute in (ComputeConfig(precision="bfloat16"), ComputeConfig(compiled=True), fast):
        assert isinstance(make_step(usual, compute, CPU), ConvNetStep)
        assert make_step(usual, compute, CPU) is make_step(usual, compute, CPU)
    odd = build_network(USUAL, (3, 10, 10), 5)  # its second pooling leaves out the last pixel
    others = [build_network(config, (3, 8, 8), 5) for config in (*UNUSUAL, NetworkConfig(network="mlp"))]
    for network in (odd, *others):
        for device in (CPU, CUDA):
            assert isinstance(make_step(network, fast, device), AutogradStep)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gap", [0.0, 200.0, 1e4])
def test_a_sure_network_has_a_finite_loss(engine: Any, gap: float) -> None:
    """Where probabilities are less than the least number."""
    network, theta, inputs, targets, _ = (x.float() if isinstance(x, Tensor) else x for x in problem((2, 8, 8)))
    theta[-5:] = torch.tensor([0.0, gap, -gap, 0.0, 0.0])
    for wanted in (targets, torch.tensor([1, 1, 0, 2])):
        (loss,), gradient = engine(network).gradient(*alone(theta, inputs, wanted))
        torch.testing.assert_close(loss, F.cross_entropy(network(theta, inputs), wanted))
        assert gradient.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
def test_compiled_code_sees_one_memory_order(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Augmentations give several, as do batches that are cut out of others, and it would be compiled for each."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: Mock(wraps=function))
    network, theta, inputs, targets, _ = problem((channels, 8, 8))
    step = ConvNetStep(network, "float32", True)
    watched = {name: Mock(wraps=getattr(step, name)) for name in ("_gradient", "_forward")}
    step.__dict__.update(watched)
    orders = (inputs, inputs.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), inputs.mT.contiguous().mT)
    for networks in (1, 2):
        repeated = [x.expand(networks, *x.shape) for x in (theta, inputs, targets)]
        wanted = AutogradStep(network).gradient(*repeated)
        for other in orders:
            pairs = [(other.expand(networks, *other.shape), repeated[2])]
            for times in (1, 2, 3):
                longer = ([torch.cat([x] * times)] * networks for x in (other, targets))
                pairs.append(tuple(torch.stack(tensors)[:, :4] for tensors in longer))
            for several, answers in pairs:
                torch.testing.assert_close(step.gradient(repeated[0], several, answers), wanted)
                step.forward(repeated[0], several, answers)
    seen = [call.args for name in watched for call in watched[name].call_args_list]
    assert {x.stride() for _, x, _ in seen} == {(64 * n, 1, 8 * n, n) for n in (channels, 2 * channels)}
    assert len({answers.stride() for *_, answers in seen}) == 1


def test_bfloat16_rounds_convolutions_and_nothing_else() -> None:
    network, theta, inputs, targets, direction = (
        x.float() if isinstance(x, Tensor) else x for x in problem((3, 16, 16), batch=8)
    )
    found, exact = [], []
    for step, results in ((ConvNetStep(network, "bfloat16", False), found), (AutogradStep(network), exact)):
        results += all_results(step, *alone(theta, inputs, targets, direction))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert 1e-5 < (a - b).norm() / b.norm() < 0.2  # a bfloat16 has 8 bits
    heads = ConvNetStep(network, "bfloat16", False).forward(*alone(theta, inputs, targets))[1].content[2]
    assert all(tensor.dtype == torch.float32 for tensor in heads)


# --- Residuals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [ComputeConfig(), ComputeConfig(precision="bfloat16")], ids=["autograd", "convnet"])
def test_keeping_residuals_changes_no_bit(compute: ComputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = cddlib.generator("memories")
    network = build_network(USUAL, (2, 8, 8), 5)
    start, target = network.init(rng), network.init(rng)
    images = torch.randn(10, 2, 8, 8, generator=rng).requires_grad_()
    targets = F.one_hot(torch.arange(10) % 5, 5).float()
    step_size = torch.tensor(0.05, requires_grad=True)
    config = MatchingConfig(student_steps=7, student_batch=4)
    plan = plan_student(config, 10, AugmentConfig().augment, rng)
    step = make_step(network, compute, CPU)
    forward = Mock(wraps=step.forward)
    one = step.forward(*alone(start, images[:4].detach(), targets[:4]))[1].size
    monkeypatch.setattr(step, "forward", forward)
    results = []
    for budget, again in ((0, 7), (3 * one, 4), (100 * one, 0)):
        monkeypatch.setattr("cddlib.matching.loss.residual_budget", lambda device, budget=budget: budget)
        forward.reset_mock()
        loss = matching_loss(network, start, target, images, targets, step_size, plan, config, compute)
        results.append([loss.detach(), *torch.autograd.grad(loss, (images, step_size))])
        assert forward.call_count == 7 + again
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_without_gradients_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cddlib.matching.loss.residual_budget", lambda device: pytest.fail("asked for memory"))
    network, theta, inputs, targets, direction = problem((2, 8, 8))
    plan = plan_student(MatchingConfig(student_steps=2), 4, "none", cddlib.generator(0))
    with torch.no_grad():
        matching_loss(network, theta, theta + direction, inputs, targets, torch.tensor(0.1).double(), plan)


@pytest.mark.parametrize("engine", ENGINES)
def test_residuals_know_their_size_and_are_freed(engine: Any) -> None:
    network, theta, inputs, targets, _ = problem((2, 8, 8))
    step = engine(network)
    first, second = (step.forward(*alone(theta, inputs, targets))[1].size for _ in range(2))
    doubled = step.forward(*alone(theta, inputs.repeat(2, 1, 1, 1), targets.repeat(2, 1)))[1].size
    assert first == second < doubled < 2 * first + 8 * len(theta)
    maps = 8 * 4 * 6 * (8 * 8 + 4 * 4)  # bytes of the two convolutions' outputs
    assert 2 * maps < first < 12 * maps + 8 * 10 * len(theta)
    gc.collect()
    gc.disable()
    try:
        _, residuals = step.forward(*alone(theta, inputs, targets))
        last = residuals.content[1][-1]
        held = weakref.ref(last[-1] if isinstance(last, list) else last)
        del residuals, last
        assert held() is None, "residuals live on"
    finally:
        gc.enable()


def test_residuals_may_take_an_eighth_of_the_free_memory_or_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, measured = engines.residual_budget, functools.cache(engines._budget_of_machine.__wrapped__)
    monkeypatch.setattr(engines, "_budget_of_machine", measured)
    monkeypatch.delenv("CDDLIB_KEPT_MB", raising=False)
    for free, half in ((8 * 10**9, 4 * 10**9), (4 * 10**9, 2 * 10**9)):
        monkeypatch.setattr(engines, "free_memory", lambda device, free=free: free)
        assert budget(CPU) == 10**9, "it is measured once"
        assert budget(CUDA) == half, "half of a GPU, which nobody else uses"
    measured.cache_clear()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert budget(CPU) == 125 * 10**6
    monkeypatch.setenv("CDDLIB_KEPT_MB", "3")
    assert budget(CPU) == 3 * 2**20
    for wrong in ("", "-1", "many", "1.5", "²"):
        monkeypatch.setenv("CDDLIB_KEPT_MB", wrong)
        sentence = f"CDDLIB_KEPT_MB is '{wrong}'; it must be a number of MB, 0 or more"
        with pytest.raises(cddlib.UserError, match=sentence):
            budget(CPU)


@pytest.mark.parametrize(
    ("limit", "used", "wanted"),
    [(None, 0, 8000), ("max", 300, 8000), ("1000", 300, 900), ("9999", 209, 8000), ("5", 209, 0)],
)
def test_a_container_may_have_less_than_the_machine(
    limit: str | None, used: int, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text("active_file 1\ninactive_file 200\n")
    assert devices.free_memory(CPU) == wanted


# --- Compiling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_long_runs_of_the_usual_convnet_are_compiled(device: torch.device) -> None:
    network, plain = ConvNet(NetworkConfig(), (3, 32, 32), 10), ComputeConfig()
    a_pass = 2 * 9 * 128 * (3 * 32**2 + 128 * 16**2 + 128 * 8**2) + 2 * 2048 * 10  # operations, forward
    enough = int(-(-engines.WORTH_COMPILING[device.type] // (3 * a_pass)))
    assert worth_compiling(network, plain, device, enough)
    assert not worth_compiling(network, plain, device, enough - 1)
    assert worth_compiling(network, ComputeConfig(precision="bfloat16"), device, 1)
    for asked in (True, False):
        assert worth_compiling(network, ComputeConfig(compiled=asked), device, enough) == asked
    assert not worth_compiling(build_network(UNUSUAL[0], (3, 8, 8), 5), plain, device, 10**18)


def test_what_compiles_on_a_gpu_asks_for_no_compiler_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "can_compile", lambda: False)
    network, asked = ConvNet(NetworkConfig(), (3, 32, 32), 10), ComputeConfig(compiled=True)
    names = [make_step(network, asked, device)._gradient.__name__ for device in (CPU, CUDA)]
    assert names == ["_loss_and_gradient", "run"]


def check_compiled() -> None:
    """Steps of two networks side by side give the same numbers compiled."""
    torch.set_num_threads(1)
    network, *first = problem((1, 8, 8), NetworkConfig(depth=1, width=4), 3)
    pairs = zip(first, problem((1, 8, 8), NetworkConfig(depth=1, width=4), 3, seed=1)[1:], strict=True)
    arguments = [torch.stack(pair).float() for pair in pairs]
    compiled = ConvNetStep(network, "float32", True)
    steps = (compiled, compiled, ConvNetStep(network, "float32", False))
    for twice, once, plain in zip(*(all_results(step, *arguments) for step in steps), strict=True):
        assert torch.equal(twice, once)
        torch.testing.assert_close(once, plain, rtol=1e-4, atol=1e-5)


def test_compiled_steps_are_the_same_steps(tmp_path: Path) -> None:
    """In a process where types are not checked; else the checks would be compiled too."""
    inherited = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    environment = {**inherited, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import test_steps; test_steps.check_compiled()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for what in ("training steps", "a student's steps", "their derivatives"):
        assert f"compiling {what} for batches of 3" in done.stderr
    assert "uncompiled" not in done.stderr
    assert any(tmp_path.iterdir()), "nothing is kept for other processes"


def test_a_graph_belongs_to_a_device_and_its_key() -> None:
    build, devices_and_keys = (lambda key: str), ((0, 1), (0, 1), (1, 1), (0, 2))
    found = [graphs.graph(torch.device("cuda", number), build, key) for number, key in devices_and_keys]
    assert found[0] is found[1] and len({*map(id, found)}) == 3
    assert ThreadPoolExecutor(1).submit(graphs.graph, torch.device("cuda", 0), build, 1).result() not in found


@pytest.mark.parametrize(
    ("patched", "reason"),
    [
        ((engines, "can_compile", lambda: False), "there is no C++ compiler"),
        ((torch, "compile", lambda f, **o: Mock(side_effect=RuntimeError("no"))), "PyTorch cannot compile here (no)"),
    ],
)
def test_without_compiling_there_is_one_notice(
    patched: Any, reason: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling.not_compiled.cache_clear()
    monkeypatch.setattr(*patched)
    network, *arguments = problem((2, 8, 8))
    engines._make_step.cache_clear()
    step, plain = make_step(network, ComputeConfig(compiled=True), CPU), ConvNetStep(network, "float32", False)
    results = [all_results(each, *alone(*arguments)) for each in (step, step, plain)]
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*results, strict=True))
    assert capfd.readouterr().err.splitlines() == [f"{reason}: steps run uncompiled, which takes longer."]


def test_running_out_of_memory_is_no_want_of_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
    monkeypatch.setattr(torch, "compile", lambda function, **options: Mock(side_effect=RuntimeError(message)))
    network, *arguments, _ = problem((2, 8, 8))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        ConvNetStep(network, "float32", True).forward(*alone(*arguments))


def test_each_shape_is_announced_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(distributed, "tqdm", functools.partial(distributed.tqdm, disable=False))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    network, theta, inputs, targets, _ = problem((2, 8, 8))
    engine = ConvNetStep(network, "float32", True)
    for batch in (4, 3, 4, 3):
        engine.gradient(*alone(theta, inputs[:batch], targets[:batch]))
    said = capfd.readouterr().err
    for batch in (3, 4):
        assert said.count(f"compiling training steps for batches of {batch}:   0%") == 1


@pytest.mark.parametrize("pooling", ["avg", "none"])
@pytest.mark.parametrize("side", [28, 32])
def test_operations_are_those_that_pytorch_counts(pooling: str, side: int) -> None:
    config = NetworkConfig(width=4, pooling=pooling)
    network = ConvNet(config, (3, side, side), 5)
    counted, _ = counting.count(counting.classify, config, (3, side, side), 5, 1)
    assert engines.operations(network) == counted
