"""What each command does. `cddlib.cli` finds them by name and turns their arguments into options."""

import dataclasses
import statistics
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cddlib.data.dataset import load
from cddlib.data.download import prepare
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.hooks import TensorBoard
from cddlib.distillation.loop import distill
from cddlib.evaluate import SETS, evaluate_run
from cddlib.exchange.export import export_parquet, export_png
from cddlib.exchange.published import export_buffer, export_set, import_buffer, import_set
from cddlib.experts.buffer import Buffer
from cddlib.experts.config import BufferConfig
from cddlib.experts.train import train_buffer
from cddlib.methods.recipes import recipes_table
from cddlib.networks.convnet import Architecture, NetworkConfig, Norm, parameter_count
from cddlib.plan import buffer_of, costs_table, plan
from cddlib.runtime.config import as_dict, from_dict, replace
from cddlib.runtime.errors import UserError, as_user_error
from cddlib.runtime.files import read_json, whole_folder, write_json
from cddlib.synthetic import SyntheticSet
from cddlib.verify import TOLERANCE, checks_table, verify

ROOT_HELP = "Folder of the data sets; without it $CDDLIB_DATA, else the user's cache folder."
Root = Annotated[Path | None, tyro.conf.arg(help=ROOT_HELP)]
Device = Annotated[str, tyro.conf.arg(help="auto (the first GPU, else the CPU), cpu, cuda, cuda:1 …")]
Distillation = Annotated[DistillConfig, tyro.conf.arg(name="")]
Experts = Annotated[BufferConfig, tyro.conf.arg(name="")]


def data(name: tyro.conf.Positional[str], *, root: Root = None, source: Path | None = None, size: int = 64) -> None:
    """Prepare a data set: download it, or read it from a folder, into one tensor file.

    Args:
        name: fashion_mnist, cifar10, cifar100, tiny_imagenet, imagenet or imagefolder; digits needs nothing.
        source: A folder that holds train/ and val/, for tiny_imagenet, imagenet and imagefolder.
        size: Pixels of a side, for imagefolder.
    """
    print(f"{name} is ready in {prepare(name, root, source=source, size=size)}")


def buffer(
    *, config: Experts, out: Path, method: str = "mtt", ipc: int = 1, root: Root = None, device: Device = "auto"
) -> None:
    """Train experts on real data and keep their parameters after every epoch.

    Args:
        config: How experts are trained.
        out: Folder of the buffer.
        method: Train them as this method does.
        ipc: Images per class of the synthetic set that they are for; some methods train other experts for other sets.
    """
    _print_buffer(train_buffer(config, out, root=root, device=device))


def _print_buffer(buffer: Buffer) -> None:
    """Say what a buffer holds."""
    tests = [expert["test_accuracy"] for expert in buffer.experts]
    print(
        f"{len(tests)} experts of {buffer.epochs} epochs and {parameter_count(buffer.network):,} parameters in "
        f"{buffer.folder}; test accuracy {min(tests):.1%} to {max(tests):.1%}"
    )


def distill_data(
    *,
    config: Distillation,
    buffer: Path,
    out: Path,
    tensorboard: bool = False,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Distil a data set by matching K segments of the experts' trajectories at once.

    Args:
        config: The distillation.
        buffer: Folder of the buffer whose experts are matched.
        out: Folder of the run; it resumes, or returns the finished result.
        tensorboard: Write the metrics and the images for TensorBoard too, into OUT/tensorboard.
    """
    distill(config, buffer, out, hooks=[TensorBoard()] if tensorboard else [], root=root, device=device)
    result, schedule = read_json(out / "result.json"), config.schedule
    accuracy = result["validation_accuracy"]
    measured = "" if accuracy is None else f" (validation accuracy {accuracy:.1%})"
    print(
        f"{config.method}, K = {schedule.segments}, {config.synthetic.ipc} images per class: iteration "
        f"{result['selected_iteration']} of {schedule.iterations} selected{measured}, {result['iterations_skipped']} "
        f"skipped, {result['seconds']:.0f} s; the synthetic set is {out / 'synthetic.safetensors'}"
    )


def evaluate(
    folder: tyro.conf.Positional[Path],
    *,
    runs: int = 5,
    baselines: bool = True,
    seed: int = 0,
    network: Architecture | None = None,
    norm: Norm | None = None,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Train networks from scratch on a synthetic set and on baselines, and test them on real images.

    Args:
        folder: Folder of a finished distillation.
        runs: Networks R trained on each set.
        baselines: Also train on random real images of the same number, and on all training images for as many steps.
        seed: Seed of the first network; network i has seed + i.
        network: Architecture of the networks; without it, the one that the set was distilled with.
        norm: Their normalisation; without it, the distillation's, or instance for another architecture.
    """
    chosen = None
    if network or norm:
        with as_user_error(folder / "config.json", "a distillation's configuration"):
            own = from_dict(NetworkConfig, read_json(folder / "config.json"))
        chosen = own if network in (None, own.network) else NetworkConfig(network=network)
        chosen = dataclasses.replace(chosen, norm=norm or chosen.norm)
    record = evaluate_run(folder, runs=runs, baselines=baselines, root=root, device=device, seed=seed, network=chosen)
    for key, summary in record["summary"].items():
        spread = "" if summary["std"] is None else f" ± {100 * summary['std']:.1f}"
        print(f"{SETS[key]:20} {100 * summary['mean']:5.1f}{spread} % ({summary['runs']} networks)")
    means = [statistics.fmean(fractions) for fractions in zip(*record["by_class"]["synthetic"], strict=True)]
    by_class = sorted(zip(means, record["classes"], strict=True))
    lowest, highest = (f"{100 * mean:.1f} % ({name})" for mean, name in (by_class[0], by_class[-1]))
    print(f"{'synthetic, by class':20} from {lowest} to {highest}")
    for said in record.get("diverged", []):
        print(said)


def verify_run(
    folder: tyro.conf.Positional[Path],
    *,
    buffer: Path | None = None,
    sample: int = 2,
    tolerance: float = TOLERANCE,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Recompute a sample of a finished buffer or distillation, and compare it with what was written.

    Args:
        folder: Folder of a finished buffer, or of a finished distillation.
        buffer: Folder of the buffer whose experts the distillation matched.
        sample: Experts of a buffer, and iterations after each milestone of a distillation, that are computed again.
        tolerance: Largest relative difference that is accepted; 0 for the machine that wrote it.
    """
    checks = verify(folder, buffer, sample=sample, tolerance=tolerance, root=root, device=device)
    print(checks_table(checks))
    if failed := [check.what for check in checks if not check.passed]:
        raise UserError(f"{folder} is not what it says: {', '.join(failed)} differ by more than rounding explains.")


def plan_run(
    *,
    config: Distillation,
    experts: int | None = None,
    epochs: int | None = None,
    networks: int = 5,
    devices: int = 1,
    measure: bool = True,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Say what training experts, distilling and evaluating will take: operations, memory, disk and time.

    Args:
        config: The distillation.
        experts: Experts of the buffer; without it, as many as the method trains.
        epochs: Epochs of each expert; without it, as many as the method trains.
        networks: Networks trained on each set by the evaluation.
        devices: Equal devices among which experts, segments and networks are divided, without communication.
        measure: Run a few steps on this machine to predict the time.
    """
    given = {name: value for name, value in (("experts", experts), ("epochs", epochs)) if value is not None}
    trained = buffer_of(config, **given)
    costs = plan(trained, config, networks=networks, devices=devices, measure=measure, root=root, device=device)
    print(costs_table(costs, devices))


def recipes(*, method: str | None = None, data: str | None = None) -> None:
    """Print the configuration of every method for every data set and number of images per class.

    Args:
        method: Only this method.
        data: Only this data set.
    """
    print(recipes_table(method, data))


def import_experts(
    files: tyro.conf.Positional[Path],
    *,
    config: Experts,
    out: Path,
    method: str = "mtt",
    ipc: int = 1,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Turn the replay_buffer_*.pt files of MTT, FTD or DATM into a buffer.

    Args:
        files: The folder that holds them, or one of them.
        config: What the files do not say. Experts and epochs are counted; the rest has to be true.
        out: Folder of the buffer.
        method: The method that trained them.
        ipc: Images per class of the synthetic set that they are for.
    """
    _print_buffer(import_buffer(files, out, config, root=root, device=device))


def import_images(
    images: tyro.conf.Positional[Path],
    labels: tyro.conf.Positional[Path],
    *,
    config: Distillation,
    out: Path,
    lr: Path | None = None,
    root: Root = None,
) -> None:
    """Turn images_best.pt and labels_best.pt of a published code into a run's folder that `evaluate` can test.

    Args:
        images: The images, in the network's input space.
        labels: Hard labels or logits.
        config: What the files do not say, above all --data and --zca; and how networks are trained on the set.
        out: Folder of the run.
        lr: The learned step size, lr_best.pt; without it, --step-size is the step size.
    """
    synthetic = import_set(images, labels, config.data, step_size=lr or config.synthetic.step_size, root=root)
    config = replace(config, ipc=synthetic.ipc)
    fingerprint = load(config.data.data, root).fingerprint
    with whole_folder(out) as folder:
        write_json(folder / "config.json", {**as_dict(config), "data_fingerprint": fingerprint, "imported": True})
        synthetic.save(folder / "synthetic.safetensors", config=as_dict(config), imported=True)
    print(f"{len(synthetic.labels)} images of {len(synthetic.classes)} classes; `cddlib evaluate {out}` tests them")


def export(folder: tyro.conf.Positional[Path], *, to: Path, form: Literal["png", "parquet", "pt"] = "png") -> None:
    """Write a synthetic set, or a buffer, for other programs.

    Args:
        folder: Folder of a finished distillation, or of a buffer.
        to: Folder of the files; for parquet, the file.
        form: png, a picture an image in a folder a class; parquet, for Hugging Face datasets, with soft labels; pt, the
            files of DATM and its kin, for a buffer too.
    """
    if (folder / "buffer.json").exists():
        if form != "pt":
            raise UserError(f"{folder} holds a buffer, which can be written as pt only, not as {form}.")
        export_buffer(Buffer(folder), to)
    else:
        write = {"png": export_png, "parquet": export_parquet, "pt": export_set}[form]
        write(SyntheticSet.load(folder / "synthetic.safetensors"), to)
    print(f"wrote {to}")
