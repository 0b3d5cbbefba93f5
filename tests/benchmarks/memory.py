"""Peak memory of one segment's gradient as the student takes more steps: cddlib's walk beside the textbook's graph.

And of the summed gradient of K segments, one after the other, at the first of the student steps, repeatedly. No
residuals are kept.

    python tests/benchmarks/memory.py --to book/results/memory.json

CIFAR's shape, MTT's ConvNet, full-batch steps with all augmentation. Each measurement has a process of its own.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
from pathlib import Path
from typing import Any

import textbook
import torch
import tyro

import cddlib
from cddbook.records import write_record
from cddlib.data.augment import AugmentConfig
from cddlib.matching.combine import weighted_sum
from cddlib.matching.student import MatchingConfig
from cddlib.runtime.device import resolve_device
from cddlib.runtime.provenance import Recorder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    to: Path
    """File of the record."""
    student_steps: tuple[int, ...] = (10, 20, 40, 80)
    """Student steps N."""
    segments: tuple[int, ...] = (1, 2, 4, 8)
    """Segment counts K."""
    repeats: int = 5
    """Measurements of each K: a process's peak is not the same twice."""
    width: int = 128
    """Channels of the ConvNet."""
    images: int = 10
    """Synthetic images."""
    threads: int = 1
    """Threads of the CPU."""
    device: str = "cpu"
    """Where it runs: `auto`, `cpu`, `cuda` …"""


IMPLEMENTATIONS = {"cddlib": cddlib.matching_loss, "textbook": textbook.matching_loss}
SEVERAL = "cddlib, K segments"


def measure(options: Options, implementation: str, student_steps: int, segments: int) -> dict[str, Any]:
    """Loss and gradient once for each segment; memory and time that they took."""
    torch.set_num_threads(options.threads)
    os.environ["CDDLIB_KEPT_MB"] = "0"
    device = resolve_device(options.device)
    rng = cddlib.generator("memory")
    network = cddlib.ConvNet(cddlib.NetworkConfig(width=options.width), (3, 32, 32), 10)
    start, target, images, targets, step_size = textbook.noise(network, (3, 32, 32), options.images, rng, device)
    student = MatchingConfig(student_steps=student_steps)
    steps = cddlib.plan_student(student, options.images, AugmentConfig().augment, rng)
    variables = [images.requires_grad_(), step_size.requires_grad_()]

    recorder = Recorder(device)
    before = recorder.report()["peak_memory_mb"]
    matching_loss = IMPLEMENTATIONS.get(implementation, cddlib.matching_loss)
    gradients = []
    for _ in range(segments):
        loss = matching_loss(network, start, target, images, targets, step_size, steps)
        gradients.append(torch.autograd.grad(loss, variables))
    gradient, _ = weighted_sum(gradients, [1 / segments] * segments)
    after = recorder.report()
    return {
        "implementation": implementation,
        "student_steps": student_steps,
        "segments": segments,
        "start_mb": before,
        "peak_mb": after["peak_memory_mb"],
        "seconds": after["seconds"],
        "loss": loss.item(),
        "image_gradient_norm": gradient.norm().item(),
    }


def main(options: Options) -> None:
    """Measure everything, print a table, write the record."""
    recorder = Recorder(resolve_device(options.device))
    torch.set_num_threads(options.threads)
    fresh = concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )
    print(f"{'':20}{'steps':>6}{'K':>4}{'peak MB':>10}{'above start':>13}{'seconds':>9}")
    points = [(name, student_steps, 1) for name in IMPLEMENTATIONS for student_steps in options.student_steps]
    points += [(SEVERAL, options.student_steps[0], segments) for segments in options.segments * options.repeats]
    measurements = []
    for name, student_steps, segments in points:
        m = fresh.submit(measure, options, name, student_steps, segments).result()
        above, peak = m["peak_mb"] - m["start_mb"], m["peak_mb"]
        print(f"{name:20}{student_steps:6}{segments:4}{peak:10.0f}{above:13.0f}{m['seconds']:9.1f}", flush=True)
        measurements.append(m)
    fresh.shutdown()
    config = {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name != "to"}
    report = {key: value for key, value in recorder.report().items() if key != "peak_memory_mb"}  # not this process's
    write_record(options.to, {"config": config, "measurements": measurements, **report})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
