"""Files: written whole or not at all, and any damage to them is told."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from works import refusal

from cddlib.runtime import files
from cddlib.runtime.errors import UserError


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError("disk full"), OSError, "disk full"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (SafetensorError("full"), OSError, r"cannot write .*a\.json: full"),
    ],
)
def test_a_failing_writer_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, error: BaseException, raised: type[BaseException], message: str
) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def write_half(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(raised, match=message):
        files.write_atomically(path, write_half)
    assert files.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


UNSEALED = "it does not have the checksum of its contents: it is damaged, or of another program."
UNREADABLE = ('{"a": ', "[" * 10**5, b"\xff\xfe\x00")


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", '{"a": 1, "checksum": "0123456789abcdef"}', *UNREADABLE])
def test_what_has_no_right_checksum_is_refused(text: str | bytes) -> None:
    said = "it cannot be read as JSON: " if text in UNREADABLE else UNSEALED
    assert refusal(files.verify_checksum, text, "it").startswith(said)


def test_digests_are_of_bytes_and_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.file_digest(tmp_path / "a").startswith("ba7816bf8f01cfea")
    assert files.tensor_digest(torch.tensor([0x61, 0x62, 0x63], dtype=torch.uint8)) == "ba7816bf8f01cfea"
    matrix = torch.arange(6.0).reshape(2, 3)
    assert files.tensor_digest(matrix.T.T) == files.tensor_digest(matrix.requires_grad_())
    assert files.tensor_digest(matrix) not in map(files.tensor_digest, [matrix.T, matrix + 1, matrix.double(), -matrix])
    assert files.tensor_digest(torch.tensor(0.0)) != files.tensor_digest(torch.tensor(-0.0))


@pytest.mark.parametrize("read", [files.read_json, files.open_tensors])
def test_a_missing_file_is_named(tmp_path: Path, read) -> None:
    with pytest.raises(UserError, match=r"none\.x does not exist\.$"):
        read(tmp_path / "none.x")
    with pytest.raises(UserError, match=f"{tmp_path} is not a file"):
        read(tmp_path)


MATRIX = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    tensors = {"transposed": MATRIX.T.clone().requires_grad_(), "none": torch.zeros(0, 2), "one": torch.tensor(3)}
    files.write_tensors(path, tensors, "thing", {"classes": ["α", "b"]})
    return path


def test_tensors_and_header_come_back(written: Path) -> None:
    tensors, header = files.read_tensors(written, "thing")
    assert header == {"classes": ["α", "b"]}
    assert tensors.keys() == {"transposed", "none", "one"}
    assert torch.equal(tensors["transposed"], MATRIX.T)
    assert (tensors["none"].shape, tensors["one"].item()) == ((0, 2), 3)


def test_another_kind_of_file_is_named(written: Path) -> None:
    said = f"{written} has no 'other' in its header: it is damaged, or another program wrote it."
    assert refusal(files.read_tensors, written, "other") == said


def test_a_header_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path, good = tmp_path / "a", files.signature(MATRIX)

    def save(header: dict[str, Any]) -> None:
        save_file({"a": MATRIX}, path, metadata={"thing": json.dumps(header)})

    save(files.add_checksum({"digests": {"a": good}}))
    assert torch.equal(files.read_tensors(path, "thing")[0]["a"], MATRIX)
    save({"digests": {"a": good}})
    with pytest.raises(UserError, match=f"^the header of {path} does not have the checksum of its contents: "):
        files.read_tensors(path, "thing")
    others = [{"a": files.signature(t)} for t in (MATRIX + 1, MATRIX.reshape(3, 2), MATRIX.view(torch.int32))]
    for digests in (1, {}, None, {"a": good, "b": ""}, *others):
        save(files.add_checksum({"digests": digests}))
        said = f"{path} is damaged: its tensors do not have the digests that its header names."
        assert refusal(files.read_tensors, path, "thing") == said


def test_a_second_name_needs_no_second_file_where_there_are_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"matrices")
    files.link_or_copy(source, tmp_path / "link")
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError("another file system")))
    files.link_or_copy(source, tmp_path / "copy")
    assert (tmp_path / "link").samefile(source) and not (tmp_path / "copy").samefile(source)
    assert (tmp_path / "copy").read_bytes() == b"matrices"
