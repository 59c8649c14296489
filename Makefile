# `make demo` and `make test` need python3 with venv and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

PORT ?= 4200
# Processes for the fast tests. What the tests of one share is made anew in another.
JOBS ?= 2

.PHONY: demo ui test fast test-slow check format docs bench faults clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(READY)  ## merge the embedded pair, stage by stage; again: every stage is reused
	$(BIN)/crane merge tiny

ui: $(READY)  ## Prefect's page with merge, sweep and evaluate; Ctrl-C stops everything
	$(BIN)/crane ui --port $(PORT)

test: $(READY)  ## lint, types and import contracts, and beside them the fast tests
	@$(MAKE) --no-print-directory --jobs=2 check fast

fast: $(READY)  ## the fast tests alone
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu"

test-slow: $(READY)  ## the tests that take longer
	$(BIN)/python -m pytest -m "slow and not gpu"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)  ## write the generated tables of the documents anew
	$(BIN)/python tests/docs/documents.py

bench: $(READY)  ## print the benchmarks' tables
	$(BIN)/python -m pytest tests/benchmarks -m "not gpu" -s

faults: $(READY)  ## kills, rot and races at random places of a seed: docs/reliability.md
	$(BIN)/python tests/faults/campaign.py --rounds $(or $(ROUNDS),40) --seed $(or $(SEED),0)

clean:  ## remove what the demo made; the environment stays
	rm -rf crane-store merged
