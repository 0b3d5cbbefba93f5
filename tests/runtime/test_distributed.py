"""Several processes: what they divide, that they end where one process ends, and what becomes of those that die.

Most tests fork the ranks, in a fraction of a second, from a server that has imported cddlib, and join them with gloo
themselves; the last ones start torchrun as a user does.
"""

import concurrent.futures
import contextlib
import datetime
import functools
import itertools
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch
import torch.distributed as dist
from children import CONTEXT
from conftest import TINY, Note, Repeats
from works import assert_same, metrics

import cddlib
from cddlib import cli
from cddlib.distillation.checkpoint import CHECKPOINT, milestone_path
from cddlib.distillation.optimizer import SetOptimizer
from cddlib.experts.buffer import Buffer
from cddlib.matching.combine import Combine
from cddlib.runtime import device as devices
from cddlib.runtime.distributed import Interrupted, Ranks
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import read_json, read_tensors, tensor_digest
from cddlib.runtime.random import generator

# The sigmoid has no kinks: with ReLU, a difference in the last digit can grow by a factor of 1e5 in an iteration.


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> Buffer:
    """Two experts of six epochs on the digits, width 8."""
    config = cddlib.buffer_recipe("digits", **TINY, activation="sigmoid")
    return cddlib.train_buffer(config, tmp_path_factory.mktemp("buffer"), device="cpu")


@pytest.fixture
def quick(quick: dict[str, Any]) -> dict[str, Any]:
    """Overrides of the digits' distillation recipe that run in a second on `buffer`."""
    return {**quick, "activation": "sigmoid"}


# --- Ranks without torchrun -------------------------------------------------------------------------------------


def together(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns, or raises for the user, in each of `count` processes joined by gloo."""
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(count, mp_context=CONTEXT) as pool,
    ):
        started = [pool.submit(_join, rank, count, Path(folder) / "store", work, arguments) for rank in range(count)]
        return [rank.result() for rank in started]


def _join(rank: int, count: int, store: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    patience = datetime.timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=patience)
    dist.barrier()  # work that asks nothing of the others could end while they are still connecting
    try:
        return work(*arguments)
    except (UserError, Interrupted) as error:
        return error
    finally:
        dist.destroy_process_group()


Did = tuple[list[tuple[str, int]], set[str]]
"""What one rank did in a distillation: after every step and at the end the digest of its own set and the all-reduces
until then; and the names of what it wrote in the run's folder."""


def distil(config: cddlib.DistillConfig, buffer: Path, out: Path, asked: dict[int, int] | None = None) -> Did:
    """Distil in this rank, watched; `asked` says after which iteration which rank gets a SIGTERM."""
    steps, written = [], set()
    all_reduce, step = Mock(wraps=dist.all_reduce), SetOptimizer.step

    def note(synthetic: cddlib.SyntheticSet) -> None:
        steps.append((" ".join(map(tensor_digest, synthetic.variables())), all_reduce.call_count))

    def watched(optimizer: SetOptimizer, gradients: list[torch.Tensor], rows: torch.Tensor, iteration: int) -> None:
        step(optimizer, gradients, rows, iteration)
        note(optimizer._synthetic)
        if (asked or {}).get(dist.get_rank()) == len(steps):
            os.kill(os.getpid(), signal.SIGTERM)

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR) if event == "open" else event in CHANGES
        if writes and str(arguments[0]).startswith(str(out)):
            written.add(Path(arguments[0]).name)

    dist.all_reduce, SetOptimizer.step = all_reduce, watched  # type: ignore[method-assign] # in this process alone
    sys.addaudithook(audited)
    note(cddlib.distill(config, buffer, out, device="cpu"))
    return steps, written


CHANGES = ("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.truncate")


def difference(run: Path, other: Path, file: str = CHECKPOINT) -> float:
    """The largest difference of a run's last iterate to another's, or to another file's, over its largest number."""
    here, there = (read_tensors(path, "state")[0] for path in (run / CHECKPOINT, other / file))
    names = [name for name in ("images", "label_logits", "step_size") if name in here]
    return max(float((here[name] - there[name]).abs().max() / here[name].abs().max()) for name in names)


def moved(run: Path) -> float:
    """How far the last iterate is from the first."""
    return difference(run, run, milestone_path(run, 0).name)


RULES = typing.get_args(Combine)[1:]
CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "balance": {"balance": 0.5},
    "mgda": {"combine": "mgda"},
    **{f"{rule}, one by one": {"combine": rule, "side_by_side": 1} for rule in RULES},
    "replay": {"replay": 2},
    "other experts": {"concurrent_experts": 2},
    "learned labels": {"labels": "learned", "ema": 0.9},
    "teacher labels": {"labels": "teacher"},
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_end_where_one_process_ends(
    buffer: Buffer, quick: dict[str, Any], tmp_path: Path, note: Note, repeats: Repeats, case: str
) -> None:
    """Three segments on two ranks, and on four, one of which has none."""
    config = cddlib.distill_recipe("contra", **{**quick, "segments": 3, "validation_runs": 2, **CASES[case]})
    cddlib.distill(config, buffer, tmp_path / "1", device="cpu")
    alone = metrics(tmp_path / "1")
    for count in (2, 4) if case == "mean" else repeats((2,), (2, 4)):
        out = tmp_path / str(count)
        (steps, written), *others = together(count, distil, config, buffer.folder, out)
        assert others == [(steps, set())] * (count - 1)
        assert {"config.json", "metrics.jsonl", "checkpoint.safetensors", "synthetic.safetensors"} < written
        validated = [bool(line.get("validation_accuracy")) for line in alone]
        between = [after - before for (_, before), (_, after) in itertools.pairwise(steps[:-1])]
        assert between == [1 + validation for validation in validated[1:-1]]
        lines = metrics(out)
        assert [line.keys() for line in lines] == [line.keys() for line in alone]
        apart = difference(tmp_path / "1", out)
        if config.student.side_by_side == 1:  # and, by this rule, no gradient is added to another
            assert lines == alone and apart == 0
        for line, wanted in zip(lines, alone, strict=True):
            for name in ("matched", "validation_accuracy"):
                assert line.get(name) == wanted.get(name)
            assert line.get("losses", []) == pytest.approx(wanted.get("losses", []), rel=1e-5)
        assert apart < 1e-6 and moved(out) > 1e-3
        note("agreement", ranks=count, rule=case, largest_relative_difference=apart)


@pytest.mark.parametrize(("activation", "iterations"), [("sigmoid", 5), ("relu", 3)])
def test_the_digits_recipe_with_eight_segments(
    tmp_path: Path, note: Note, repeats: Repeats, activation: str, iterations: int
) -> None:
    """The same set within the rounding of sums. With ReLU, as near as one process that adds in another order."""
    iterations = repeats(iterations, 60)
    width = {"width": 8, "activation": activation}
    buffer = cddlib.train_buffer(
        cddlib.buffer_recipe("digits", experts=2, epochs=14, **width), tmp_path / "buffer", device="cpu"
    )
    options = {"segments": 8, "iterations": iterations, "validate_every": 0, **width}
    config = cddlib.distill_recipe("contra", "digits", 1, **options)
    cddlib.distill(config, buffer, tmp_path / "alone", device="cpu")
    assert moved(tmp_path / "alone") > 1e-3
    losses = [line["loss"] for line in metrics(tmp_path / "alone")[1:]]
    for count in repeats((1, 2), (1, 2, 4)):
        out = tmp_path / str(count)
        together(count, distil_backwards if count == 1 else distil, config, buffer.folder, out)
        found = [line["loss"] for line in metrics(out)[1:]]
        assert found[0] == pytest.approx(losses[0], rel=1e-6)
        assert found == pytest.approx(losses, rel=1e-5 if activation == "sigmoid" else 1e-2)
        apart = difference(tmp_path / "alone", out)
        assert apart < (1e-5 if activation == "sigmoid" else 0.1)
        rule = f"mean, {activation}, {iterations} iterations" + (", segments added backwards" if count == 1 else "")
        note("agreement", ranks=count, rule=rule, largest_relative_difference=apart)


def distil_backwards(config: cddlib.DistillConfig, buffer: Path, out: Path) -> None:
    """Distil in one process that takes the segments in reverse order."""
    Ranks.portion = lambda _self, work: work[::-1]  # type: ignore[method-assign] # this process ends with the test
    cddlib.distill(config, buffer, out, device="cpu")


# --- Experts and networks ---------------------------------------------------------------------------------------


def train(config: cddlib.BufferConfig, out: Path) -> None:
    cddlib.train_buffer(config, out, device="cpu")


@pytest.mark.parametrize(
    ("count", "sizes", "overrides"),
    [(2, (3, 5), {"momentum": 0.9}), (4, (3,), {}), (2, (2,), {"easiest_fraction": 0.5, "all_from_epoch": 2})],
)
def test_buffers_have_the_same_bytes(
    tmp_path: Path, count: int, sizes: tuple[int, ...], overrides: dict[str, Any]
) -> None:
    """One grows."""
    for experts in sizes:
        config = cddlib.buffer_recipe("digits", width=4, epochs=3, experts=experts, **overrides)
        cddlib.train_buffer(config, tmp_path / "1", device="cpu")
        together(count, train, config, tmp_path / "several")
        assert_same(tmp_path / "several", tmp_path / "1")
        trained = [read_json(tmp_path / name / "result.json")["experts_trained"] for name in ("several", "1")]
        assert trained[0] == trained[1]


def test_evaluations_find_the_same_accuracies(buffer: Buffer, quick: dict[str, Any], tmp_path: Path) -> None:
    """Of two networks, and of one more."""
    cddlib.distill(cddlib.distill_recipe("contra", **quick), buffer, tmp_path / "1", device="cpu")
    shutil.copytree(tmp_path / "1", tmp_path / "several")
    for networks, ranks in ((2, 2), (3, 4)):
        evaluate = functools.partial(cddlib.evaluate_run, runs=networks, device="cpu")
        wanted = evaluate(tmp_path / "1")
        for record in together(ranks, evaluate, tmp_path / "several"):
            assert str(record["accuracies"]) == str(wanted["accuracies"])
        assert_same(tmp_path / "several", tmp_path / "1")


# --- Signals, deaths, misunderstandings -------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{1: 3}, {0: 4, 1: 3}])
def test_a_signal_to_one_rank_stops_all_after_the_same_iteration(
    buffer: Buffer, quick: dict[str, Any], tmp_path: Path, asked: dict[int, int]
) -> None:
    """Asked after step 3, they stop after iteration 4; two go on to the same bytes, three to the same set."""
    config = cddlib.distill_recipe("contra", **{**quick, "segments": 3, "checkpoint_every": 100, "validate_every": 0})
    together(2, distil, config, buffer.folder, tmp_path / "whole")
    stopped = together(2, distil, config, buffer.folder, tmp_path / "parts", asked)
    assert [str(error) for error in stopped] == ["stopped after iteration 4, which is saved"] * 2
    assert [error.number for error in stopped] == [signal.SIGTERM] * 2
    shutil.copytree(tmp_path / "parts", tmp_path / "more")
    seen = together(2, distil, config, buffer.folder, tmp_path / "parts")
    assert [len(steps) for steps, _ in seen] == [2 + 1, 2 + 1]
    whole, parts = (tmp_path / name / "synthetic.safetensors" for name in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()
    together(3, distil, config, buffer.folder, tmp_path / "more")
    assert difference(tmp_path / "whole", tmp_path / "more") < 1e-6 and moved(tmp_path / "whole") > 1e-3
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_second_signal_is_the_first_again() -> None:
    """From the cluster and from torchrun; only a process alone stops at once."""
    assert together(2, heed_two_signals) == [signal.SIGTERM] * 2
    with pytest.raises(Interrupted, match=r"^stopped at once$"):
        heed_two_signals()


def heed_two_signals() -> int:
    """Which signal this rank heeds of two."""
    ranks = Ranks()
    with ranks.graceful_stop("the test"):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        ranks.wait()
        return ranks.asked


def test_ranks_that_see_different_folders_are_refused(buffer: Buffer, quick: dict[str, Any], tmp_path: Path) -> None:
    config = cddlib.distill_recipe("contra", **quick)
    together(2, distil, config, buffer.folder, tmp_path / "run-0", {0: 1})
    found = together(2, distil_apart, config, buffer.folder, tmp_path / "run")
    assert all(
        re.search(r"the iteration of the checkpoint in .*run-\d is 2, -1 for the processes", str(e)) for e in found
    )
    assert not (tmp_path / "run-1").exists()


def distil_apart(config: cddlib.DistillConfig, buffer: Path, out: Path) -> None:
    """Distil in a folder that the other rank does not see."""
    cddlib.distill(config, buffer, out.with_name(f"{out.name}-{dist.get_rank()}"), device="cpu")


def test_commands_that_are_not_divided_are_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(cli, "Ranks", lambda: types.SimpleNamespace(rank=0, count=2))
    assert cli.main(["compare", "--buffer", "b", "--out", "o"]) == 1
    assert capsys.readouterr().err == (
        "cddlib: `compare` is not divided among processes; torchrun is for buffer, distill, evaluate.\n"
    )


def test_every_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.resolve_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.resolve_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"it has 2 GPUs; give --nproc-per-node 2, or --device cpu\.$"):
        devices.resolve_device("auto")


# --- torchrun ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def torchrun(options: str, arguments: list[Any], log: Path, **settings: str) -> Iterator[psutil.Popen]:
    """Within, a torchrun whose workers share one command of cddlib, and say what they say in `log`; then no more.

    It ends as in a power cut, unless it has ended before.
    """
    command = [sys.executable, "-m", "torch.distributed.run", *options.split(), "-m", "cddlib", *map(str, arguments)]
    with open(log, "w") as file:
        agent = psutil.Popen(command, env={**os.environ, **settings}, stdout=file, stderr=file)
    try:
        yield agent
    finally:
        for process in [agent, *workers(agent)] if agent.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        agent.wait()


def workers(*agents: psutil.Popen) -> list[psutil.Process]:
    """The processes that they started and that live, lowest number first."""
    started = [worker for agent in agents for worker in agent.children()]
    return sorted((one for one in started if one.status() != psutil.STATUS_ZOMBIE), key=lambda one: one.pid)


def until(condition: Callable[[], bool], agent: psutil.Popen, log: Path) -> None:
    """Wait until something is so, while an agent runs."""
    end = time.monotonic() + 120
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker has just ended
            if condition():
                return
        assert agent.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.005)


def lines(run: Path) -> int:
    """How many iterations the metrics of a run have."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


LONG = {"iterations": 60, "segments": 4, "checkpoint_every": 3, "validate_every": 25}


def arguments(command: str, **options: Any) -> list[Any]:
    pairs = [[f"--{name.replace('_', '-')}", value] for name, value in options.items()]
    return [command, *itertools.chain(*pairs)]


def test_killed_ranks_are_started_again_and_end_with_the_same_bytes(
    buffer: Buffer, quick: dict[str, Any], tmp_path: Path, note: Note, repeats: Repeats
) -> None:
    """Again and again, at a random moment, a random one of two."""
    kills = repeats(1, 10)
    config = {**quick, **LONG}
    together(2, distil, cddlib.distill_recipe("contra", **config), buffer.folder, tmp_path / "whole")
    out, rng = tmp_path / "killed", generator("kill a rank")
    options = f"--standalone --nproc-per-node 2 --max-restarts {max(3, kills)}"
    log, seen = tmp_path / "log", set[psutil.Process]()
    with torchrun(options, arguments("distill", **config, buffer=buffer.folder, out=out), log) as agent:
        for kill in range(kills):
            until(lambda: lines(out) > 40 * kill // kills and len({*workers(agent)} - seen) == 2, agent, log)  # noqa: B023
            time.sleep(0.2 * float(torch.rand((), generator=rng)))
            seen |= {*workers(agent)}
            workers(agent)[int(torch.randint(2, (), generator=rng))].kill()
        assert agent.wait(180) == 0, log.read_text()
    assert "iteration" in log.read_text()
    assert_same(out, tmp_path / "whole")
    note("kills", work="distill, 2 processes", kills=kills, identical=True)


def test_a_machine_that_is_lost_leaves_the_work_to_the_other(
    buffer: Buffer, quick: dict[str, Any], tmp_path: Path, note: Note
) -> None:
    """Two agents with a rank each; one is killed whole, and the other one goes on alone."""
    config = {**quick, **LONG}
    cddlib.distill(cddlib.distill_recipe("contra", **config), buffer, tmp_path / "1", device="cpu")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    options = f"--nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint localhost:{port}"
    options += " --rdzv-id test --rdzv-conf last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=8"
    out = tmp_path / "elastic"
    shared = options, arguments("distill", **config, buffer=buffer.folder, out=out)
    unshared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the book says
    log = tmp_path / "staying"
    with torchrun(*shared, log, **unshared) as staying:
        until(lambda: listens(port), staying, log)
        with torchrun(*shared, tmp_path / "leaving", **unshared) as leaving:
            both = functools.partial(workers, staying, leaving)
            until(lambda: lines(out) > 5 and [w.environ()["WORLD_SIZE"] for w in both()] == ["2", "2"], staying, log)
        assert staying.wait(180) == 0, log.read_text()
    gone = r"another process of this run is gone \(.+\); what was saved is kept, and torchrun"
    assert re.search(gone, log.read_text())
    found, wanted = metrics(out), metrics(tmp_path / "1")
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    assert [line["matched"] for line in found[1:]] == [line["matched"] for line in wanted[1:]]
    apart = difference(tmp_path / "1", out)
    assert apart < 1e-4 and moved(out) > 1e-3
    note("agreement", ranks="2, then 1", rule="mean", largest_relative_difference=apart)
    note("kills", work="distill, one of 2 machines", kills=1, identical=False)


def listens(port: int) -> bool:
    """Whether somebody listens at a port of this machine."""
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
        return True
    return False


def test_a_killed_rank_of_a_buffer_ends_with_the_same_bytes(tmp_path: Path, note: Note) -> None:
    config = {"width": 4, "epochs": 12, "experts": 3}
    cddlib.train_buffer(cddlib.buffer_recipe("digits", **config), tmp_path / "1", device="cpu")
    out = tmp_path / "buffer"
    log, line = tmp_path / "log", arguments("buffer", **config, out=out)
    with torchrun("--standalone --nproc-per-node 2 --max-restarts 1", line, log) as agent:
        until(lambda: any(out.glob("expert-*")), agent, log)
        workers(agent)[1].kill()
        assert agent.wait(180) == 0, log.read_text()
    assert_same(out, tmp_path / "1")
    note("kills", work="buffer, 2 processes", kills=1, identical=True)
