"""Buffering: train experts on real data and keep their parameters after every epoch.

On the command line::

    cddlib buffer --data digits --out runs/buffer
    cddlib buffer --data cifar10 --root DIR --out runs/cifar10                                # as MTT
    cddlib buffer --method datm --data cifar10 --ipc 50 --root DIR --out runs/cifar10-datm    # as DATM

An expert is durable once it is finished, and the epochs of an unfinished one about every minute; a run that was
interrupted goes on from there and ends with the same bytes as one that was not. Experts differ only by their seed;
under torchrun its processes divide them.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from cddlib.data.dataset import Dataset, load
from cddlib.data.preprocessing import fit_preprocessing
from cddlib.experts.buffer import PREPROCESSING, Buffer, expert_path, read_expert_record, read_manifest
from cddlib.experts.config import BufferConfig
from cddlib.experts.expert import ExpertTraining, train_expert
from cddlib.networks.convnet import Network
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import as_dict, config_hash, replace
from cddlib.runtime.device import resolve_device
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.errors import out_of_memory_hint
from cddlib.runtime.files import file_digest, write_json, write_tensors
from cddlib.runtime.provenance import Recorder
from cddlib.runtime.run_folder import at_work, refuse_other_run
from cddlib.training.engine import worth_compiling


@out_of_memory_hint("--batch-size or --width")
def train_buffer(config: BufferConfig, out: Path, *, root: Path | None = None, device: str = "auto") -> Buffer:
    """Train the experts that `out` lacks, then open it.

    Where torch.distributed is initialised, as the command line does under torchrun, every process calls this with
    the same arguments and trains its part.

    Args:
        config: what to train.
        out: the buffer's folder. It may hold some experts of the same configuration already.
        root: folder of the data sets, see `cddlib.data.dataset.default_root`.
        device: `auto`, `cpu`, `cuda`, `cuda:1` …

    Raises:
        UserError: `out` holds another buffer or is in use, a file is damaged, the data set or the device is missing,
            memory runs out, or an expert diverges.
        Interrupted: a signal asked to stop; the epoch is finished, and saved.
    """
    dev = resolve_device(device)
    dataset = load(config.data.data, root)
    network = build_network(config.network, dataset.shape, len(dataset.classes))
    seen = config.epochs * len(dataset.train.labels)  # by one expert, so that a buffer can grow
    config = replace(config, compiled=worth_compiling(network, config.compute, dev, seen))
    wanted: dict[str, Any] = {"config": as_dict(config), "data": describe(dataset), "experts": []}
    manifest = _resume(out, wanted)
    if (out / "result.json").exists() and not _missing(out, manifest):
        return Buffer(out)
    with at_work(out / ".lock", "the epoch") as ranks:
        _train_missing(config, out, wanted, network, dataset, dev, ranks)
    return Buffer(out)


def describe(dataset: Dataset) -> dict[str, Any]:
    """What `buffer.json` says of a data set."""
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "shape": list(dataset.shape),
        "classes": len(dataset.classes),
    }


def _train_missing(
    config: BufferConfig,
    out: Path,
    wanted: dict[str, Any],
    network: Network,
    dataset: Dataset,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Train the experts that `out` lacks, in a folder that is this run's alone."""
    manifest = _resume(out, wanted)
    missing = _missing(out, manifest)
    manifest["experts"] = manifest["experts"][: min(missing, default=len(manifest["experts"]))]
    recorder = Recorder(device)
    ranks.agree(len(missing), f"the number of experts that {out} lacks")  # the first rank writes only now
    if ranks.first:
        (out / "result.json").unlink(missing_ok=True)  # of the smaller buffer that grows
        write_json(out / "buffer.json", manifest)
        if not (out / PREPROCESSING).exists():
            preprocessing = fit_preprocessing(dataset, zca=config.data.zca, device=device)
            write_tensors(out / PREPROCESSING, preprocessing.tensors(), "preprocessing")
    training = ExpertTraining(config, network, dataset, out, device, ranks)
    for expert in ranks.portion(missing):
        train_expert(training, expert, config_hash(_identity(wanted)))
        if ranks.first:
            _list_experts(out, manifest)
    ranks.wait()
    if ranks.first:
        _list_experts(out, manifest)
        for left in out.glob(".*.unfinished.*"):  # of a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_json(out / "result.json", {"experts_trained": len(missing), **recorder.report()})
    ranks.wait()


def _missing(out: Path, manifest: dict[str, Any]) -> list[int]:
    """The experts that are still to be trained. Those of the same buffer that a killed run left are not."""
    identity = config_hash(_identity(manifest))
    paths = [expert_path(out, expert) for expert in range(manifest["config"]["experts"])]
    return [
        expert
        for expert, path in enumerate(paths)
        if not path.exists() or read_expert_record(path).get("buffer") != identity
    ]


def _list_experts(out: Path, manifest: dict[str, Any]) -> None:
    """Describe in `buffer.json` the experts that are finished, up to the first that is not."""
    missing = _missing(out, manifest)
    for expert in range(len(manifest["experts"]), min(missing, default=manifest["config"]["experts"])):
        path = expert_path(out, expert)
        manifest["experts"].append({"file": path.name, "sha256": file_digest(path), **read_expert_record(path)})
    write_json(out / "buffer.json", manifest)


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What makes a buffer another buffer: everything but the number of its experts."""
    return {**{key: value for key, value in manifest["config"].items() if key != "experts"}, "data": manifest["data"]}


def _resume(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the buffer in `out`, grown to the experts of `wanted`; refuse another buffer."""
    if not (out / "buffer.json").exists():
        return copy.deepcopy(wanted)
    manifest, _ = read_manifest(out)
    refuse_other_run(out, _identity(manifest), _identity(wanted))
    manifest["config"]["experts"] = max(wanted["config"]["experts"], manifest["config"]["experts"])
    return manifest
