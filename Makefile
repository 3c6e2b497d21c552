# make demo and make test prepare all that they need: a virtual environment, then the packages of pyproject.toml.
#   PYTHON   the interpreter, 3.12 or newer
#   JAX      what to install for this machine: 'jax[cuda13]' with an NVIDIA GPU, 'jax[tpu]' on a TPU
#   ARGS     more arguments: make demo ARGS="--text book.txt --context 8192 65536"
#   TUTORIALS  false: make docs does not execute them
PYTHON ?= python3
JAX ?= jax
ARGS ?=
TUTORIALS ?= true
OLDEST := 0.11.2
# What XLA has compiled is kept for both workers, the next run and other checkouts, a folder a version.
CACHE = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/hisa_jax/jaxlib-$$($(<D)/bin/python -c 'import jaxlib; print(jaxlib.__version__)')
CACHED = JAX_COMPILATION_CACHE_DIR=$(CACHE) JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
# Python's own compiled files are kept as well: each of the processes reads the same tests and modules.
unexport PYTHONDONTWRITEBYTECODE
# Tests run on the CPU, whatever the machine has: `pytest -m gpu` and `pytest -m tpu` are for that.
ON_CPU = JAX_PLATFORMS=cpu $(CACHED) $(<D)/bin/python -m
# To compile takes longer than to run: unoptimised, it takes half the time. Tests marked `optimised` are compiled as for users.
FAST := JAX_DISABLE_MOST_OPTIMIZATIONS=1
TESTS = $(ON_CPU) pytest -n 2 --dist worksteal
# Interpreted, each waiting warp-group of a GPU kernel blocks a thread of XLA: on two cores' worth of them the kernel
# stands still. Where libtpu writes its schedules, a new folder each time, is part of what a program is kept under once
# it is loaded: nothing is kept of processes that run tests/tpu.
KERNEL_TESTS = JAX_PLATFORMS=cpu NPROC=32 $(<D)/bin/python -m pytest -n 2 --dist worksteal
KERNELS := tests/gpu tests/tpu
CORE := --ignore=tests/gpu --ignore=tests/tpu

.PHONY: demo check test pytest fuzz test-integrations test-oldest test-oldest-exhaustive test-exhaustive mutants test-serve soak soak-mesh lint docs format clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	.venv/bin/python -m bench demo $(ARGS)

# For every edit: style, types, and of each kind of tests a few.
check: lint
check: .venv-test/test.stamp
	$(FAST) $(TESTS) -m check $(CORE) $(ARGS)
	$(KERNEL_TESTS) -m check $(KERNELS)

test: pytest fuzz

# Interpreted warp-groups wait for each other: three processes keep two cores busy.
pytest: .venv-test/test.stamp
	$(FAST) $(TESTS) -m "not exhaustive" $(CORE) --cov --cov-report= $(ARGS)
	NPROC=32 $(TESTS) -n 3 -m "not exhaustive" tests/gpu --cov --cov-append --cov-report=
	$(KERNEL_TESTS) -m "not exhaustive" tests/tpu --cov --cov-append --cov-report=term:skip-covered --cov-fail-under=95

# The same cases on every machine, each of other methods and dtypes: a minute where nothing was compiled before.
fuzz: .venv-test/test.stamp
	$(ON_CPU) bench fuzz --cases 6

# What `make test` leaves out: combinations whose parts other cases have, each compile for a TPU on the chips that
# another case has its turn on there, the library compiled as for users, the mistakes, and two fuzzed cases a setup.
OF_THE_LIBRARY := $(wildcard tests/test_*.py) tests/oracle
test-exhaustive: .venv-test/test.stamp
	$(TESTS) $(OF_THE_LIBRARY)
	$(FAST) $(TESTS) -m exhaustive tests/models tests/bench
	$(KERNEL_TESTS) -m exhaustive $(KERNELS)
	$(MUTANTS)
	$(ON_CPU) bench fuzz --cases 82
	$(MAKE) test-oldest-exhaustive

# Real servers: the openai package asks them, a browser opens the page (playwright drives the system's chromium; without
# one these tests are skipped). 2 minutes on two cores.
test-serve: .venv-test/serve.stamp
	$(FAST) $(TESTS) -n 1 -m exhaustive tests/models/serve $(ARGS)

# 64 clients stream from the byte model, a fifth of them go away: 9 minutes on two cores.
#   ARGS     --seconds 60 --clients 16
soak: .venv-test/test.stamp
	$(ON_CPU) tests.models.serve.soak $(ARGS)

# Makes one-line mistakes in copies of the tree (tests/mutants), one at a time, and runs the test that must fail of each:
# about 9 minutes on two cores. The gate only looks whether each can still be made and has its test.
#   ARGS     words: only mistakes that have one of them in their file, phrase or test
MUTANTS = $(FAST) $(CACHED) $(<D)/bin/python -m tests.mutants
mutants: .venv-test/test.stamp
	$(MUTANTS) $(ARGS)

# hisa_jax/integrations inside the real packages, a host an environment of its own (.venv-integrations). Versions are
# pinned in tests/integrations/hosts.toml, which also says what each takes.
#   ARGS     hosts: only these
test-integrations:
	$(PYTHON) -m tests.integrations $(ARGS)

# On the oldest supported jax one of each kind of what could be different there: the example of every public function,
# those of the README, calls on a mesh, a model, one on a mesh, a saved one, and of each backend a kernel interpreted and
# some lowered. Only files that have such tests are read.
OLDEST_OF = $(shell grep -rl --include='test_*.py' 'mark\.oldest' $(1))
test-oldest: .venv-oldest/test.stamp
	$(FAST) $(TESTS) -m "oldest and not exhaustive" $(call OLDEST_OF,tests/*.py tests/models tests/bench) $(ARGS)
	$(FAST) $(KERNEL_TESTS) -m "oldest and not exhaustive" $(call OLDEST_OF,$(KERNELS))

# There, what `make check` runs, and each value of the parameters of tests.
OLDEST_CORE := $(addprefix tests/,test_docs.py test_modes.py test_golden.py test_cache.py test_checked.py \
	test_context.py test_context_paged.py \
	test_processes.py test_sparse_mla.py test_training.py models/test_golden.py models/test_readme.py \
	models/test_sharding.py models/test_checkpoint.py models/test_loader.py)
test-oldest-exhaustive: .venv-oldest/test.stamp
	$(FAST) $(TESTS) -m "check and not exhaustive" $(CORE)
	$(FAST) $(TESTS) -m "not slow" --each-value $(OLDEST_CORE)
	$(FAST) $(KERNEL_TESTS) -m "not slow and not exhaustive" --each-value $(KERNELS)

# An engine on 8 emulated devices: 500 requests with shared prefixes and drafts, 15 in a hundred cancelled, every
# selection against the oracle, tokens against one device, and no page lost. 10 minutes on two cores.
soak-mesh: .venv-test/test.stamp
	$(FAST) $(ON_CPU) bench serve --mesh data=2,model=2,context=2 --requests 500 --cancels 15 --verify $(ARGS)

lint: .venv-test/test.stamp
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

# The documentation as a site in build/site. The tutorials are executed: 2.5 minutes of CPU, 5 where nothing was compiled
# before. Docstrings are read, so without tutorials nothing of the library is imported, and it takes seconds.
docs: $(if $(filter false,$(TUTORIALS)),.venv-test/test.stamp,.venv-docs/docs.stamp)
	TUTORIALS=$(TUTORIALS) NO_MKDOCS_2_WARNING=1 $(ON_CPU) mkdocs build --strict

format: .venv-test/test.stamp
	.venv-test/bin/ruff check --fix .
	.venv-test/bin/ruff format .

# What is fetched, how large it is and how far it is stands in pip's own lines. Python compiles what is imported when it
# first is: all of it takes pip most of a minute.
FOR_THE_DEMO := '.[models,bench]'
FOR_TESTS := '.[test,docs]'
define install
	@echo "Installing into $(@D): $(1)$(if $(2),; about $(2) to fetch the first time)"
	@$(@D)/bin/python -m pip install --disable-pip-version-check --no-compile $(1)
	@touch $@
endef

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(call install,'$(JAX)' -e $(FOR_THE_DEMO),210 MB)

.venv-test/test.stamp: pyproject.toml | .venv-test/bin/python
	$(call install,'$(JAX)' -e $(FOR_TESTS))

.venv-docs/docs.stamp: pyproject.toml | .venv-docs/bin/python
	.venv-docs/bin/python -m pip install --quiet '$(JAX)' -e '.[docs,tutorials]'
	@touch $@

.venv-test/serve.stamp: pyproject.toml .venv-test/test.stamp
	$(call install,'openai>=1.60' 'playwright>=1.49')

# What it does not have itself it finds in .venv-test: only jax is installed, and what does not go with that one.
PACKAGES = import sysconfig; print(sysconfig.get_path("purelib"))
.venv-oldest/test.stamp: .venv-test/test.stamp | .venv-oldest/bin/python
	.venv-test/bin/python -c '$(PACKAGES)' > "$$(.venv-oldest/bin/python -c '$(PACKAGES)')/of_venv_test.pth"
	$(call install,'$(JAX)==$(OLDEST)' -e '.[test]')

.venv/bin/python .venv-test/bin/python .venv-docs/bin/python .venv-oldest/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 12) or sys.exit("hisa_jax needs Python 3.12 or newer, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	@echo "Making the virtual environment $(@D:/bin=)"
	@$(PYTHON) -m venv $(@D:/bin=)

clean:
	rm -rf .venv .venv-test .venv-docs .venv-oldest build demo_out fuzz_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
