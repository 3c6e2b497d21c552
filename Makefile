# make demo and make test prepare all that they need: a virtual environment, then the packages of pyproject.toml.
#   PYTHON   the interpreter, 3.12 or newer
#   JAX      what to install for this machine: 'jax[cuda13]' with an NVIDIA GPU, 'jax[tpu]' on a TPU
#   ARGS     more arguments: make demo ARGS="--text book.txt --context 8192 65536"
PYTHON ?= python3
JAX ?= jax
ARGS ?=
OLDEST := 0.11.2
# Tests run on the CPU, whatever the machine has: `pytest -m gpu` and `pytest -m tpu` are for that. Interpreted, each
# waiting warp-group of a GPU kernel blocks a thread of XLA: on two cores' worth of them the kernel stands still.
TESTS := JAX_PLATFORMS=cpu
KERNEL_TESTS := JAX_PLATFORMS=cpu NPROC=32

.PHONY: demo test test-oldest lint format clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	.venv/bin/python -m bench demo $(ARGS)

test: .venv-test/test.stamp
	$(TESTS) .venv-test/bin/python -m pytest -n 2 --ignore=tests/gpu --ignore=tests/tpu --cov --cov-report= $(ARGS)
	$(KERNEL_TESTS) .venv-test/bin/python -m pytest -n 2 tests/gpu tests/tpu \
		--cov --cov-append --cov-report=term:skip-covered --cov-fail-under=95

# The promises again on the oldest supported jax, without what is marked slow.
test-oldest: .venv-oldest/test.stamp
	$(TESTS) .venv-oldest/bin/python -m pytest -n 2 -m "not slow" --ignore=tests/gpu --ignore=tests/tpu $(ARGS)
	$(KERNEL_TESTS) .venv-oldest/bin/python -m pytest -n 2 -m "not slow" tests/gpu tests/tpu

lint: .venv-test/test.stamp
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

format: .venv-test/test.stamp
	.venv-test/bin/ruff check --fix .
	.venv-test/bin/ruff format .

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet '$(JAX)' -e '.[bench]'
	@touch $@

.venv-test/test.stamp: pyproject.toml | .venv-test/bin/python
	.venv-test/bin/python -m pip install --quiet '$(JAX)' -e '.[test]'
	@touch $@

.venv-oldest/test.stamp: pyproject.toml | .venv-oldest/bin/python
	.venv-oldest/bin/python -m pip install --quiet '$(JAX)==$(OLDEST)' -e '.[test]'
	@touch $@

.venv/bin/python .venv-test/bin/python .venv-oldest/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 12) or sys.exit("hisa_jax needs Python 3.12 or newer, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(@D:/bin=)

clean:
	rm -rf .venv .venv-test .venv-oldest demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
