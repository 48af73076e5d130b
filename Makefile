# `make demo` and `make test` set up everything they need; nothing is installed outside .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# A third of what is installed, which nothing here imports.
UNUSED := /tests/|/testing/_internal/|/transformers/models/[^al]

.DEFAULT_GOAL := help

help: ## Show this help.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --no-compile \
		--constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' $(VENV)/lib || true # some are for newer Pythons
	touch $(READY)

setup: $(READY) ## Make the virtual environment.

demo: $(READY) ## Train a DiPaCo in a swarm on this machine: a kill, a late joiner, no server.
	$(BIN)/python -m examples.demo

# Real networks and processes keep to the clock, so they do not share the cores with other tests.
test: $(READY) ## Run all tests.
	$(BIN)/python -m pytest -m "not swarm" --numprocesses 2
	$(BIN)/python -m pytest -m swarm

faults: $(READY) ## Kill and stop real peers at every stage of a round; a quarter of an hour.
	$(BIN)/python -m tests.faults

check: $(READY) ## Lint, format, types, import rules.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## Run the benchmarks of docs/results.md.
	$(BIN)/python -m benchmarks.inner_step
	$(BIN)/python -m benchmarks.averaging --peers 2
	$(BIN)/python -m benchmarks.averaging --peers 4
	$(BIN)/python -m benchmarks.fetches --fetches 10000
	$(BIN)/python -m benchmarks.joining
	$(BIN)/python -m benchmarks.links --mbps 5 --mbps 20 --mbps 100
	$(BIN)/python -m benchmarks.rebasing
	$(BIN)/python -m benchmarks.handover
	$(BIN)/python -m benchmarks.idle

churn: $(READY) ## Soak 12 peers that keep leaving and coming back, under a virtual clock.
	$(BIN)/python -m benchmarks.churn

quality: $(READY) ## Compare routers, topologies and outer steps; an hour and a half on two cores.
	$(BIN)/python -m benchmarks.quality --size cpu --json quality-run/quality.json --plots quality-run

clean: ## Remove the virtual environment and what the demo left.
	rm -rf $(VENV) demo-run quality-run

.PHONY: help setup demo test faults check bench churn quality clean
