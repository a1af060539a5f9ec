# `make help` lists what can be made. Needed on the machine: make and Python 3.11 or newer.

PYTHON ?= python3
PYTEST_ARGS ?=
SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DEFAULT_GOAL := help

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Only errors: pip's warnings are about the machine it runs on, not about this project.
PIP := bin/pip -qq

# One thread a worker, or two workers share the cores badly; and nothing here needs the network.
TEST_ENV := NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := bin/pytest -n 2
NO_TRANSFORMERS := $(patsubst %,--ignore=tests/evals/test_%.py,benchmarks compare metrics recipes synthvqa vqa_normalisation)

.PHONY: help
help:
	@echo "make run         measure accuracy and speed of the pruning methods on this machine (a table and a picture)"
	@echo "make test        everything that must hold: style, types, import contracts, and the tests with two transformers"
	@echo "make env         the environment .venv that both use"
	@echo "make env-oldest  the environment .venv-oldest, with the oldest transformers that is supported"
	@echo "make docs        the site of docs/, in site/"
	@echo "make lint        style and import contracts"
	@echo "make format      put the style right where that needs no thought"
	@echo "make types       static types"
	@echo "make clean       remove environments, caches and results"

# ------------------------------------------------------------------ the main job

.PHONY: run
run: env
	@echo "Measuring. Interrupted with Ctrl-C, 'make run' goes on where it was."
	@.venv/bin/vlprune eval

# ------------------------------------------------------------------ checks

.PHONY: test
test: env env-oldest lint types
	@echo "Tests, with the newest transformers:"
	@$(TEST_ENV) .venv/$(PYTEST) $(PYTEST_ARGS)
	@echo "The same tests, with the oldest transformers (wheel, kernels, data and metrics do not depend on it):"
	@$(TEST_ENV) .venv-oldest/$(PYTEST) --ignore=tests/test_packaging.py --ignore=tests/test_site.py --ignore=tests/kernels $(NO_TRANSFORMERS) $(PYTEST_ARGS)
	@echo "All checks passed."

.PHONY: docs
docs: env
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet
	@echo "The site is built: open site/index.html."

.PHONY: lint
lint: env
	@echo "Style:"
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@echo "Import contracts:"
	@.venv/bin/lint-imports

.PHONY: types
types: env
	@echo "Types:"
	@.venv/bin/pyright

.PHONY: format
format: env
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

# ------------------------------------------------------------------ environments

.PHONY: env env-oldest
env: .venv/.installed
	@echo "The environment .venv is ready."
env-oldest: .venv-oldest/.installed
	@echo "The environment .venv-oldest is ready."

# $(call install,FOLDER,CONSTRAINTS,EXTRAS). torch comes first and alone, so that no other package chooses its build.
# Without build isolation the project itself is built with the pinned tools.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is older. Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Preparing the environment $(1), once; it takes a few minutes."
	@$(PYTHON) -m venv $(1)
	@echo "  1 of 4: PyTorch"
	@$(1)/$(PIP) install "$$(grep '^torch==' $(2))"
	@echo "  2 of 4: build tools"
	@$(1)/$(PIP) install -c $(2) hatchling editables
	@echo "  3 of 4: vlprune with [$(3)], as pinned in $(2)"
	@$(1)/$(PIP) install --no-build-isolation -c $(2) -e ".[$(3)]"
	@echo "  4 of 4: lmms-eval, whose contract is tested, without what single tasks of it need"
	@$(1)/$(PIP) install --no-deps "$$(grep '^lmms-eval==' $(2))"
	@touch $(1)/.installed
endef

.venv/.installed: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,evals$(comma)dev)

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(call install,.venv-oldest,constraints-oldest.txt,evals$(comma)test)

comma := ,

.PHONY: clean
clean:
	rm -rf .venv .venv-oldest build dist results site .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find vlprune tests -name __pycache__ -type d -prune -exec rm -rf {} +
