"""The model of scaling against numbers by hand; and the syntax of the book's cluster examples."""

import itertools
import json
import math
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scaling
import torch
import yaml
from scaling import Link, Parts, Work, all_reduce, fit_link, gradient_bytes, iteration, operations
from torch.distributed.run import get_args_parser

import cddlib
from cddlib import cli
from cddlib.distillation.gradient import concurrent_gradient
from cddlib.synthetic import initialise

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "book" / "examples"
FREE = Link(0.0, math.inf)

# --- The model --------------------------------------------------------------------------------------------------


def test_an_iteration_by_hand() -> None:
    """Ten segments on four devices: three, three, two, two."""
    parts = iteration(Work(segments=10, segment=2.0, size=4000, draw=0.1, alone=0.5), 4, Link(0.01, 1000.0))
    assert parts == Parts(compute=5.0, idle=1.0, slowest=0.0, communication=pytest.approx(6 * (0.01 + 1.0)), alone=1.5)
    assert parts.binds == "communication"
    work = Work(segments=72, segment=1.0)
    assert [iteration(work, count, FREE).binds for count in (72, 80)] == ["compute", "idle"]
    assert iteration(work._replace(segment_spread=0.1), 72, FREE).binds == "slowest"
    assert iteration(work._replace(alone=8.0), 72, FREE).binds == "alone"
    even = Work(segments=8, segment=0.5, segment_spread=0.1, device_spread=0.2)
    one = 0.5 * math.hypot(0.1 * 2, 0.2 * 4)  # of four segments' time; of two, the larger is a σ/√π above the mean
    assert iteration(even, 2, FREE).slowest == pytest.approx(one / math.pi**0.5, rel=0.02)


@pytest.mark.parametrize("link", [Link(1e-4, 1e9), Link(1e-6, 1e12)])
def test_the_fitted_link_is_the_one_that_took_the_times(link: Link) -> None:
    where = [(1, 2), (10**4, 4), (10**8, 2), (10**8, 64)]
    assert fit_link([(*each, all_reduce(*each, link)) for each in where]) == pytest.approx(link)


def test_operations_are_those_of_the_plan() -> None:
    """80 steps of 1000 images, of which a step of a student needs 1.194e9 each."""
    config = cddlib.distill_recipe("datm", "cifar100", 50, segments=8)
    for experts in (1, 3):
        assert operations(cddlib.replace(config, concurrent_experts=experts)) == (80 * 1000 * 1_194_000_384, 0)
    taught = cddlib.distill_recipe("tesla", "imagenet", 1, segments=2)
    (segment, beside), (untaught, nothing) = operations(taught), operations(cddlib.replace(taught, labels="hard"))
    assert (beside, nothing) == (segment - untaught, 0)  # a teacher labels all for every segment, and once more
    assert beside > 1000 * 1e8  # a thousand images


def test_bytes_are_those_of_the_variables_and_of_every_segment_where_weights_need_them() -> None:
    config = cddlib.distill_recipe("mtt", "cifar100", 10, segments=4, replay=1)
    alone = 4 * (1000 * 3072 + 1)
    assert gradient_bytes(config) == alone
    assert gradient_bytes(cddlib.replace(config, concurrent_experts=2, combine="mgda")) == 9 * alone
    assert gradient_bytes(cddlib.replace(config, labels="learned")) == alone + 4 * 1000 * 100


@pytest.mark.parametrize("segments", [0, 1])
def test_a_process_apart_works_on_its_segments(segments: int, buffer: cddlib.Buffer, recipe: Any) -> None:
    config = recipe(segments=3)
    synthetic = initialise(config.synthetic, cddlib.load("digits"), buffer, 0, torch.device("cpu"))
    _, record = concurrent_gradient(config, buffer, synthetic, 1, scaling.apart(segments))
    assert [loss > 0 for loss in record["losses"]] == [number < segments for number in range(3)]


def test_the_committed_curves_are_the_model_s() -> None:
    record = json.loads((ROOT / "book" / "results" / "scaling.json").read_text())
    found = scaling.model(record["assumptions"]["draw_seconds"]["value"])
    for row, wanted in zip(found, record["model"], strict=True):
        assert row["efficiency"] == pytest.approx(wanted["efficiency"], abs=2e-3)
        assert {**wanted, "efficiency": 0} | {**row, "efficiency": 0} == {**wanted, "efficiency": 0}


# --- The examples for clusters ----------------------------------------------------------------------------------

SBATCH = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": "1",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d\d:\d\d:\d\d",
    "array": r"1-\d+%1",  # one at a time: a run folder belongs to one run
    "requeue": "",
    "signal": r"TERM@\d+",
    "output": r"(%[xAaj]|[\w.-])+",
    "open-mode": "append|truncate",
}
"""Options of sbatch that the example may give, and the form of their values, after Slurm's manual."""


def manifests() -> dict[str, Any]:
    """The objects of the Kubernetes example by their kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())}


def test_the_slurm_example_is_bash_and_sbatch_knows_its_options() -> None:
    script = EXAMPLES / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    first, *lines = script.read_text().splitlines()
    assert first == "#!/bin/bash"
    options = list(itertools.takewhile(lambda line: line.startswith("#SBATCH "), lines))
    assert not any("#SBATCH" in line for line in lines[len(options) :])  # sbatch stops reading at the first command
    given = dict(re.fullmatch(r"#SBATCH --([a-z-]+)=?(\S*)", option).groups() for option in options)
    assert given.keys() == SBATCH.keys()
    for name, value in given.items():
        assert re.fullmatch(SBATCH[name], value), name
    (command,) = launched(script.read_text())
    launcher = get_args_parser().parse_args(command)
    (exported,) = re.findall(r"^export (.*)", script.read_text(), re.MULTILINE)
    assert int(given["signal"].split("@")[1]) > grace(dict(word.split("=") for word in exported.split()))
    assert launcher.nproc_per_node == given["gpus-per-node"]


def test_the_kubernetes_example_fits_together() -> None:
    """Pod 0 of an indexed Job can be reached as JOB-0.SUBDOMAIN, where a headless Service has the subdomain's name."""
    objects = manifests()
    versions = {"Service": "v1", "Job": "batch/v1", "PersistentVolumeClaim": "v1"}
    assert {kind: each["apiVersion"] for kind, each in objects.items()} == versions
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", each["metadata"]["name"]) for each in objects.values())
    job, service = objects["Job"], objects["Service"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["completions"] == job["spec"]["parallelism"]
    assert pod["restartPolicy"] in ("OnFailure", "Never")  # those that a Job may have
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]}
    claim = volumes["shared"]["persistentVolumeClaim"]["claimName"]
    assert claim == objects["PersistentVolumeClaim"]["metadata"]["name"]
    launcher = get_args_parser().parse_args(container["command"][1:])
    assert launcher.rdzv_endpoint.split(":")[0] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert int(launcher.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert launcher.nnodes.split(":")[-1] == str(job["spec"]["completions"])
    assert pod["terminationGracePeriodSeconds"] > grace({each["name"]: each["value"] for each in container["env"]})


def grace(environment: dict[str, str]) -> int:
    """The seconds that torchrun gives processes to stop; the other setting is the one that several machines need."""
    assert environment.keys() == {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    return int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])


def launched(text: str) -> list[list[str]]:
    """The arguments of torchrun in every command of a page or a script that starts cddlib with it."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.match(r" *(?:srun .*?)?torchrun (.*-m cddlib .*)", line) for line in lines]
    return [shlex.split(match[1].split("   #")[0]) for match in found if match]


def test_documented_launches_parse(reached: Callable[[list[str]], None]) -> None:
    """In the README, the page and the examples."""
    pages = (ROOT / "README.md", ROOT / "book" / "several-devices.md", EXAMPLES / "slurm.sh")
    (container,) = manifests()["Job"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "torchrun"
    lines = [*(command for page in pages for command in launched(page.read_text())), container["command"][1:]]
    assert {words[words.index("cddlib") + 1] for words in lines} == {*cli.DIVIDED}
    for words in lines:
        launcher = get_args_parser().parse_args(words)
        assert launcher.module and launcher.training_script == "cddlib", words
        reached(launcher.training_script_args)
