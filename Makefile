# `make` lists the targets. Everything happens in .venv of this folder.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup run test lint format docs clean

help: ## show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install frpo with its development tools (PYTHON=python3.12 chooses another Python)

$(STAMP): pyproject.toml .ci/constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) found; install Python 3.11 or newer, or write make setup PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = ".".join(map(str, sys.version_info[:3])); sys.exit(None if sys.version_info >= (3, 11) else f"make: $(PYTHON) is Python {v}, frpo needs 3.11 or newer; write make setup PYTHON=python3.11, say")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c .ci/constraints.txt -e '.[dev]'
	@touch $@

run: $(STAMP) ## the tiny study: train GRPO and FRPO, fine-tune them, report what survives (a CPU, minutes)
	$(BIN)/frpo study run recipes/studies/tiny.yaml

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n 2

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check frpo tests
	$(BIN)/ruff format --check frpo tests
	$(BIN)/mypy

format: $(STAMP) ## format the code and sort its imports
	$(BIN)/ruff check --fix --select I frpo tests
	$(BIN)/ruff format frpo tests

docs: $(STAMP) ## build the API reference from the docstrings into build/docs
	$(BIN)/python .ci/docs.py

clean: ## remove .venv, caches and build leftovers; outputs/ and mlflow.db stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	find frpo tests -name __pycache__ -prune -exec rm -rf {} +
