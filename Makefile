# Everything runs in .venv, which `make install` makes and keeps up to date.
# PYTHON names the Python that .venv is made with, for example: make install PYTHON=3.11
# VENV names another environment than .venv, for example: make test VENV=.venv-3.11
# TESTS names some of the tests, for example: make test TESTS=tests/unit
# ARGS goes to pytest as it is.
# PART is what `test` measures of the layouts of the gradient table; `test-other` has the others.

PYTHON ?=
VENV ?= .venv
TESTS ?=
ARGS ?=
PART ?= 1/2
RUN := $(VENV)/bin/python -m
export MEGATRON_RL_VENV := $(VENV)

.PHONY: install quickstart test test-fast test-exhaustive test-cluster test-other lint types lock \
	clean

install:
	@python3 tools/install.py $(PYTHON)

quickstart: install
	@PYTHON=$(VENV)/bin/python bash examples/quickstart/run.sh

# Two files at a time: many tests are single processes. In the order of the folders, the slow first.
test: install
	$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder --part=$(PART) $(ARGS) $(TESTS)

test-fast: install
	$(RUN) pytest -m "not slow and not gpu and not cluster and not exhaustive"

# What `test` measures a share of, whole: before a release, and after a change of what it is about.
test-exhaustive: install
	$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder -m "exhaustive and not gpu and not cluster" \
		$(TESTS)

# Machines, networks and a scheduler, set up on this machine: as root, with Debian's slurm-wlm and munge.
test-cluster: install
	$(RUN) pytest -m cluster tests/cluster

# The share that depends on Megatron-Core, with Python 3.11 and its older version: gradients at
# the layouts that `test` leaves out.
OTHER := tests/architecture tests/unit/megatron tests/distributed/test_faults.py \
	tests/distributed/test_gradient_invariance.py tests/distributed/test_checkpoint_conversion.py \
	tests/e2e/test_resume.py tests/e2e/test_megatron_settings.py
test-other:
	@$(MAKE) test VENV=.venv-3.11 PYTHON=3.11 PART=2/2 TESTS="$(OTHER)"

lint: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	find csrc -type f | xargs $(VENV)/bin/clang-format --dry-run -Werror

types: install
	$(RUN) mypy

# Resolves requirements/ anew; ARGS=--upgrade takes the newest versions that pyproject.toml allows.
lock: install
	$(VENV)/bin/python tools/lock.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +
