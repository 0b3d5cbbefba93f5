"""A synthetic set for others: folders of pictures, Parquet files for Hugging Face."""

import io
import json
import re
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from cddlib.runtime.errors import UserError, needing
from cddlib.runtime.files import whole_folder, write_atomically
from cddlib.synthetic import SyntheticSet


def _pngs(synthetic: SyntheticSet) -> list[bytes]:
    """Each image as a PNG file."""
    from torchvision.transforms.v2.functional import to_pil_image

    levels: UInt8[Tensor, "n c h w"] = (synthetic.pictures() * 255).round().to(torch.uint8).cpu()
    files = []
    for image in levels:
        file = io.BytesIO()
        to_pil_image(image).save(file, format="PNG")
        files.append(file.getvalue())
    return files


def export_png(synthetic: SyntheticSet, folder: Path) -> list[Path]:
    """Write one PNG an image, in a folder a class (torchvision's `ImageFolder`), and return the classes' folders.

    Folders have the classes' names, or ``07_name`` if the names would sort into another order or are no file names,
    so `ImageFolder` numbers the classes as the set does. Whitening or normalisation is undone. What a picture cannot
    hold is lost, and training on it gives another accuracy. Values are clipped to black and white and rounded to
    8 bits, where distilled images reach far beyond and live from small differences; soft labels and the step size
    are gone.

    Raises:
        UserError: `folder` is not empty.
    """
    names = _folder_names(synthetic.classes)
    seen = [0] * len(names)
    with whole_folder(folder) as temporary:
        for name in names:
            (temporary / name).mkdir()
        for label, png in zip(synthetic.labels.tolist(), _pngs(synthetic), strict=True):
            (temporary / names[label] / f"{seen[label]:05d}.png").write_bytes(png)
            seen[label] += 1
    return [folder / name for name in names]


def _folder_names(classes: tuple[str, ...]) -> list[str]:
    """One safe file name a class, in sorted order."""
    safe = [re.sub(r"[^\w.-]", "_", name)[:60] for name in classes]
    unchanged = safe == list(classes) and all(re.match(r"\w", name) for name in safe)
    if unchanged and sorted(safe) == safe and len({name.casefold() for name in safe}) == len(safe):
        return safe
    digits = len(str(len(safe) - 1))
    return [f"{index:0{digits}d}_{name}" for index, name in enumerate(safe)]


def export_parquet(synthetic: SyntheticSet, path: Path) -> Path:
    """Write the set as a Parquet file for Hugging Face, and return its path.

    ``datasets.load_dataset("parquet", data_files=...)`` gives the columns `image` (PNG, with the losses of
    `export_png`), `label` (a ClassLabel with names) and `soft_label` (C float32 probabilities). The step size is in
    the schema's metadata, under `cddlib`.

    Raises:
        UserError: `path` exists, or pyarrow is not installed.
    """
    if path.exists():
        raise UserError(f"{path} exists; choose another file.")
    with needing("form 'parquet'", "pyarrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    classes = len(synthetic.classes)
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(synthetic.classes), "_type": "ClassLabel"},
        # since datasets 4 a List, but it reads the older name too
        "soft_label": {"feature": {"dtype": "float32", "_type": "Value"}, "length": classes, "_type": "Sequence"},
    }
    columns = {
        "image": pa.array(
            [{"bytes": png, "path": None} for png in _pngs(synthetic)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "label": pa.array(synthetic.labels.tolist(), pa.int64()),
        "soft_label": pa.array(synthetic.targets().tolist(), pa.list_(pa.float32(), classes)),
    }
    metadata = {
        "huggingface": json.dumps({"info": {"features": features}}),
        "cddlib": json.dumps({"step_size": synthetic.step_size.item()}),
    }
    table = pa.table(columns).replace_schema_metadata(metadata)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))
    return path
