"""The buffer on disk: expert trajectories, written once, read one parameter vector at a time.

A buffer is a folder::

    buffer.json                 configuration, data, and the finished experts with their accuracies and checksums
    preprocessing.safetensors   the map from pixels to network input that the experts saw
    difficulty.safetensors      how hard each training image is, if the experts' curriculum ranks them
    expert-000.safetensors      one tensor a parameter, time (epochs 0 … T) as the leading axis
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.data.dataset import Dataset
from cddlib.data.preprocessing import Preprocessing, preprocessing_from
from cddlib.experts.config import BufferConfig
from cddlib.networks.convnet import Network, unflatten
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import as_dict, config_hash, from_dict
from cddlib.runtime.errors import Diverged, UserError, as_user_error
from cddlib.runtime.files import open_tensors, read_header, read_json, read_tensors, tensor_digest, write_tensors

PREPROCESSING = "preprocessing.safetensors"
DIFFICULTY = "difficulty.safetensors"


@dataclasses.dataclass(frozen=True)
class _Data:
    """What `buffer.json` says of the data set."""

    name: str
    fingerprint: str
    shape: tuple[int, int, int]
    classes: int


def describe(dataset: Dataset) -> dict[str, Any]:
    """What `buffer.json` says of a data set."""
    return as_dict(_Data(dataset.name, dataset.fingerprint, dataset.shape, len(dataset.classes)))


def read_preprocessing(folder: Path, shape: tuple[int, int, int]) -> Preprocessing:
    """The map from pixels to network input that the experts in `folder` see, for images of `shape`."""
    path = folder / PREPROCESSING
    with as_user_error(path, "a map from pixels to network input"):
        return preprocessing_from(read_tensors(path, "preprocessing")[0], shape)


def expert_path(folder: Path, expert: int) -> Path:
    """File of an expert's trajectory."""
    return folder / f"expert-{expert:03d}.safetensors"


def write_trajectory(
    path: Path, network: Network, snapshots: list[Float[Tensor, " p"]], record: dict[str, Any]
) -> None:
    """Write the parameter vectors of epochs 0 … T as one stacked tensor a parameter.

    The header holds `record` and a digest of each vector, which whoever reads it checks.
    """
    stacked = {name: torch.stack([unflatten(network, theta)[name] for theta in snapshots]) for name in network.shapes}
    vectors = [tensor_digest(theta) for theta in snapshots]
    write_tensors(path, stacked, "expert", {"record": record, "vectors": vectors}, digests=False)


class Buffer:
    """The trajectories in a folder. Opening it reads only `buffer.json` and the preprocessing."""

    def __init__(self, folder: Path, *, convex: bool = False) -> None:
        """Open the buffer in `folder`; with `convex`, its trajectories are straightened.

        They then have a point for every real epoch t from 0 to T, as MCT does it (Zhong et al. 2025):
        θ(t) = θ*_0 + f(t) (θ*_T − θ*_0), where f is, for each tensor of the network, the fraction of its way that the
        expert has gone by t: the length of its steps up to there over the length of all, linear between epochs.

        Raises:
            UserError: no buffer there, a damaged one, or one whose experts are not all trained.
        """
        if not (folder / "buffer.json").exists():
            raise UserError(f"{folder} holds no buffer; train one with `cddlib buffer --out {folder}`.")
        self.folder, self.convex, manifest = folder, convex, read_json(folder / "buffer.json")
        with as_user_error(folder / "buffer.json", "a buffer's description"):
            self.config: dict[str, Any] = {**as_dict(BufferConfig()), **manifest["config"]}  # older ones say less
            self.data: dict[str, Any] = manifest["data"]
            self.experts: list[dict[str, Any]] = [{**expert} for expert in manifest["experts"]]
            network, data = from_dict(BufferConfig, self.config).network, from_dict(_Data, self.data)
            self.network = build_network(network, data.shape, data.classes)
            self.epochs: int = self.config["epochs"]
        if len(self.experts) < self.config["experts"]:
            raise UserError(f"{folder} lacks some of its experts; run the same `cddlib buffer` again to finish.")
        self.id = config_hash(manifest)
        self._sizes = [math.prod(shape) for shape in self.network.shapes.values()]
        self._files: dict[int, tuple[Any, list[Any]]] = {}
        self._straightened: dict[int, tuple[Tensor, Tensor, Float[Tensor, "epochs tensors"]]] = {}
        self._on_gpu: dict[tuple[torch.device, int, int | float], Float[Tensor, " p"]] = {}

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        """The map from pixels to network input that the experts saw."""
        channels, height, width = self.data["shape"]
        return read_preprocessing(self.folder, (channels, height, width))

    def check_data(self, dataset: Dataset) -> None:
        """Raise `UserError` unless the experts were trained on `dataset`."""
        theirs, this = f"{self.data['name']} ({self.data['fingerprint']})", f"{dataset.name} ({dataset.fingerprint})"
        if theirs != this:
            raise UserError(f"{self.folder} holds experts of {theirs}, not of {this}.")

    def check_expert(self, name: str, expert: int) -> None:
        """Raise `UserError` unless there is an expert of the number that the field `name` gives."""
        if not 0 <= expert < len(self.experts):
            raise UserError(f"{name} is {expert}, but {self.folder} holds experts 0 to {len(self.experts) - 1}.")

    def parameters(self, expert: int, epoch: int | float) -> Float[Tensor, " p"]:
        """θ*_epoch of `expert`, on the CPU; reads nothing else. An epoch that is not whole needs `convex`."""
        if not self.convex or not 0 <= epoch <= self.epochs:
            return self._stored(expert, epoch)
        if expert not in self._straightened:
            first, last = (self._stored(expert, end) for end in (0, self.epochs))
            self._straightened[expert] = first, last - first, self._travelled(expert)
        first, way, travelled = self._straightened[expert]
        before = min(int(epoch), self.epochs - 1)
        earlier, later = travelled[before : before + 2]
        return first + earlier.lerp(later, epoch - before).repeat_interleave(torch.tensor(self._sizes)) * way

    def _travelled(self, expert: int) -> Float[Tensor, "epochs tensors"]:
        """The fraction of its way that each tensor has gone at epochs 0 … T; 1 for a tensor that stands still."""
        path = torch.stack([self._stored(expert, epoch) for epoch in range(self.epochs + 1)])
        steps = torch.stack([tensor.norm(dim=1) for tensor in path.diff(dim=0).split(self._sizes, dim=1)], 1)
        way = torch.cat([torch.zeros_like(steps[:1]), steps.cumsum(0)])
        return torch.where(way[-1] > 0, way / way[-1], 1.0)

    def _stored(self, expert: int, epoch: int | float) -> Float[Tensor, " p"]:
        """θ*_epoch as its file has it."""
        path = expert_path(self.folder, expert)
        if expert not in self._files:
            self._files[expert] = self._open(expert, path)
        file, vectors = self._files[expert]
        if not 0 <= epoch <= self.epochs:
            raise UserError(f"{path} does not fit buffer.json: epoch {epoch} of {self.epochs} cannot be read.")
        theta = torch.cat([file.get_slice(name)[epoch].flatten() for name in self.network.shapes])
        if tensor_digest(theta) != vectors[int(epoch)]:
            raise UserError(f"{path} is damaged: epoch {epoch} does not have the digest that its header names.")
        if not bool(theta.isfinite().all()):
            raise Diverged(f"{path} holds parameters that are not finite at epoch {epoch}; train this expert anew.")
        return theta

    def parameters_on(self, device: torch.device, expert: int, epoch: int | float) -> Float[Tensor, " p"]:
        """θ*_epoch of `expert` on `device`.

        A GPU keeps the vectors, while they take a quarter of what is free, if they are not straightened: of those
        hardly one is asked for twice.
        """
        key = device, expert, epoch
        if key in self._on_gpu:
            return self._on_gpu[key]
        theta = self.parameters(expert, epoch).to(device)
        if device.type != "cuda" or self.convex:
            return theta
        if (len(self._on_gpu) + 1) * theta.nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
            self._on_gpu[key] = theta
        return theta

    def _open(self, expert: int, path: Path) -> tuple[Any, list[Any]]:
        """The expert's file, and the digests of its vectors; refuses a file that `buffer.json` does not describe."""
        file = open_tensors(path)
        header, known = read_header(file, path, "expert"), self.experts[expert]
        record, vectors = header.get("record"), header.get("vectors")
        if not isinstance(record, dict) or any(known.get(key) != value for key, value in record.items()):
            raise UserError(f"{path} is not the expert that {self.folder / 'buffer.json'} describes.")
        wanted = {name: ("F32", [self.epochs + 1, *shape]) for name, shape in self.network.shapes.items()}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        found = {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in slices.items()}
        if found != wanted or not isinstance(vectors, list) or len(vectors) != self.epochs + 1:
            raise UserError(f"{path} does not fit buffer.json: it has not {self.epochs + 1} vectors of its network.")
        return file, vectors


def read_expert_record(path: Path) -> dict[str, Any]:
    """The `record` that `write_trajectory` was given."""
    return read_header(open_tensors(path), path, "expert")["record"]
