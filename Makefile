# `make help` lists what can be made. Needed on the machine: make and Python 3.11 or newer.

PYTHON ?= python3
PYTEST_ARGS ?=
SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DEFAULT_GOAL := help

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Only errors: pip's warnings are about the machine it runs on, not about this project.
PIP := bin/pip -qq
# Compiling all that is installed takes longer than compiling what is used, when it is.
export PIP_NO_COMPILE := 1

# One thread a worker, or two workers share the cores badly; and nothing here needs the network.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := bin/pytest -n 2
VIT_TESTS := tests/vit/test_libraries.py
VLLM_TESTS := tests/serving
OTHER_TESTS := $(patsubst %,--ignore=%,$(VIT_TESTS) $(VLLM_TESTS))
# The ends and the turns of the ranges that are supported, as TIMM_OPENCLIP: before timm's attention took masks and just behind
# it, open_clip with rows first and with the batch first. The oldest transformers goes with the oldest of both.
VERSIONS := 0.9.0_2.24.0 1.0.15_2.30.0 1.0.16_3.0.0
NO_TRANSFORMERS := $(patsubst %,--ignore=tests/evals/test_%.py,benchmarks compare metrics recipes synthvqa vqa_normalisation) \
	$(patsubst %,--ignore=tests/test_%.py,adversarial apet calibrate comparison dart divprune fastervlm fastv flowcut globalcom2 holov) \
	$(patsubst %,--ignore=tests/test_%.py,mustdrop pyramiddrop scope todre transprune vflowopt visionzip vispruner vscan) \
	$(patsubst %,--ignore=tests/vit/test_%.py,diffrate mctf pitome tofu tome vid_tldr zero_tprune) \
	$(patsubst %,--deselect tests/vit/test_%.py::test_compiled_without_graph_breaks,methods training) \
	--deselect tests/vit/test_evit.py::test_stages_meet_a_budget_exactly \
	--ignore=tests/kernels --ignore=tests/test_packaging.py --ignore=tests/test_demo.py --ignore=tests/test_site.py \
	--deselect tests/test_examples.py::test_what_help_shows_works_as_typed

.PHONY: help
help:
	@echo "make run         measure accuracy and speed of the pruning methods on this machine (a table and a picture)"
	@echo "make test        everything that must hold: style, types, import contracts, and the tests with two transformers"
	@echo "make test-versions  the tests of timm and open_clip with their older versions, and transformers' oldest"
	@echo "make test-vllm   the tests with vLLM on the CPU, in an environment of 3.5 GB that this prepares"
	@echo "make env         the environment .venv that both use"
	@echo "make env-oldest  the environment .venv-oldest, with the oldest transformers that is supported"
	@echo "make docs        the site of docs/, in site/"
	@echo "make env-vit     the environment .venv-vit: .venv, and timm and open_clip over it"
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
test: environments browser env-vit lint types
	@echo "Tests, with the newest transformers:"
	@$(TEST_ENV) .venv/$(PYTEST) $(OTHER_TESTS) $(PYTEST_ARGS)
	@echo "The same tests, with the oldest transformers (wheel, kernels, data and metrics do not depend on it):"
	@$(TEST_ENV) .venv-oldest/$(PYTEST) $(OTHER_TESTS) $(NO_TRANSFORMERS) $(PYTEST_ARGS)
	@echo "Vision transformers of timm and open_clip:"
	@$(TEST_ENV) .venv-vit/$(PYTEST) $(VIT_TESTS) $(PYTEST_ARGS)
	@echo "All checks passed."

.PHONY: test-versions
test-versions: env env-oldest $(VERSIONS:%=test-version-%)
	@echo "timm and open_clip work in all versions that were tried: $(VERSIONS)"

test-version-%: .venv-versions/%/.installed
	@echo "$(subst _, and open_clip ,timm $*):"
	@$(TEST_ENV) .venv-versions/$*/$(PYTEST) $(VIT_TESTS) $(PYTEST_ARGS)

.PHONY: test-vllm
test-vllm: .venv-vllm/.installed
	@echo "Serving with vLLM, on the CPU:"
	@$(TEST_ENV) nice .venv-vllm/bin/pytest -p no:cacheprovider --confcutdir=$(VLLM_TESTS) $(VLLM_TESTS) $(PYTEST_ARGS)

.PHONY: docs
docs: env
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet
	@echo "The site is built: open site/index.html."

# The browser that the demo is tested with. Where it cannot be installed, its tests are skipped and say so.
.PHONY: browser
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && echo "Installing Chromium for the demo's tests." && \
		apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; } || \
		echo "There is no Chromium, and none can be installed: tests of the demo in a browser are skipped."

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

# Side by side: each of them waits for the network, the disk and one core in turns.
.PHONY: environments
environments:
	@$(MAKE) --no-print-directory -j2 env env-oldest

.PHONY: env env-oldest env-vit
env: .venv/.installed
	@echo "The environment .venv is ready."
env-oldest: .venv-oldest/.installed
	@echo "The environment .venv-oldest is ready."

env-vit: .venv-vit/.installed
	@echo "The environment .venv-vit is ready."

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

# $(call over,FOLDER,BELOW,PACKAGES): an environment that sees all of the one below, and has some packages more. They come
# without their dependencies: what they need is below, and their torchvision would want a torch of its own.
define over
	@echo "Preparing the environment $(1), once."
	@$(PYTHON) -m venv $(1)
	@echo "import site; site.addsitedir('$$($(2)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	@$(1)/$(PIP) install --no-deps $(3)
	@printf '#!/bin/sh\nexec "$$(dirname "$$0")/python" -P -m pytest "$$@"\n' > $(1)/bin/pytest && chmod +x $(1)/bin/pytest
	@touch $(1)/.installed
endef

.venv-vit/.installed: .venv/.installed constraints-vit.txt
	$(call over,.venv-vit,.venv,-r constraints-vit.txt)

# vLLM brings torchaudio and torchcodec, whose public wheels want a torch for CUDA and are not needed; torchvision's Python part
# does without its binary one once two operators are declared, in every process.
define DECLARED
import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
endef
export DECLARED

.venv-vllm/.installed: constraints-vllm.txt pyproject.toml
	@echo "Preparing the environment .venv-vllm, once; it takes a few minutes and 3.5 GB."
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/$(PIP) install "$$(grep '^torch==' constraints-vllm.txt)"
	@.venv-vllm/$(PIP) install -r constraints-vllm.txt
	@.venv-vllm/$(PIP) uninstall -y torchaudio torchcodec
	@.venv-vllm/$(PIP) install --no-build-isolation --no-deps -e .
	@site="$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
		printenv DECLARED > "$$site/declared_operators.py" && echo "import declared_operators" > "$$site/declared_operators.pth"
	@touch .venv-vllm/.installed

OTHERS := $(shell grep -e '^ftfy' -e '^torchvision' -e '^wcwidth' constraints-vit.txt)
.venv-versions/%/.installed: .venv/.installed .venv-oldest/.installed constraints-vit.txt
	$(call over,.venv-versions/$*,$(if $(filter 0.9%,$*),.venv-oldest,.venv),$(OTHERS) $(subst _, open_clip_torch==,timm==$*))
.PRECIOUS: .venv-versions/%/.installed

comma := ,

.PHONY: clean
clean:
	rm -rf .venv .venv-oldest .venv-vit .venv-versions .venv-vllm build dist results site .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find vlprune tests -name __pycache__ -type d -prune -exec rm -rf {} +
