# Two commands do everything, environment included:   make train   make test
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready

.PHONY: train test pretended-gpu check results bench plots peers docs help fit

help:                ## what there is
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

train: fit           ## set-up, then the main job: traces of a real model, three detectors, a table
	$(BIN)/python train.py

test: fit check      ## set-up, then lint, types and tests
	$(BIN)/pytest -n 2 --dist worksteal

pretended-gpu: fit   ## the tests marked gpu, on a GPU that is pretended: what would wait for it, or be copied to it
	$(BIN)/pytest -n 2 --dist worksteal -m gpu --pretended-gpu

check: fit           ## lint and types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: fit         ## the table of docs/findings.md: three seeds of every detector, and the linear probe beside them
	$(BIN)/python train.py --seeds 3
	$(BIN)/python -m benchmarks.probe data/sciq

# a ready environment may have got another NumPy since; half a second
fit: $(READY)
	@$(BIN)/python -m dali_pipeline.runtime.numpyversion

# FULL=1: what docs/results.md shows; QUICK=1: a look without peers, into a folder of its own
bench: fit $(if $(QUICK),,.venv-peers/.ready)  ## speed and memory beside the limits and the peers, into benchmarks/results; FULL=1 longer, QUICK=1 without peers
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick,$(if $(FULL),--full))

plots: fit           ## the tables of docs/results.md and docs/findings.md, and their pictures, from benchmarks/results
	$(BIN)/python -m benchmarks.plot

peers: .venv-peers/.ready  ## set-up of what the benchmarks compare with, in .venv-peers

.venv-peers/.ready: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements-peers.txt
	@touch $@

docs: .venv-docs/.ready  ## the documentation site, strictly checked, into site/; nothing is fetched but packages, once
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/.ready: requirements-docs.txt requirements-docs-assets.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-docs-assets.txt
	@touch $@

# FRAMEWORKS=image: torch and DALI stay those that $(PYTHON) has, as in an NVIDIA image, and NumPy from version 2 on
IMAGE := $(filter image,$(FRAMEWORKS))
# the version of CUDA that torch is built for, and DALI is to be; without a GPU either does
CUDA_OF_TORCH := import torch; print((torch.version.cuda or '12').split('.')[0])

$(INSTALLED): $(filter-out requirements-docs%,$(wildcard requirements*.txt))
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; name another with make PYTHON=python3 (3.11 or newer)"; exit 2; }
	$(PYTHON) -m venv $(if $(IMAGE),--system-site-packages) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(IMAGE),,-r requirements-frameworks.txt) -r requirements-base.txt -r requirements-dev.txt
	$(if $(IMAGE),,$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-cuda$$($(BIN)/python -c "$(CUDA_OF_TORCH)").txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	@touch $@

$(READY): $(INSTALLED) pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
