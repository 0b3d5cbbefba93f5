"""Distilled sets that are committed: those of the first seed of comparisons on CIFAR-10, and their start."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from cddbook.figures.style import pictures
from cddbook.findings import runs_of
from cddbook.records import RESULTS, read_record
from cddbook.tables import mean_sd


def committed_sets(study: str) -> dict[int, tuple[Figure, str]]:
    """For each K a picture of its set, and how accurate networks are that were trained on it; random real ones at 0."""
    tests = {run.config["segments"]: run.own for run in runs_of(read_record(study)) if run.seed == 0}
    sets = [(0, "start", "Random real images", "such sets, each drawn anew,", tests[1]["random_real"])]
    sets += [(k, f"k{k}", f"K = {k}: distilled images", "them", test["synthetic"]) for k, test in tests.items()]
    found = {}
    for k, name, what, them, accuracies in sets:
        tested = f"{mean_sd(accuracies, scale=100.0)} % of the test images ({len(accuracies)} networks)."
        words = f"{what} of CIFAR-10, one a class. Networks trained on {them} recognise {tested}"
        found[k] = _picture(RESULTS / "sets" / study / f"{name}.parquet"), words
    return found


def sets_page(sets: Mapping[int, tuple[Figure, str]]) -> str:
    """The pictures as figures in MyST, whose files are called `set-K.png`."""
    blocks = [f"```{{figure}} set-{k}.png\n:alt: {words}\n\n{words}\n```" for k, (_, words) in sets.items()]
    return "\n\n".join(blocks)


def _picture(file: Path) -> Figure:
    """The images of a set that `cddlib export` wrote as Parquet."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file)
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    images = [pil_to_tensor(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()]
    return pictures(torch.stack(images) / 255, [names[label] for label in table["label"].to_pylist()])
