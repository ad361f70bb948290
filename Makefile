# Every target sets up what it needs: a virtual environment in .venv with the tested versions of constraints.txt.
#   make demo     prune, tune, merge and verify a real model (examples/quickstart.py)
#   make test     the whole suite in two processes; `make test ARGS="-m 'not slow'"` passes options to pytest
#   make lint     ruff and mypy
#   make bench    one training step against PEFT's LoRA and HiRA, on the demo's model
#   make clean    remove what the other targets made
# PYTHON chooses the interpreter (3.10 or later), VENV the folder of the environment.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes of the tests; the largest tests need about 4 GB each.
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format bench clean setup

setup: $(READY)

# torch comes first and alone, so that a build that is pinned or found locally is not replaced by a later resolution.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is `$(PYTHON) --version 2>&1`; spp needs Python 3.10 or later: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,demo]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --durations=15 $(ARGS)

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.step --model "$$($(BIN)/python examples/smollm2.py)" $(ARGS)

clean:
	rm -rf $(VENV) build spp.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-out bench-out
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
