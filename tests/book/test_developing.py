"""The page for developers names files that exist, and its code runs."""

import re
from pathlib import Path

import cddlib
from cddlib.runtime.files import read_json
from cddlib.runtime.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "book" / "developing.md").read_text()


def test_every_file_that_it_names_is_there() -> None:
    files = re.findall(r"`((?:cddlib|book)/[\w/]+\.py)`", PAGE)
    assert len(set(files)) >= 11
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_its_code_runs_and_its_hook_writes_a_number(buffer: cddlib.Buffer, quick: dict, tmp_path: Path) -> None:
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    config = cddlib.distill_recipe("contra", "digits", **quick, segments=2)
    cddlib.distill(config, buffer, tmp_path, hooks=names["hooks"], device="cpu")
    assert [line["iteration"] for line in read_metrics(tmp_path) if "contrast" in line] == [0, 5, 6]
    assert read_json(tmp_path / "config.json")["contrast_every"] == 5
    assert list((tmp_path / "tensorboard").glob("events*"))
