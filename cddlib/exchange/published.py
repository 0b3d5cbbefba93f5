"""Exchange with the published codes: reading and writing the files of MTT, FTD, DATM and their kin.

They keep experts in ``replay_buffer_0.pt`` … and a synthetic set in ``images_best.pt``, ``labels_best.pt`` and (DATM)
``lr_best.pt``. Nothing in these files says which network, data set or preprocessing they belong to: whoever imports
them has to say so. No code in a file is ever run, and what is written appears whole or not at all.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from cddlib.data.dataset import DataConfig, load
from cddlib.data.preprocessing import fit_preprocessing
from cddlib.exchange.torch_files import check_tensor, read_torch_file, wrong_value
from cddlib.experts.buffer import PREPROCESSING, Buffer, describe, expert_path, write_trajectory
from cddlib.experts.config import BufferConfig
from cddlib.networks.convnet import Network, unflatten
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import as_dict, replace
from cddlib.runtime.device import resolve_device
from cddlib.runtime.errors import Diverged, UserError, require
from cddlib.runtime.files import file_digest, refuse_filled, whole_folder, write_atomically, write_json, write_tensors
from cddlib.runtime.provenance import Recorder
from cddlib.synthetic import SyntheticSet
from cddlib.training.epoch import accuracy


def import_buffer(
    files: Path, out: Path, config: BufferConfig, *, root: Path | None = None, device: str = "auto"
) -> Buffer:
    """Turn ``replay_buffer_*.pt`` files of MTT, FTD, DATM and their kin into a buffer.

    The files hold parameters and nothing else. Data set, whitening, network and training settings are taken from
    `config`, where only the network's shapes can be checked. The published codes train on all images, so `holdout` is
    False for their experts. The last parameters of each expert are tested here; training losses and the validation
    accuracies of earlier epochs are unknown (None), and so is the seed. Memory holds one expert at a time.

    Args:
        files: a folder with ``replay_buffer_*.pt``, read in numeric order, or one such file.
        out: the buffer's folder, new or empty.
        config: what the files do not say. Its `experts` and `epochs` are replaced by what the files hold.
        root: folder of the data sets, see `cddlib.data.dataset.default_root`.
        device: where the experts are tested.

    Raises:
        UserError: a file is missing, damaged, holds more than lists of tensors, or does not fit the network; `out` is
            not empty; the data set or the device is missing.
    """
    refuse_filled(out)
    dev = resolve_device(device)
    recorder = Recorder(dev)
    paths = sorted(files.glob("replay_buffer_*.pt"), key=lambda path: (len(path.name), path.name))
    if files.is_dir() and not paths:
        raise UserError(f"{files} holds no replay_buffer_*.pt.")
    dataset = load(config.data.data, root)
    network = build_network(config.network, dataset.shape, len(dataset.classes))
    preprocessing = fit_preprocessing(dataset, zca=config.data.zca)
    parts, seen = [part.to(dev) for part in (dataset.split[1], dataset.test)], preprocessing.to(dev)
    experts: list[dict[str, object]] = []
    epochs = 0
    with whole_folder(out) as folder:
        write_tensors(folder / PREPROCESSING, preprocessing.tensors(), "preprocessing")
        for where, source, snapshots in _read_experts(paths or [files], network):
            length = len(snapshots) - 1
            epochs = epochs or length
            if length != epochs:
                raise UserError(f"{where} has {length} epochs and the first one {epochs}; all need the same.")
            validation, test = (accuracy(network, snapshots[-1].to(dev), part, seen) for part in parts)
            if math.isnan(validation + test):
                raise Diverged(f"{where} diverged: its output at the last epoch is not finite.")
            record = {
                "buffer": "imported",
                "seed": None,
                "train_loss": [],
                "validation_accuracy": [None] * epochs + [validation],
                "test_accuracy": test,
                "source": source,
            }
            path = expert_path(folder, len(experts))
            write_trajectory(path, network, snapshots, record)
            experts.append({"file": path.name, "sha256": file_digest(path), **record})
        counted = replace(config, experts=len(experts), epochs=epochs, compiled=False)
        described = {**as_dict(counted), "imported": True}  # so that `train_buffer` does not add experts of its own
        write_json(folder / "buffer.json", {"config": described, "data": describe(dataset), "experts": experts})
        write_json(folder / "result.json", {"experts_imported": len(experts), **recorder.report()})
    return Buffer(out)


def _read_experts(paths: list[Path], network: Network) -> Iterator[tuple[str, dict[str, object], list[Tensor]]]:
    """Every expert of the files: words that say where it is, its record, and its parameter vectors, all checked."""
    for path in tqdm(paths, desc="importing", unit="file"):
        content, digest = read_torch_file(path), file_digest(path)
        if not isinstance(content, list) or not content:
            raise wrong_value(str(path), content, "a list of trajectories")
        for number, trajectory in enumerate(content):
            where = f"{path}, expert {number},"
            yield where, {"file": path.name, "sha256": digest, "expert": number}, _snapshots(trajectory, where, network)


def _snapshots(trajectory: object, where: str, network: Network) -> list[Tensor]:
    """The parameter vectors of an expert, all of them checked."""
    if not isinstance(trajectory, list) or len(trajectory) < 2:
        raise wrong_value(where, trajectory, "a list of the initialisation and the epochs")
    snapshots: list[Tensor] = []
    for epoch, tensors in enumerate(trajectory):
        here = f"{where} epoch {epoch},"
        if not isinstance(tensors, list) or len(tensors) != len(network.shapes):
            wanted = f"a list of the {len(network.shapes)} parameters of the network that the configuration describes"
            raise wrong_value(here, tensors, wanted)
        theta = torch.cat(
            [
                check_tensor(value, f"{here} parameter {name}", torch.float32, shape).flatten()
                for value, (name, shape) in zip(tensors, network.shapes.items(), strict=True)
            ]
        )
        snapshots.append(theta)
    return snapshots


def export_buffer(buffer: Buffer, folder: Path, *, experts_per_file: int = 10) -> list[Path]:
    """Write ``replay_buffer_0.pt`` … as MTT, FTD and DATM read them; a remainder gets a smaller last file.

    Each file is a list of experts, each a list of epochs 0 … T, each a list of float32 tensors in the order of the
    ConvNet's parameters. Memory holds one file. Accuracies, preprocessing and configuration have no place there.

    Args:
        buffer: what to export.
        folder: where the files go, new or empty; the published codes expect ``<DATA>[_NO_ZCA]/ConvNet``.
        experts_per_file: 10 in the published codes, 1 in TESLA.

    Raises:
        UserError: `folder` is not empty, or `experts_per_file` is below 1.
    """
    require(1, experts_per_file=experts_per_file)
    number = len(buffer.experts)
    paths = [folder / f"replay_buffer_{file}.pt" for file in range(math.ceil(number / experts_per_file))]
    with whole_folder(folder) as temporary:
        for path, start in zip(tqdm(paths, desc="exporting"), range(0, number, experts_per_file), strict=True):
            # cloned: who loads a view holds its whole vector
            trajectories = [
                [
                    [tensor.clone() for tensor in unflatten(buffer.network, buffer.parameters(expert, epoch)).values()]
                    for epoch in range(buffer.epochs + 1)
                ]
                for expert in range(number)[start : start + experts_per_file]
            ]
            _save(temporary / path.name, trajectories)
    return paths


def _save(path: Path, value: object) -> None:
    write_atomically(path, lambda temporary: torch.save(value, temporary))


def import_set(
    images: Path, labels: Path, config: DataConfig, *, step_size: Path | float, root: Path | None = None
) -> SyntheticSet:
    """Read a synthetic set of MTT, TESLA, FTD, ATT, DATM or PAD.

    The files do not say which data set they belong to, nor whether their images are normalised or whitened: `config`
    says it, and a wrong answer gives wrong pictures and low accuracy, not an error. Hard labels have to be class-major
    (all images of class 0, then of class 1 …). Logits are taken as class-major, as DD-Ranking takes them, because
    learned logits cannot show it.

    Args:
        images: ``images_best.pt`` or ``images_500.pt``, float32 (C·IPC, c, h, w). The files ``images_zca_*.pt`` of
            the same codes hold pictures with the whitening undone, in spite of their name, and are refused.
        labels: ``labels_best.pt``, int64 (C·IPC) or float32 logits (C·IPC, C).
        config: the data set, for class names and preprocessing, and whether the images are whitened.
        step_size: ``lr_best.pt``, where DATM and PAD save it, or the number (MTT, TESLA, FTD and ATT never save it).
        root: folder of the data sets, see `cddlib.data.dataset.default_root`.

    Raises:
        UserError: a file is missing, damaged, holds more than one tensor or does not fit the data set; or the step
            size is not positive.
    """
    if images.name.startswith("images_zca_"):
        whitened = images.name.replace("_zca", "", 1)
        raise UserError(f"{images} holds pictures with the whitening undone; import {whitened} instead.")
    step = _read_step_size(step_size) if isinstance(step_size, Path) else torch.tensor(step_size, dtype=torch.float32)
    if not 0 < step.item() < float("inf"):
        place = f" in {step_size}" if isinstance(step_size, Path) else ""
        raise UserError(f"the step size{place} is {step.item():g}; it must be positive.")
    dataset = load(config.data, root)
    classes = len(dataset.classes)
    pixels, marks = read_torch_file(images), read_torch_file(labels)
    n = len(pixels) if isinstance(pixels, Tensor) and pixels.ndim else 0
    if n == 0 or n % classes:
        wanted = f"a tensor of images, as many for each of the {classes} classes of {dataset.name}"
        raise wrong_value(str(images), pixels, wanted)
    by_place = torch.arange(classes).repeat_interleave(n // classes)
    soft = isinstance(marks, Tensor) and marks.is_floating_point()
    marks = check_tensor(marks, str(labels), *((torch.float32, (n, classes)) if soft else (torch.int64, (n,))))
    if not soft and len(wrong := torch.nonzero(marks != by_place)):
        first = int(wrong[0])
        found = f"image {first} of {n} has label {int(marks[first])}, not {int(by_place[first])}"
        raise UserError(f"{labels} is not class-major: {found}.")
    return SyntheticSet(
        images=check_tensor(pixels, str(images), torch.float32, (n, *dataset.shape)),
        labels=by_place,
        label_logits=marks if soft else None,
        step_size=step,
        preprocessing=fit_preprocessing(dataset, zca=config.zca),
        classes=dataset.classes,
    ).copy()  # out of the mapped files


def _read_step_size(path: Path) -> Float[Tensor, ""]:
    value = read_torch_file(path)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise wrong_value(str(path), value, "a step size, one number")
    return check_tensor(value.reshape(()), str(path), torch.float32, ())


def export_set(synthetic: SyntheticSet, folder: Path) -> list[Path]:
    """Write ``images_best.pt``, ``labels_best.pt`` and ``lr_best.pt`` as DATM does, and return their paths.

    Images stay in the network's input space, normalised or whitened; labels are logits if they were learned, else
    int64; the step size is a scalar. Class names, preprocessing and subsets have no place there: say with them which
    data set it is and whether it is whitened (DD-Ranking's `use_zca`).

    Raises:
        UserError: `folder` is not empty.
    """
    soft, hard = synthetic.label_logits, synthetic.labels
    values = {
        "images_best.pt": synthetic.images,
        "labels_best.pt": hard if soft is None else soft,
        "lr_best.pt": synthetic.step_size,
    }
    with whole_folder(folder) as temporary:
        for name, value in values.items():
            _save(temporary / name, value.detach().cpu().clone())
    return [folder / name for name in values]
