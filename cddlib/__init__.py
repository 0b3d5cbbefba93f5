"""cddlib: dataset distillation by concurrent trajectory matching.

From real images to a tested synthetic set::

    from pathlib import Path
    import cddlib
    buffer = cddlib.train_buffer(cddlib.buffer_recipe("digits"), Path("runs/buffer"))
    config = cddlib.distill_recipe("contra", "digits", ipc=1, segments=4)
    synthetic = cddlib.distill(config, buffer, Path("runs/contra"))
    record = cddlib.evaluate_run(Path("runs/contra"), runs=3)

The rooms, each importing only from those before it: runtime, data, networks, training, experts, matching, synthetic,
protocol, evaluate, distillation, methods, exchange, plan, verify, commands, cli.
"""

from cddlib.data.dataset import Dataset, load
from cddlib.data.download import prepare
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.gradient import concurrent_gradient
from cddlib.distillation.hooks import TensorBoard
from cddlib.distillation.loop import distill
from cddlib.evaluate import evaluate_run
from cddlib.experts.buffer import Buffer
from cddlib.experts.config import BufferConfig
from cddlib.experts.train import train_buffer
from cddlib.matching.loss import matching_loss
from cddlib.matching.segments import SegmentsConfig, draw_segments
from cddlib.matching.student import plan_student
from cddlib.methods.recipes import buffer_recipe, distill_recipe
from cddlib.networks.convnet import ConvNet, NetworkConfig
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import replace
from cddlib.runtime.errors import UserError
from cddlib.runtime.random import generator
from cddlib.synthetic import SyntheticSet

__all__ = [
    "Buffer",
    "BufferConfig",
    "ConvNet",
    "Dataset",
    "DistillConfig",
    "NetworkConfig",
    "SegmentsConfig",
    "SyntheticSet",
    "TensorBoard",
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
    "replace",
    "train_buffer",
]
