# make test | demo | lint | browser | test-faults | test-parity | test-aot | test-schemathesis | test-clients: each does
# all its own set-up.
#   PYTHON=...         the Python (3.12 or newer) that .venv is made from, where the search below finds none
#   DEMO_ARGS=...      more arguments for the demo, such as --short
#   TEST_ARGS=...      more arguments for pytest, such as -k scheduler
#   PARITY_PYTHON=...  the Python of environments with torch, where it has no build for the first one

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PARITY := .venv-parity
AOT := .venv-aot
SCHEMATHESIS := .venv-schemathesis
CLIENTS := .venv-clients
PYTHON ?=
PARITY_PYTHON ?=
DEMO_ARGS ?=
TEST_ARGS ?=

SEARCHED = python3.12 python3 python3.13 python3.14 \
	"$${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$(cat .python-version)"*/bin/python3
# pip compiles one file after another; --no-compile leaves that to compileall, which uses every core.
INSTALL = -m pip install --quiet --quiet --disable-pip-version-check --prefer-binary --no-compile
# The folder of models and recorded results that some tests compare with; without it they are skipped, and say so.
SHARED := $(abspath ../shared)
TEST_ENVIRONMENT = JAX_PLATFORMS=cpu $(if $(wildcard $(SHARED)),FLEXJAX_SHARED="$${FLEXJAX_SHARED:-$(SHARED)}")

# $(call make_venv,FOLDER,PYTHON): an empty virtual environment from the first Python >= 3.12 that can make one
define make_venv
found=""; for python in $(if $(2),$(2),$(SEARCHED)); do \
	if "$$python" -c 'import ensurepip, sys, venv; sys.exit($(3))' 2>/dev/null; then found="$$python"; break; fi; \
done; \
if [ -z "$$found" ]; then \
	echo "error: no usable Python found for $(1); it needs Python 3.12 or newer with its venv module" >&2; \
	echo "  tried: " $(if $(2),$(2),$(SEARCHED)) >&2; \
	echo "  install one (Debian: apt-get install python3.12-venv; pyenv: pyenv install) or name one: make PYTHON=/path" >&2; \
	exit 1; \
fi; \
echo "$(1): made from $$("$$found" -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
rm -rf $(1); "$$found" -m venv $(1)
endef

.PHONY: help venv test demo lint browser test-faults test-parity test-aot test-schemathesis test-clients clean

help:
	@echo "make test         set up .venv and run the tests"
	@echo "make demo         set up .venv, serve and finetune a real model side by side (DEMO_ARGS=--short for less)"
	@echo "make lint         ruff and the import contracts"
	@echo "make browser      headless Chromium of Debian's packages, if there is none, for the tests of the dashboard's page"
	@echo "make test-faults  kill the service, fill its disk, tear its files: the tests of faults, many times (minutes)"
	@echo "make test-parity  install torch and peft into .venv-parity (large) and compare with them"
	@echo "make test-aot     install jax's CUDA compiler into .venv-aot (large) and compile the kernels for an H100; no GPU"
	@echo "make test-schemathesis  install schemathesis into .venv-schemathesis and send what /openapi.json describes, and worse"
	@echo "make test-clients install openai 2 and 3, litellm, lm-eval and guidellm (large: torch) and have them use the service"
	@echo "make clean        remove environments, caches and what runs wrote"

venv: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(call make_venv,$(VENV),$(PYTHON),sys.version_info < (3, 12))
	@echo "$(VENV): installing the pinned dependencies (about a minute; more on a slow line)"
	@$(VENV)/bin/python $(INSTALL) --constraint constraints.txt --editable ".[server,bench,test]"
	@echo "$(VENV): compiling them to bytecode"
	@$(VENV)/bin/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@
	@echo "$(VENV): ready"

# In several processes, unless TEST_ARGS choose: compiled programs take memory maps of their process, some hundred each, and
# the kernel allows 65,530; beyond, the compiler crashes.
test: venv
ifneq ($(TEST_ARGS),)
	$(TEST_ENVIRONMENT) $(VENV)/bin/python -m pytest $(TEST_ARGS)
else
	$(TEST_ENVIRONMENT) $(VENV)/bin/python -m pytest tests/pallas_kernels
	$(TEST_ENVIRONMENT) $(VENV)/bin/python -m pytest tests/steps
	$(TEST_ENVIRONMENT) $(VENV)/bin/python -m pytest --ignore tests/pallas_kernels --ignore tests/steps
endif

demo: venv
	$(VENV)/bin/flexjax demo configs/demo.toml $(DEMO_ARGS)

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-logo

# The page of the dashboard is tested in a real browser, which is no Python package. Its names are those of
# tests/server/browser.py.
CHROMIUM := chromium-headless-shell chromium chromium-browser google-chrome
browser:
	@if command -v $${FLEXJAX_CHROMIUM:-} $(CHROMIUM); then echo "is there already"; else \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends chromium-headless-shell >/dev/null; \
	fi

# What the tests of faults try once in `make test`, ten times; what came of it is in the file of results.
FAULTS := $(addprefix tests/server/test_,kill.py torn_database.py corrupt_uploads.py full_disk.py small_disk.py load.py \
	adapter_churn.py broken_device.py)
FAULT_RESULTS := benchmarks/results/reliability.json

test-faults: venv
	rm -f $(FAULT_RESULTS)
	$(TEST_ENVIRONMENT) FLEXJAX_FAULT_TRIES=10 FLEXJAX_FAULT_RESULTS=$(abspath $(FAULT_RESULTS)) \
		$(VENV)/bin/python -m pytest $(FAULTS) $(TEST_ARGS)

# torch lives apart: its builds may lag behind the newest Python, and on Linux it brings several GB of libraries.
# The tests run in .venv and ask the other Python, named in FLEXJAX_PARITY_PYTHON, for results to compare with.
test-parity: venv $(PARITY)/ready
	$(TEST_ENVIRONMENT) FLEXJAX_PARITY_PYTHON=$(abspath $(PARITY))/bin/python \
		$(VENV)/bin/python -m pytest tests/parity $(TEST_ARGS)

$(PARITY)/ready: constraints-parity.txt
	@$(call make_venv,$(PARITY),$(PARITY_PYTHON),sys.version_info < (3, 10))
	@echo "$(PARITY): installing torch, transformers and peft (large: minutes)"
	@$(PARITY)/bin/python $(INSTALL) --constraint constraints-parity.txt torch transformers peft numpy safetensors
	@touch $@
	@echo "$(PARITY): ready"

# The CUDA plugin makes jax look for a GPU, so it lives apart, without the libraries that only a GPU could load: the
# plugin and CUDA's compiler are enough to compile for a GPU that is not there.
test-aot: $(AOT)/ready
	JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 $(AOT)/bin/python -m pytest tests/aot $(TEST_ARGS)

$(AOT)/ready: pyproject.toml constraints.txt constraints-aot.txt
	@$(call make_venv,$(AOT),$(PYTHON),sys.version_info < (3, 12))
	@echo "$(AOT): installing the pinned dependencies and jax's CUDA compiler (large: minutes on a slow line)"
	@$(AOT)/bin/python $(INSTALL) --constraint constraints.txt --editable ".[test]"
	@$(AOT)/bin/python $(INSTALL) --no-deps --requirement constraints-aot.txt
	@touch $@
	@echo "$(AOT): ready"

# A client that no one here wrote makes requests of the document that the service gives of itself. It lives apart: it
# brings an HTTP client and a pytest of its own.
test-schemathesis: venv $(SCHEMATHESIS)/ready
	$(TEST_ENVIRONMENT) FLEXJAX_SCHEMATHESIS=$(abspath $(SCHEMATHESIS))/bin/schemathesis \
		$(VENV)/bin/python -m pytest tests/clients/test_schemathesis.py $(TEST_ARGS)

$(SCHEMATHESIS)/ready: constraints-schemathesis.txt
	@$(call make_venv,$(SCHEMATHESIS),$(PYTHON),sys.version_info < (3, 12))
	@echo "$(SCHEMATHESIS): installing schemathesis"
	@$(SCHEMATHESIS)/bin/python $(INSTALL) --constraint constraints-schemathesis.txt schemathesis
	@touch $@
	@echo "$(SCHEMATHESIS): ready"

# Each lives apart, since they do not agree on what they need. Their scripts say what they saw, and the tests, run in
# .venv, compare it with a float64 model, with transformers and with PEFT.
CLIENT_NAMES := openai2 openai3 litellm lm-eval guidellm
CLIENT_RESULTS := benchmarks/results/clients.json

test-clients: venv $(PARITY)/ready $(CLIENT_NAMES:%=$(CLIENTS)/%/ready)
	rm -f $(CLIENT_RESULTS)
	$(TEST_ENVIRONMENT) FLEXJAX_CLIENTS=$(abspath $(CLIENTS)) FLEXJAX_CLIENT_RESULTS=$(abspath $(CLIENT_RESULTS)) \
		FLEXJAX_PARITY_PYTHON=$(abspath $(PARITY))/bin/python $(VENV)/bin/python -m pytest \
		$(addprefix tests/clients/test_,openai.py litellm.py lm_eval.py peft.py guidellm.py) $(TEST_ARGS)

$(CLIENTS)/%/ready: constraints-clients-%.txt
	@$(call make_venv,$(@D),$(CLIENT_PYTHON),sys.version_info < (3, 11))
	@echo "$(@D): installing $*"
	@$(@D)/bin/python $(INSTALL) --requirement $<
	@touch $@
	@echo "$(@D): ready"

$(CLIENTS)/%/ready: CLIENT_PYTHON = $(PYTHON)
$(CLIENTS)/guidellm/ready: CLIENT_PYTHON = $(PARITY_PYTHON)

clean:
	rm -rf $(VENV) $(PARITY) $(AOT) $(SCHEMATHESIS) $(CLIENTS) build dist *.egg-info runs out .cache
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
