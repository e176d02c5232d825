# `make help` lists the targets. Each installs into .venv first where that is missing or out of date.
#
#   make demo PYTHON=python3.12      another interpreter
#   make test EXTRAS=dev,docs,fid    other extras of pyproject.toml
#   make test ARGS="-k shards -x"    arguments for pytest, or for the command of another target

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

comma := ,
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# A name on the PATH may be a version manager's stub that runs nothing, so each candidate has to prove itself.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then echo $$p; break; fi; done)
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
EXTRAS ?= dev,docs$(if $(GPU),$(comma)cuda)
# PyTorch's own index of builds without CUDA, as its installation page gives it.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help install demo starter test test-all lint docs bench recipes campaign clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(STAMP) ## install into .venv

demo: $(STAMP) ## every stage on synthetic CT and MR, from volumes to a report, in 7 to 15 minutes on two cores
	$(BIN)/segdiff demo $(ARGS)

starter: $(STAMP) ## make the small model of `segdiff paint` again, from the phantom: about an hour on two cores; resumes
	$(BIN)/segdiff demo --config starter
	rm -rf build/starter && mkdir -p build
	$(BIN)/segdiff export build/starter --run runs/starter/run --format pipeline --config starter \
		--export.precision bf16 --export.segmenter --export.about segdiff_dist/configs/starter_card.md \
		--export.data-licence "Apache-2.0, as the phantom that segdiff computes; no patient"
	rm -rf segdiff_dist/starter && mv build/starter segdiff_dist/starter

test: $(STAMP) ## the tests, on the real engines, in about 15 minutes on two cores, 30 on old ones
	@# Three files at a time: a test often waits for processes that start. Threads of their own would only fight for the
	@# cores. In the order that tests/conftest.py gives them: a long file that begins last leaves a core idle. With
	@# bytecode, whatever the environment says: the tests start hundreds of processes that import the same modules.
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

test-all: $(STAMP) ## the same with the rest of every grid (marked `exhaustive`)
	$(MAKE) test ARGS='-m "" $(ARGS)'

lint: $(STAMP) ## style, spelling, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell --toml pyproject.toml -D - -D docs/british.txt
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP) ## the documentation as a site, into site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(STAMP) ## measure kernels, loader, training and sampling on this machine, into benchmarks/results
	@for script in kernels/benchmarks/*.py benchmarks/*.py; do \
		case "$$(basename "$$script")" in _*|recipes.py|objectives.py|models.py|opening_picture.py) continue;; esac; \
		[ -e "$$script" ] || { echo "$$script: none yet"; continue; }; \
		echo "$$script"; \
		$(BIN)/python "$$script" --json "benchmarks/results/$$(basename "$$script" .py)-$$(hostname).json" $(ARGS); \
	done

recipes: $(STAMP) ## train the paper's recipe and ours side by side: hours, in pieces (ARGS="--budget-minutes 55")
	$(BIN)/python benchmarks/recipes.py --out runs/recipes --jobs 2 $(ARGS)

campaign: $(STAMP) ## damaged inputs and random kills, continued from the last call (ARGS="mutations --budget-minutes 30")
	@# Kinds: ARGS="mutations nifti tar --number 5000 --seed 1", ARGS="kills train sample"; figures: ARGS=table.
	PYTHONPATH=tests:. OMP_NUM_THREADS=1 $(BIN)/python -m campaign $(ARGS)

clean: ## remove build products and caches; .venv and runs/ stay
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "error: Python 3.11 or 3.12 not found; name one with PYTHON=/path/to/python3.12" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { \
		echo "error: $(PYTHON) cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@# torch on its own and first: a build that is at hand is taken before anything else asks for a range of versions.
	@# Without a GPU it is the build for CPUs, a tenth of the size. PyTorch's index is asked first whether it answers, so
	@# that an installation from other indexes works where it does not.
	index=""; [ -n "$(GPU)" ] || ! $(BIN)/python -c \
		"import urllib.request; urllib.request.urlopen('$(TORCH_CPU_INDEX)/torch/', timeout=10).close()" 2>/dev/null \
		|| index="--extra-index-url $(TORCH_CPU_INDEX)"; \
	$(BIN)/pip install --quiet -c constraints.txt $$index torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
