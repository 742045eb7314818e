# Two commands do everything, environment included:   make train   make test
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
comma := ,

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

# benchmark, options of a run of 15 minutes, of FULL=1, which README's figures are of, of QUICK=1: a look without peers, in a folder of its own
MEASURE = $(if $(QUICK),BENCH_RESULTS=benchmarks/results/quick) $(BIN)/python -m benchmarks.$(1) $(if $(QUICK),$(4),$(if $(FULL),$(3),$(2)))

bench: $(READY) $(if $(QUICK),,.venv-peers/.ready)  ## speed and memory beside the limits and the peers, into benchmarks/results; FULL=1 longer, QUICK=1 without peers
	$(call MEASURE,limits,,,--repeats 2 --megabytes 64 --seconds 0.1)
	$(call MEASURE,sequences,--records 2000 --seconds 0.3,--records 4000,--repeats 2 --records 1000 --seconds 0.2 --no-peers)
	$(call MEASURE,graphs,--records 500 --seconds 0.3,,--repeats 2 --records 100 --seconds 0.2 --no-peers)
	$(call MEASURE,budgets,,,--records 500)
	$(call MEASURE,scaling,--megabytes 16 --seconds 0.1,--megabytes 64 --seconds 0.3,--repeats 1 --megabytes 8 --seconds 0.05)
	$(call MEASURE,layers,--megabytes 32,--megabytes 64,--repeats 1 --megabytes 16)
	$(call MEASURE,scale,--repeats 3 --gigabytes 0.25$(comma)0.5 --most-shards 1000,--gigabytes 0.25$(comma)0.5$(comma)1,--repeats 1 --gigabytes 0.1 --most-shards 100)
	$(call MEASURE,stores,--megabytes 100 --window 16,,--repeats 1 --megabytes 20 --window 4)
	$(call MEASURE,training,--megabytes 8 --seconds 0.3,,--repeats 1 --megabytes 4 --seconds 0.1)
	$(call MEASURE,convert,--gigabytes 0.5 --memory-gigabytes 0 --repeats 5,--gigabytes 1 --memory-gigabytes 0 --repeats 5,--gigabytes 0.02 --memory-gigabytes 0 --repeats 1)
	$(call MEASURE,plot,,,benchmarks/results/quick)

plots: $(READY)      ## the README's speed tables, docs/speed.png and docs/growth.png from benchmarks/results
	$(BIN)/python -m benchmarks.plot

peers: .venv-peers/.ready  ## set-up of what the benchmarks compare with, in .venv-peers

.venv-peers/.ready: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r benchmarks/requirements-peers.txt
	@touch $@

# FRAMEWORKS=image: torch, DALI and NumPy stay those that $(PYTHON) has, as in an NVIDIA image
IMAGE := $(filter image,$(FRAMEWORKS))

$(INSTALLED): $(wildcard requirements*.txt)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; name another with make PYTHON=python3 (3.11 or newer)"; exit 2; }
	$(PYTHON) -m venv $(if $(IMAGE),--system-site-packages) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements$(if $(IMAGE),-base).txt -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	@touch $@

$(READY): $(INSTALLED) pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
