"""cddlib: dataset distillation by concurrent trajectory matching.

From real images to a tested synthetic set::

    from pathlib import Path
    import cddlib
    buffer = cddlib.train_buffer(cddlib.buffer_recipe("digits"), Path("runs/buffer"))
    config = cddlib.distill_recipe("contra", "digits", ipc=1, segments=4)
    synthetic = cddlib.distill(config, buffer, Path("runs/contra"))
    record = cddlib.evaluate_run(Path("runs/contra"), runs=3)

The modules, in the order in which data flows: files, runs, ranks, data, prepare, preprocessing, augment, networks,
steps, convnet_steps, engine, graphs, training, curriculum, trajectory, buffer, segments, matching, combine,
consolidate, synthetic, torch_files, exchange, export, correlation, continual, evaluate, state, concurrent, distill,
verify, methods, recipes, plan, study, findings, claims, method_tables, figures, study_figures, reliability_figures,
speed_figures, gpu_figures, gpu_runs, commands, cli.
"""

from cddlib.buffer import BufferConfig, train_buffer
from cddlib.concurrent import concurrent_gradient
from cddlib.data import Dataset, load
from cddlib.distill import DistillConfig, distill
from cddlib.evaluate import evaluate_run
from cddlib.files import UserError
from cddlib.matching import matching_loss, plan_student
from cddlib.networks import ConvNet, NetworkConfig, build_network
from cddlib.prepare import prepare
from cddlib.recipes import buffer_recipe, distill_recipe
from cddlib.runs import generator
from cddlib.segments import SegmentsConfig, draw_segments
from cddlib.synthetic import SyntheticSet
from cddlib.trajectory import Buffer

__all__ = [
    "Buffer",
    "BufferConfig",
    "ConvNet",
    "Dataset",
    "DistillConfig",
    "NetworkConfig",
    "SegmentsConfig",
    "SyntheticSet",
    "UserError",
    "buffer_recipe",
    "build_network",
    "concurrent_gradient",
    "distill",
    "distill_recipe",
    "draw_segments",
    "evaluate_run",
    "generator",
    "load",
    "matching_loss",
    "plan_student",
    "prepare",
    "train_buffer",
]
