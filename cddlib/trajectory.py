"""The buffer on disk: expert trajectories, written once, read one parameter vector at a time.

A buffer is a folder::

    buffer.json                 configuration, data, and the finished experts with their accuracies and checksums
    preprocessing.safetensors   the map from pixels to network input that the experts saw
    expert-000.safetensors      one tensor a parameter, time (epochs 0 … T) as the leading axis
"""

import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from cddlib.data import Dataset
from cddlib.networks import ConvNet, Network, NetworkConfig, views
from cddlib.preprocessing import Preprocessing, preprocessing_from
from cddlib.runs import (
    UserError,
    config_hash,
    from_dict,
    open_tensors,
    read_json,
    read_metadata,
    write_tensors,
)

PREPROCESSING = "preprocessing.safetensors"


def read_preprocessing(folder: Path) -> Preprocessing:
    """The map from pixels to network input that the experts in `folder` see."""
    file = open_tensors(folder / PREPROCESSING)
    return preprocessing_from({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict


def expert_path(folder: Path, expert: int) -> Path:
    """File of an expert's trajectory."""
    return folder / f"expert-{expert:03d}.safetensors"


def write_trajectory(
    path: Path, network: Network, snapshots: list[Float[Tensor, " p"]], record: dict[str, Any]
) -> None:
    """Write the parameter vectors of epochs 0 … T as one stacked tensor a parameter, with `record` in the header."""
    write_tensors(
        path,
        {name: torch.stack([views(network, theta)[name] for theta in snapshots]) for name in network.shapes},
        {"expert": record},
    )


class Buffer:
    """The trajectories in a folder. Opening it reads only `buffer.json` and the preprocessing."""

    def __init__(self, folder: Path) -> None:
        """Open the buffer in `folder`.

        Raises:
            UserError: no buffer there, a damaged one, or one whose experts are not all trained.
        """
        if not (folder / "buffer.json").exists():
            raise UserError(f"{folder} holds no buffer; train one with `cddlib buffer --out {folder}`.")
        self.folder = folder
        manifest = read_json(folder / "buffer.json")
        try:
            self.config: dict[str, Any] = manifest["config"]
            self.data: dict[str, Any] = manifest["data"]
            self.experts: list[dict[str, Any]] = manifest["experts"]
            self.epochs: int = self.config["epochs"]
            wanted = self.config["experts"]
            self.network: Network = ConvNet(
                from_dict(NetworkConfig, self.config), tuple(self.data["shape"]), self.data["classes"]
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / 'buffer.json'} is not a buffer's description ({error!r}).") from None
        if len(self.experts) < wanted:
            raise UserError(
                f"{folder} holds {len(self.experts)} of {wanted} experts; run the same `cddlib buffer` again to finish."
            )
        self.id = config_hash(manifest)
        self._files: dict[int, Any] = {}

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        """The map from pixels to network input that the experts saw."""
        return read_preprocessing(self.folder)

    def check_data(self, dataset: Dataset) -> None:
        """Raise `UserError` unless the experts were trained on `dataset`."""
        if self.data["name"] != dataset.name:
            raise UserError(f"{self.folder} holds experts of {self.data['name']}, not of {dataset.name}.")
        if self.data["fingerprint"] != dataset.fingerprint:
            raise UserError(
                f"{self.folder} holds experts of another version of {dataset.name}: its fingerprint is "
                f"{self.data['fingerprint']}, this one's {dataset.fingerprint}."
            )

    def parameters(self, expert: int, epoch: int) -> Float[Tensor, " p"]:
        """θ*_epoch of `expert`, on the CPU; reads nothing else."""
        if expert not in self._files:
            self._files[expert] = open_tensors(expert_path(self.folder, expert))
        file = self._files[expert]
        try:
            if not 0 <= epoch <= self.epochs:
                raise IndexError("out of range")
            pieces = [file.get_slice(name)[epoch] for name in self.network.shapes]
            wrong = [
                f"{name} has shape {list(piece.shape)}, not {list(shape)}"
                for piece, (name, shape) in zip(pieces, self.network.shapes.items(), strict=True)
                if tuple(piece.shape) != shape
            ]
        except (SafetensorError, IndexError) as error:
            wrong = [f"epoch {epoch} of {self.epochs} cannot be read ({error})"]
        if wrong:
            raise UserError(f"{expert_path(self.folder, expert)} does not fit buffer.json: {wrong[0]}.")
        return torch.cat([piece.flatten() for piece in pieces])


def read_expert_record(path: Path) -> dict[str, Any]:
    """The `record` that `write_trajectory` was given."""
    return read_metadata(open_tensors(path), path, "expert")
