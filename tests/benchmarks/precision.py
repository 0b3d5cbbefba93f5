"""How far gradients in float32 and bfloat16 are from those in float64, over whole walks on real experts.

    python tests/benchmarks/precision.py BUFFER --to book/results/precision.json

A walk is one segment's matching gradient, from real images, with all augmentation: `WALKS` has early and late segments,
1 and 10 images a class, 20 to 50 student steps, and at last steps that are too long. Recorded are the cosine between
the images' gradients, that of each image, and the error of the step size's gradient.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import cddlib
from cddbook.records import read_record, write_record
from cddlib.data.augment import AugmentConfig
from cddlib.data.dataset import load
from cddlib.experts.buffer import Buffer
from cddlib.matching.loss import matching_loss
from cddlib.matching.student import MatchingConfig, plan_student
from cddlib.runtime.device import keep_freed_memory, resolve_device
from cddlib.runtime.provenance import Recorder
from cddlib.synthetic import SyntheticConfig, initialise
from cddlib.training.step import ComputeConfig

WALKS = [
    *itertools.product((1,), (20, 50), ("early", "middle", "late"), (0, 1), (0.01,)),
    *itertools.product((10,), (20, 30), ("early", "middle", "late"), (0, 1), (0.01,)),
    *itertools.product((1,), (20,), ("early", "late"), (0, 1), (0.03, 0.1)),
]
"""Images a class, student steps, where the segment starts, seed, step size."""
WAYS = {
    "float32": ComputeConfig(),
    "float32, derived": ComputeConfig(compiled=True),
    "bfloat16, derived": ComputeConfig(precision="bfloat16", compiled=True),
}
EXPERT_EPOCHS = 2


def gradients(
    buffer: Buffer,
    walk: tuple[int, int, str, int, float],
    root: Path | None,
    compute: ComputeConfig,
    dtype: torch.dtype,
) -> tuple[float, Tensor, float]:
    """Loss, and the gradients of images and step size, on the CPU in float64."""
    ipc, student_steps, where, seed, step_length = walk
    device = resolve_device("auto")
    config = SyntheticConfig(ipc=ipc, step_size=step_length)
    synthetic = initialise(config, load(buffer.data["name"], root), buffer, seed, device)
    latest = buffer.epochs - EXPERT_EPOCHS
    start = {"early": 0, "middle": latest // 2, "late": latest}[where]
    matching = MatchingConfig(student_steps=student_steps)
    rng = cddlib.generator(seed, "precision", ipc, student_steps, where)
    steps = plan_student(matching, len(synthetic.labels), AugmentConfig().augment, rng)
    images, step_size = (x.detach().to(dtype).requires_grad_() for x in (synthetic.images, synthetic.step_size))
    theta, target = (buffer.parameters(0, epoch).to(device, dtype) for epoch in (start, start + EXPERT_EPOCHS))
    targets = synthetic.targets().detach().to(dtype)
    loss = matching_loss(buffer.network, theta, target, images, targets, step_size, steps, matching, compute)
    by_images, by_step_size = torch.autograd.grad(loss, (images, step_size))
    return loss.item(), by_images.double().cpu(), by_step_size.item()


def compare(found: tuple[float, Tensor, float], exact: tuple[float, Tensor, float]) -> dict[str, Any]:
    """How far a gradient is from the exact one."""
    a, b = found[1].flatten(1), exact[1].flatten(1)
    each = torch.nn.functional.cosine_similarity(a, b, dim=1)
    return {
        "loss": exact[0],
        "loss_error": found[0] / exact[0] - 1,
        "cosine": float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)),
        "cosines_of_images": [round(value, 5) for value in each.tolist()],
        "step_size_error": found[2] / exact[2] - 1,
    }


def main(experts: tyro.conf.Positional[Path], to: Path = Path("precision.json"), root: Path | None = None) -> None:
    """Compare every way in every walk; the record `to` is written after each, and goes on from what it has."""
    keep_freed_memory()
    buffer = Buffer(experts)
    recorder = Recorder(resolve_device("auto"))
    expert = {"data": buffer.data["name"], "epochs": buffer.epochs, "width": buffer.config["width"]}
    earlier = read_record(to) if to.exists() else {"expert": expert, "walks": []}
    if earlier["expert"] != expert:
        raise SystemExit(f"{to} is of another expert, {earlier['expert']}; this one is {expert}.")
    rows: list[dict[str, Any]] = earlier["walks"]
    for walk in tqdm(WALKS[len(rows) // len(WAYS) :], unit="walk"):
        exact = gradients(buffer, walk, root, ComputeConfig(), torch.float64)
        for way, compute in WAYS.items():
            found = gradients(buffer, walk, root, compute, torch.float32)
            named = dict(zip(("ipc", "student_steps", "where", "seed", "step_size"), walk, strict=True))
            rows.append({"way": way, **named, **compare(found, exact)})
        write_record(to, {"expert": expert, "expert_epochs": EXPERT_EPOCHS, "walks": rows, **recorder.report()})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
