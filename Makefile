# `make demo` and `make test` set everything up by themselves; nothing but Python 3.11+ is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
THREADS ?= 2
KERNELS := CMakeLists.txt $(shell find src/outrider/kernels/cpu -type f)

.PHONY: demo test test-all lint types install format clean

demo: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/outrider demo

install: $(STAMP)

# torch first and by its exact version: asked for in any other way, pip takes gigabytes of GPU packages along.
$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "outrider needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar on torch==2.13.0
	$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt -e '.[dev]'
	touch $(STAMP)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-all: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
