"""Build the book: papermill executes copies of the chapters, Jupyter Book renders them, a page says how they ran.

    python book/build.py --profile quick

The sources are never written to. `_build/stage` mirrors the repository: the chapters there carry their outputs, and
`book/provenance.md` is made from their papermill metadata. A failing cell, an unknown parameter or a Sphinx warning
fails the build.
"""

import argparse
import ast
import importlib.metadata
import inspect
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml

import cddlib
from cddbook.claims import claims_table, committed_findings, summary_table
from cddbook.figures.sets import committed_sets, sets_page
from cddbook.tables import (
    markdown,
    measured_table,
    methods_table,
    plan_table,
    published_tables,
    recipes_by_method,
)

ROOT = Path(__file__).resolve().parent.parent


def execute(source: Path, target: Path, parameters: dict[str, Any]) -> nbformat.NotebookNode:
    """Execute a copy of `source` with all its parameters spelled out; unknown ones are refused."""
    inspected = papermill.inspect_notebook(str(source))
    declared = {name: ast.literal_eval(entry["default"]) for name, entry in inspected.items()}
    unknown = sorted(parameters.keys() - declared.keys())
    if unknown:
        raise ValueError(f"{source.name} has no parameter {', '.join(unknown)}; it has {', '.join(declared)}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    places = {"input_path": str(source), "output_path": str(target), "cwd": str(source.parent)}
    quiet = ["--IPKernelApp.log_level=ERROR"]  # it warns of every connection that is not encrypted
    how: dict[str, Any] = {"kernel_name": "python3", "progress_bar": False, "extra_arguments": quiet}
    notebook = papermill.execute_notebook(**places, parameters=declared | parameters, **how)
    notebook.metadata.pop("widgets", None)  # their state would pull scripts from a network
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("hide-input")
    nbformat.write(notebook, target)
    return notebook


def provenance(notebooks: dict[str, nbformat.NotebookNode]) -> str:
    """The provenance page: how each chapter ran, and with what."""
    chapters = []
    for name, notebook in notebooks.items():
        run = notebook.metadata.papermill
        parameters = ", ".join(f"`{key}={value!r}`" for key, value in run.parameters.items())
        row = {"chapter": name, "parameters": parameters, "seconds": f"{run.duration:.0f}"}
        chapters.append({**row, "finished (UTC)": run.end_time[:19]})
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    names = ("cddlib", "torch", "torchvision", "numpy", "papermill", "jupyter-book", "matplotlib", "seaborn")
    which = {
        "commit": commit or "not in a git checkout",
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{name: importlib.metadata.version(name) for name in names},
        "threads": os.environ["OMP_NUM_THREADS"],
    }
    return f"""# Provenance

How the pages of this build were made, from the metadata that papermill left in the executed chapters.

{markdown(chapters)}

{markdown({"what": what, "which": value} for what, value in which.items())}

Records of longer runs carry their own provenance, in `book/results/*.json`.
"""


def api() -> str:
    """The API page: the rooms of `cddlib` in the order of its docstring, then `cddbook`, each with its modules."""
    (rooms,) = re.findall(r"The rooms, .*?: (.*?)\.$", inspect.getdoc(cddlib) or "", re.DOTALL | re.MULTILINE)
    blocks = []
    for room in [*(f"cddlib.{name}" for name in re.split(r",\s+", rooms)), "cddbook", "cddbook.figures"]:
        blocks.append(f"{room}\n{'-' * len(room)}\n.. automodule:: {room}\n   :members:")
        folder = getattr(importlib.import_module(room), "__path__", [])
        names = [f"{room}.{found.name}" for found in pkgutil.iter_modules(folder) if not found.ispkg]
        modules = [name for name in names if not name.endswith("__main__")]
        blocks += [f"{name}\n{'~' * len(name)}\n.. automodule:: {name}\n   :members:" for name in modules]
    body = "\n\n".join(blocks)
    return f"# API reference\n\nA room imports only from the rooms above it.\n\n```{{eval-rst}}\n{body}\n```"


def configuration(repository: str) -> str:
    """Jupyter Book's configuration; with a `repository`, pages link to their sources there, to Binder and to Colab."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    if repository:
        config["repository"] = {"url": repository, "branch": "main", "path_to_book": "."}
        config["html"] |= {"use_repository_button": True, "use_edit_page_button": True}
        services = {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"}
        config["launch_buttons"] = {"notebook_interface": "jupyterlab", **services}
    return yaml.safe_dump(config, allow_unicode=True)


def main() -> None:
    """Stage, execute, render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=("ci", "quick", "full"))
    parser.add_argument("--repository", default="", help="address of the repository, for buttons that open its files")
    parser.add_argument("--output", type=Path, default=ROOT, help="where _build goes")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are not for pages

    stage = arguments.output / "_build" / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    shutil.copy(ROOT / "_toc.yml", stage)
    (stage / "_config.yml").write_text(configuration(arguments.repository))
    shutil.copytree(ROOT / "book", stage / "book", ignore=shutil.ignore_patterns("*.py", "_*"))
    shutil.copytree(ROOT / "book" / "_static", stage / "_static")

    executed = {}
    for source in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        print(f"executing {source.name}", flush=True)
        executed[source.stem] = execute(source, stage / "notebooks" / source.name, {"profile": arguments.profile})
    first = committed_sets("segments-cifar10-ipc1-published")
    for k, (figure, _) in first.items():
        figure.savefig(stage / "book" / f"set-{k}.png", dpi=200, bbox_inches="tight")
    found = committed_findings()
    generated = {
        "api": api(),
        "provenance": provenance(executed),
        "sets": sets_page(first),
        "claims-summary": summary_table(found),
        "claims-table": claims_table(found),
        "methods-overview": methods_table(),
        "methods-published": published_tables(),
        "methods-measured": measured_table(),
        "methods-recipes": recipes_by_method(),
        "plan-accuracy": plan_table(),
    }
    for name, text in generated.items():
        (stage / "book" / f"{name}.md").write_text(text + "\n")
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [str(jupyter_book), "build", str(stage), "--path-output", str(arguments.output)]
    subprocess.run([*command, "-W", "-n", "--keep-going", "--all"], check=True)
    bibliography = arguments.output / "_build" / "html" / "book" / "bibliography.html"
    listed = bibliography.read_text().replace('role="doc-biblioentry"', 'role="listitem"')  # docutils' is deprecated
    bibliography.write_text(listed)


if __name__ == "__main__":
    main()
