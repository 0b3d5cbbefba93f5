"""Files: written whole or not at all, and any damage to them is told."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cddbook import records
from cddlib.runtime import files
from cddlib.runtime.errors import UserError


def write_half_then(error: BaseException) -> Callable[[Path], None]:
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    return write


# --- Writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("now")])
def test_failing_writer_leaves_the_old_file_and_no_temporary(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(type(error), match=str(error)):
        files.write_atomically(path, write_half_then(error))
    assert files.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_replaces_the_file_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.json"
    for value in ({"x": 1}, {"x": 2}):
        files.write_json(path, value)
        assert files.read_json(path) == value
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_whole_before_it_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a"
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_text("whole")
        seen.append((path.exists(), temporary.parent))

    files.write_atomically(path, write)
    assert seen == [(False, tmp_path / ".a.tmp")]  # below the same folder, so that renaming is atomic
    assert path.read_text() == "whole"


def test_an_error_of_safetensors_in_writing_is_an_oserror_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors: full"):
        files.write_atomically(tmp_path / "a.safetensors", write_half_then(SafetensorError("full")))
    assert list(tmp_path.iterdir()) == []


# --- Checksums --------------------------------------------------------------------------------------------------

values = st.dictionaries(
    st.text(max_size=5).filter(lambda key: key != files.CHECKSUM),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


@hypothesis.given(value=values)
def test_what_is_sealed_comes_back(value: dict[str, Any]) -> None:
    sealed = files.add_checksum(value)
    assert sealed.keys() - value.keys() == {"checksum"}
    shuffled = dict(reversed(sealed.items()))
    for text in (json.dumps(sealed), json.dumps(shuffled, indent=3), json.dumps(sealed).encode()):
        assert files.verify_checksum(text, "it") == value


@hypothesis.given(value=values, position=st.integers(0, 2**20), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_changes_nothing(value: dict[str, Any], position: int, bit: int) -> None:
    text = bytearray(json.dumps(files.add_checksum(value)).encode())
    text[position % len(text)] ^= 1 << bit
    try:
        found = files.verify_checksum(bytes(text), "it")
    except UserError as error:
        assert str(error).startswith(("it is damaged: ", "it has no checksum: ", "it cannot be read as JSON: "))
    else:  # 1e5 is 1E5, and a space is a tab
        assert json.dumps(found, sort_keys=True) == json.dumps(value, sort_keys=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "it has no checksum: it is damaged, or another program wrote it."),
        ("[1]", "it has no checksum: it is damaged, or another program wrote it."),
        ('{"a": 1, "checksum": "0123456789abcdef"}', "it is damaged: its contents do not have the checksum that it"),
        ('{"a": 1, "checksum": 3}', "it is damaged: its contents do not have the checksum that it names."),
        ('{"a": ', "it cannot be read as JSON: "),
        ("[" * 10**5, "it cannot be read as JSON: "),
        (b"\xff\xfe\x00", "it cannot be read as JSON: "),
    ],
)
def test_what_was_never_sealed_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(UserError) as refused:
        files.verify_checksum(text, "it")
    assert str(refused.value).startswith(message)


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.file_digest(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_a_tensors_digest_is_that_of_its_numbers() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert files.tensor_digest(matrix.T.T) == files.tensor_digest(matrix.requires_grad_())
    others = [matrix.T, matrix + 1, matrix.double(), -matrix]
    assert files.tensor_digest(matrix) not in map(files.tensor_digest, others)
    assert files.tensor_digest(torch.tensor(0.0)) != files.tensor_digest(torch.tensor(-0.0))
    assert files.tensor_digest(torch.tensor([0x61, 0x62, 0x63], dtype=torch.uint8)) == "ba7816bf8f01cfea"


# --- JSON -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [files.read_json, files.open_tensors, records.read_record])
def test_a_missing_file_is_named(tmp_path: Path, read) -> None:
    with pytest.raises(UserError, match=r"none\.x does not exist\.$"):
        read(tmp_path / "none.x")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00", None])
@pytest.mark.parametrize("read", [files.read_json, records.read_record])
def test_broken_json_is_named(tmp_path: Path, content: bytes | None, read) -> None:
    path = tmp_path / "a.json"
    path.mkdir() if content is None else path.write_bytes(content)
    reason = "cannot be read: Is a directory" if content is None else "cannot be read as JSON: "
    with pytest.raises(UserError, match=rf"a\.json {reason}"):
        read(path)


def test_json_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(files.LARGEST_JSON + 1)  # takes no room on disk
    with pytest.raises(UserError, match=r"a\.json has 67108865 bytes; JSON files of cddlib have at most 67108864\.$"):
        files.read_json(path)


def test_records_are_plain_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "book" / "results"
    for indent, text in ((1, '{\n "x": [\n  1\n ]\n}\n'), (None, '{"x": [1]}\n')):
        records.write_record(folder / "r.json", {"x": [1]}, indent=indent)
        assert (folder / "r.json").read_text() == text
        assert records.read_record(folder / "r.json") == {"x": [1]}
    (tmp_path / "notebooks").mkdir()
    for place in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(place)
        assert records.read_record("r") == {"x": [1]}
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"book/results is not in .* or above it; run the notebook inside the reposit"):
        records.read_record("r")


# --- Tensors ----------------------------------------------------------------------------------------------------

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


def test_writing_twice_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    tensors, header = files.read_tensors(written, "thing")
    for number in range(5):
        files.write_tensors(tmp_path / "again", dict(sorted(tensors.items(), reverse=number % 2 > 0)), "thing", header)
        assert files.read_tensors(tmp_path / "again", "thing")[1] == header
        found = files.open_tensors(tmp_path / "again").metadata()
        assert found.keys() == {"thing"}
    assert (tmp_path / "again").stat().st_size == written.stat().st_size


def test_files_that_are_no_safetensors_are_named(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    for content in (b"", b"garbage" * 99, whole[:-1], whole + b"x", None):
        path = tmp_path / "b.safetensors"
        path.mkdir() if content is None else path.write_bytes(content)
        for read in (files.open_tensors, lambda path: files.read_tensors(path, "thing")):
            with pytest.raises(UserError, match=r"b\.safetensors is truncated or not a safetensors file \("):
                read(path)
        path.rmdir() if content is None else path.unlink()


def test_another_kind_of_file_is_named(written: Path) -> None:
    with pytest.raises(UserError) as refused:
        files.read_tensors(written, "other")
    assert str(refused.value) == (
        f"{written} has no 'other' in its header: it is damaged, or another program wrote it."
    )


HEADER = files.add_checksum({"digests": {"a": files.signature(MATRIX)}})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({**HEADER, "more": 1}, "the header of PATH is damaged: its contents do not have the checksum that it names."),
        ({"digests": {}}, "the header of PATH has no checksum: it is damaged, or another program wrote it."),
        (files.add_checksum({}), "PATH is damaged: it does not hold the tensors that its header names."),
        (files.add_checksum({"digests": 1}), "PATH is damaged: it does not hold the tensors that its header names."),
        (files.add_checksum({"digests": {}}), "PATH is damaged: it does not hold the tensors that its header names."),
        (
            files.add_checksum({"digests": {"a": "0" * 16, "b": ""}}),
            "PATH is damaged: it does not hold the tensors that its header names.",
        ),
        *(
            (
                files.add_checksum({"digests": {"a": digest}}),
                "PATH is damaged: a does not have the digest that the header names.",
            )
            for digest in map(files.signature, (MATRIX + 1, MATRIX.reshape(3, 2), MATRIX.view(torch.int32)))
        ),
    ],
)
def test_a_header_that_does_not_fit_is_named(tmp_path: Path, header: dict[str, Any], message: str) -> None:
    path = tmp_path / "a"
    save_file({"a": MATRIX}, path, metadata={"thing": json.dumps(HEADER)})
    assert torch.equal(files.read_tensors(path, "thing")[0]["a"], MATRIX)
    save_file({"a": MATRIX}, path, metadata={"thing": json.dumps(header)})
    with pytest.raises(UserError) as refused:
        files.read_tensors(path, "thing")
    assert str(refused.value) == message.replace("PATH", str(path))


def test_a_flipped_bit_in_any_byte_is_noticed(written: Path) -> None:
    whole = written.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        written.write_bytes(damaged)
        with pytest.raises(UserError, match=str(written)):
            files.read_tensors(written, "thing")


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_needs_no_second_file_where_there_are_links(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: Path) -> None:
        raise OSError("another file system")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    source, goal = tmp_path / "source", tmp_path / "goal"
    source.write_bytes(b"matrices")
    files.link_or_copy(source, goal)
    assert goal.read_bytes() == b"matrices"
    assert goal.samefile(source) == links
