# Everything runs in .venv, which `make install` makes and keeps up to date.
# PYTHON names the Python that .venv is made with, for example: make install PYTHON=python3.12

PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
RUN := .venv/bin/python -m

.PHONY: install quickstart test test-fast lint types clean

install:
	@$(PYTHON) tools/install.py

quickstart: install
	@bash examples/quickstart/run.sh

test: install
	$(RUN) pytest

test-fast: install
	$(RUN) pytest -m "not slow and not gpu"

lint: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	find csrc -type f | xargs .venv/bin/clang-format --dry-run -Werror

types: install
	$(RUN) mypy

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
