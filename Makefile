# make demo and make test prepare all that they need: a virtual environment, then the packages of pyproject.toml.
#   PYTHON   the interpreter, 3.12 or newer
#   JAX      what to install for this machine: 'jax[cuda13]' with an NVIDIA GPU, 'jax[tpu]' on a TPU
#   ARGS     more arguments: make demo ARGS="--text book.txt --context 8192 65536"
PYTHON ?= python3
JAX ?= jax
ARGS ?=
OLDEST := 0.11.2
# Interpreted, each waiting warp-group of a GPU kernel blocks a thread of XLA: two cores' worth of them stand still.
GPU_INTERPRETER := NPROC=32

.PHONY: demo test test-oldest lint format clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	.venv/bin/python -m bench demo $(ARGS)

test: .venv/test.stamp
	.venv/bin/python -m pytest -n 2 --ignore=tests/gpu --cov --cov-report=term:skip-covered --cov-fail-under=95 $(ARGS)
	$(GPU_INTERPRETER) .venv/bin/python -m pytest tests/gpu

# The promises again on the oldest supported jax, without what is marked slow.
test-oldest: .venv-oldest/test.stamp
	.venv-oldest/bin/python -m pytest -n 2 -m "not slow" --ignore=tests/gpu $(ARGS)
	$(GPU_INTERPRETER) .venv-oldest/bin/python -m pytest -m "not slow" tests/gpu

lint: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/test.stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet '$(JAX)' -e '.[bench]'
	@touch $@

.venv/test.stamp: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet '$(JAX)' -e '.[test]'
	@touch $@

.venv-oldest/test.stamp: pyproject.toml | .venv-oldest/bin/python
	.venv-oldest/bin/python -m pip install --quiet '$(JAX)==$(OLDEST)' -e '.[test]'
	@touch $@

.venv/bin/python .venv-oldest/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 12) or sys.exit("hisa_jax needs Python 3.12 or newer, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(@D:/bin=)

clean:
	rm -rf .venv .venv-oldest demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
