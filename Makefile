# Everything runs in .venv, which is made here and from nothing but these two files.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo test lint types tests doctests docs serve clean

help:
	@echo "make demo   train, prune and check a small network on real data; writes report/"
	@echo "make test   everything a change must pass"
	@echo "make lint types tests doctests docs   one step of it"
	@echo "make serve  read the documentation at http://127.0.0.1:8000"
	@echo "make clean  remove what make made"

demo: $(VENV)/demo.stamp
	$(BIN)/otprune demo --out report

test: lint types tests doctests docs

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy --strict torch_otprune

tests: $(VENV)/dev.stamp
	$(PYTEST) -n 2 --dist worksteal

doctests: $(VENV)/dev.stamp
	$(PYTEST) --doctest-modules torch_otprune

docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

serve: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) build dist report site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed, best 3.11." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: a range may resolve to a build with gigabytes of CUDA.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	@touch $@

$(VENV)/%.stamp: pyproject.toml constraints.txt $(VENV)/torch.stamp
	$(PIP) -e '.[$*]'
	@touch $@
