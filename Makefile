# Everything runs in .venv, made from requirements.lock on first use. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROFILE ?= quick
TO ?= gpu-records
# as it was given: neither make nor a shell reads it
override export PROFILE := $(value PROFILE)
override export REPOSITORY := $(value REPOSITORY)

.DEFAULT_GOAL := help
.PHONY: help install test soak lint format book lab bench gpu lock audit clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(READY) ## make .venv with the locked versions and cddlib itself

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cddlib needs Python 3.11 or newer; set PYTHON=…")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

test: $(READY) lint ## set up, lint, and run all tests on two processes
	$(BIN)/python -m pytest -n 2

soak: $(READY) ## kill, starve, damage and fuzz for half an hour (RECORDS=folder of the records)
	$(BIN)/python -m pytest -m soak -n 2 --dist loadfile $(if $(RECORDS),--records "$(RECORDS)")

lint: $(READY) ## check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## apply the style; strip notebooks of outputs
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/nbstripout --extra-keys "metadata.papermill cell.metadata.papermill metadata.widgets" \
		--drop-tagged-cells injected-parameters notebooks/*.ipynb

book: $(READY) ## set up, execute every chapter, and build the book into _build/html (PROFILE=ci, quick or full; REPOSITORY=address for links to it)
	$(BIN)/python book/build.py --profile "$$PROFILE" --repository "$$REPOSITORY"

lab: $(READY) ## set up, and open the chapters in JupyterLab (OPTIONS=of jupyter lab)
	$(BIN)/jupyter lab $(OPTIONS) notebooks

bench: $(READY) ## time matching, training and evaluation beside the textbook's way, on this machine, into speed.json
	$(BIN)/python tests/benchmarks/speed.py --to speed.json

gpu: $(READY) ## prove on this machine's GPU what a CPU cannot, in ten minutes (ROOT=folder of the data sets, TO=folder of the records)
	$(BIN)/python tests/gpu/run.py --seconds 540 --to "$(TO)" $(if $(ROOT),--root "$(ROOT)")

lock: $(READY) ## resolve requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate --no-header \
		--upgrade pyproject.toml --output-file requirements.lock

audit: $(READY) ## look the locked versions up among the known vulnerabilities of PyPI
	$(BIN)/uv tool run pip-audit --strict --disable-pip --no-deps --requirement requirements.lock

clean: ## remove what was built, but not .venv
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
