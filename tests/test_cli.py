"""The command line: help, sentences instead of tracebacks, and the whole way from a buffer to a record."""

import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from children import exit_code as run

import cddbook.__main__ as studies
import cddlib
from cddlib import cli, commands
from cddlib.experts.buffer import Buffer
from cddlib.runtime import files
from cddlib.runtime.run_folder import read_metrics


def options(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `--help` says after these arguments."""
    assert run(*arguments, "--help") == 0
    return capsys.readouterr().out


COMMANDS = [*cli._commands([]), *studies._commands([])]


def test_help_names_every_command(capsys) -> None:
    out = options(capsys)
    assert all(f" {command} " in out for command in cli._commands([]))


GROUPS = {
    "distill": {"schedule", "student", "synthetic", "optimizer", "evaluation", "network", "data", "compute"},
    "buffer": {"sharpness", "curriculum", "data", "network", "augmentation", "compute"},
    "compare": {"schedule", "student", "synthetic", "optimizer"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_flat_and_each_is_one_in_its_group(capsys, command: str) -> None:
    out = options(capsys, command)
    flags = re.findall(r"^[│ ] (--\w\S+?),? ", out, re.MULTILINE)
    assert len(flags) == len(set(flags)) >= 1
    assert not [flag for flag in flags if "." in flag]
    found = re.findall(r"^\W*(\S+) options ", out, re.MULTILINE)
    assert GROUPS.get(command, set()) <= {name.split(".")[-1] for name in found}


CIFAR = ["--data", "cifar10", "--ipc", "50"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["buffer"], ["--out", "--experts", "--epochs", "--holdout", "--zca", "(default: 5)", "default: auto"]),
        (["buffer", "--data", "cifar10"], ["(default: 100)"]),
        (["distill"], ["--buffer", "--segments", "--window-end", "--ipc", "--seed", "(default: 100)"]),
        *(
            ([command, *CIFAR], ["(default: 40)", "(default: 10000)"])
            for command in ("distill", "correlate", "compare")
        ),
        (["import-buffer"], ["holdout", "(default: False)"]),
        (["correlate"], ["--replicates", "--jobs", "--probe-starts", "--buffer", "(default: 100)"]),
        (["compare"], ["--what", "{segments,remedies}", "--counts", "--seeds", "--networks", "(default: 1 2 4 8)"]),
    ],
)
def test_help_shows_the_recipes_defaults(capsys, arguments: list[str], words: list[str]) -> None:
    out = " ".join(options(capsys, *arguments).split())
    assert [word for word in words if word not in out] == []


OUT = ["--out", "OUT"]
BOTH = ["--buffer", "BUFFER", "--out", "OUT", "--device", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["buffer", "--data", "cifar10", "--root", "OUT", *OUT], "run `cddlib data cifar10 --root "),
        (["buffer"], "--out PATH"),
        (["distill", "--buffer", "OUT/none", "--out", "OUT"], "none holds no buffer; train one with `cddlib buffer"),
        (["distill", *OUT], "--buffer PATH"),
        (["distill", "--segments", "two", *BOTH], "Error parsing --segments: 'two' is not a whole number"),
        (["distill", "--lr-images", "fast", *BOTH], "Error parsing --lr-images: 'fast' is not a number"),
        (["distill", *BOTH[:2], "--out", "FILE"], "is not a folder, or lies in a file; choose another place."),
        (["distill", *BOTH[:2], "--out", "FILE/run"], "is not a folder, or lies in a file; choose another place."),
        (["data", "cifar10", "--root", "FILE"], "is not a folder, or lies in a file; choose another place."),
        (["buffer", "--data", "cifar10", "--root", "FILE", *OUT], "which is a file; it must be the folder of the data"),
        (["distill", "--init", "zeros", *BOTH], "zeros"),
        (["compare", "--window-end", "4", "--what", "nothing", *BOTH], "nothing"),
        (["evaluate", "BEGUN"], "is not finished; its `cddlib distill` command goes on with it."),
        (["verify", "BEGUN", "--buffer", "BUFFER"], "is not finished; its `cddlib distill` command goes on with it."),
        (["record", "OUT", "--to", "OUT/r.json"], "holds no finished run: result.json is missing."),
        (["record", "OUT", "--to", "FILE"], "cannot be read as JSON"),
        (["record", "OUT", "--to", "BEGUN/other.json"], "other.json exists and is not a record of a run; choose ano"),
        (["distil", *BOTH], "there is no command 'distil'; did you mean distill?"),
        (["train"], "there is no command 'train'; did you mean data, recipes, plan, buffer, distill, "),
        (["buffer", "--colour", "1", *OUT], "--colour"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(buffer: Buffer, tmp_path: Path, capsys, arguments, message) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "begun").mkdir()
    files.write_json(tmp_path / "begun" / "config.json", {"method": "mtt"})
    (tmp_path / "begun" / "other.json").write_text("[]")
    places = {"OUT": tmp_path / "out", "BUFFER": buffer.folder, "OUT/none": tmp_path / "none"}
    places |= {"FILE": tmp_path / "file", "FILE/run": tmp_path / "file" / "run"}
    places |= {"BEGUN": tmp_path / "begun", "BEGUN/other.json": tmp_path / "begun" / "other.json"}
    assert run(*(str(places.get(argument, argument)) for argument in arguments)) not in (0, None)
    out, err = capsys.readouterr()
    assert message in " ".join(err.replace("│", " ").split())  # the parser's messages have a frame and line breaks
    assert out == "" and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_interruption_says_how_to_go_on(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(commands, "train_buffer", Mock(side_effect=KeyboardInterrupt))
    assert run("buffer", "--out", tmp_path) == 130
    assert capsys.readouterr().err == "\ncddlib: interrupted; the same command resumes.\n"


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    script = Path(sys.executable).with_name("cddlib")
    with subprocess.Popen([script, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # long before anything is printed
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_the_window_ends_where_short_experts_do(buffer: Buffer, capsys) -> None:
    said = "The window ends at epoch 5, because the experts stop at epoch 6.\n"
    for given, windows, words in (
        ({}, (5, None), said),
        ({"method": "datm", "data": "cifar10", "ipc": 50}, (5, 5), said),
        ({"window_end": 4}, (4, None), ""),
        ({"method": "datm", "data": "cifar10"}, (4, None), ""),
        ({"expert_epochs": 4, "segments": 2}, (3, None), said.replace("5", "3")),
        ({"convex": True}, (4, None), said.replace("5", "4")),
        ({"window_start": 3, "segments": 2}, (5, None), said),
    ):
        words_of = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in given.items()]
        chosen = cli.recipe_choices(["--buffer", str(buffer.folder), *itertools.chain(*words_of)])
        assert chosen == {"buffer": buffer.folder, **given}
        schedule = cli.chosen_recipe(chosen).schedule
        assert (schedule.window_end, schedule.window_end_initial) == windows
        assert capsys.readouterr().err == words


TINY = ["--experts", "1", "--epochs", "4", "--width", "8", "--device", "cpu"]
SHORT = ["--iterations", "2", "--student-steps", "3", "--window-end", "3", "--segments", "2"]
SHORT += ["--evaluation-epochs", "2"]


def test_the_whole_way_with_whitening_taken_from_the_buffer(tmp_path: Path, capsys) -> None:
    buffer, out, record = tmp_path / "buffer", tmp_path / "run", tmp_path / "record.json"
    assert run("buffer", *TINY, "--zca", "--augment", "flip", "--out", buffer) == 0
    assert capsys.readouterr().out.startswith("1 experts of 4 epochs and ")
    assert run("distill", *SHORT, "--buffer", buffer, "--out", out, "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert said.startswith("contra, K = 2, 1 images per class: iteration ")
    assert str(out / "synthetic.safetensors") in said
    config = files.read_json(out / "config.json")
    assert (config["zca"], config["width"], config["augment"]) == (True, 8, "flip")
    tensors = cddlib.SyntheticSet.load(out / "synthetic.safetensors").preprocessing.tensors()
    assert "eigenvalues" in tensors
    assert run("evaluate", out, "--runs", "2", "--device", "cpu") == 0
    *lines, by_class = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"synthetic, by class {2}from \d+\.\d % \(\d\) to \d+\.\d % \(\d\)", by_class)
    assert [line[:20].strip() for line in lines] == ["synthetic set", "random real images", "all training images"]
    assert all("±" in line and line.endswith("% (2 networks)") for line in lines)
    assert run("record", out, "--to", record) == 0
    found = json.loads(record.read_text())
    assert found.keys() == {"config", "result", "metrics", "evaluations"}
    assert (found["config"], found["metrics"], len(found["evaluations"])) == (config, read_metrics(out), 1)
    assert run("record", buffer, "--to", record) == 0
    assert json.loads(record.read_text()).keys() == {"buffer", "result"}


def test_options_override_the_recipe_of_method_and_data(buffer: Buffer, tmp_path: Path, monkeypatch) -> None:
    distill = Mock(side_effect=cddlib.UserError("that is enough"))
    monkeypatch.setattr(commands, "distill", distill)
    options = ["--method", "mtt", "--ipc", "7", "--lr-images", "5", "--window-end", "3", "--no-zca"]
    assert run("distill", *options, "--buffer", buffer.folder, "--out", tmp_path) == 1
    assert distill.call_args.args[0] == cddlib.distill_recipe("mtt", "digits", 7, lr_images=5.0, window_end=3, width=8)
