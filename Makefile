# The one door to the project: people and CI use the same targets.
PYTHON ?= python3
BIN := .venv/bin
# uv is many times faster than pip; INSTALL=".venv/bin/pip install" uses pip and its configuration instead.
INSTALL ?= $(BIN)/uv pip install --python $(BIN)/python
JOBS ?= $(shell nproc)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Stages are many short processes, and compiling PyTorch's Python files again in each costs as much as importing it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup repro test lint check bench
setup: .venv/done
repro: setup
	@python -m pipeline repro --jobs $(JOBS)
test: setup
	python -m pytest -n $(JOBS) --dist loadgroup
lint: setup
	ruff check .
	ruff format --check .
	mypy
check: lint test
# The peers, for the benchmarks alone; one of their dependencies builds with an old setuptools only.
bench: repro
	$(INSTALL) --constraint constraints.txt --build-constraint benchmarks/build-constraints.txt --editable ".[bench]"
	python -W ignore benchmarks/deepfool.py
	python -W ignore benchmarks/read.py
	python -W ignore benchmarks/ingest.py
	python -W ignore benchmarks/manifest.py --num-rows 5000000
	python -W ignore benchmarks/memory.py
	python -W ignore benchmarks/data_path.py
	python -W ignore benchmarks/sampling.py --data data
	python -W ignore benchmarks/training_step.py

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or later is needed, this is {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt uv
	$(INSTALL) --constraint constraints.txt --editable ".[dev]"
	@touch $@
