# Two commands do everything, environment included:   make train   make test
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test check results bench plots peers help

help:                ## what there is
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

train: $(READY)      ## set-up, then the main job: traces of a real model, three detectors, a table
	$(BIN)/python train.py

test: $(READY) check ## set-up, then lint, types and tests
	$(BIN)/pytest -n 2

check: $(READY)      ## lint and types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: $(READY)    ## the README's table: three seeds of every detector, and the linear probe beside them
	$(BIN)/python train.py --seeds 3
	$(BIN)/python benchmarks/probe.py data/sciq

bench: $(READY) $(if $(QUICK),,.venv-peers/.ready)  ## speed and memory beside the limits and the peers, into benchmarks/results; QUICK=1 without peers
	$(BIN)/python -m benchmarks.sequences $(if $(QUICK),--repeats 2 --records 4000 --seconds 0.5 --no-peers)
	$(BIN)/python -m benchmarks.graphs $(if $(QUICK),--repeats 2 --records 300 --seconds 0.5 --no-peers)
	$(if $(QUICK),,$(BIN)/python -m benchmarks.scale)
	$(BIN)/python -m benchmarks.plot

plots: $(READY)      ## docs/speed.png from benchmarks/results
	$(BIN)/python -m benchmarks.plot

peers: .venv-peers/.ready  ## set-up of what the benchmarks compare with, in .venv-peers

.venv-peers/.ready: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements-peers.txt
	@touch $@

$(READY): requirements.txt requirements-dev.txt requirements-demo.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; name another with make PYTHON=python3 (3.11 or newer)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
