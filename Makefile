# Everything runs from .venv, which `make setup` builds from nothing but Python 3.11 or newer.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test check clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first Python that is new enough; `make setup PYTHON=/path/to/python3.11` chooses another.
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))

help: ## show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

setup: $(STAMP) ## create .venv with the pinned versions of constraints.txt

# torch goes first and alone: whether it is the CPU or the CUDA build is decided by the package index alone.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11 or newer found; install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## train, evaluate and report on the embedded model and data, on a CPU
	$(BIN)/pacevlm quickstart --run-dir runs/quickstart

test: setup check ## all checks and all tests, a process for each core
	$(BIN)/python -m pytest -n auto --dist worksteal

check: setup ## lint, format, types and import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict pacevlm recipes
	$(BIN)/python -m pytest -q tests/test_import_direction.py

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print0 | xargs -0r rm -rf
