# The whole project in a few words; `make help` lists them.
#
# A fresh machine needs Python 3.10 or newer (with its venv module), git and make. `make setup` installs everything else
# into .venv, once: later calls reuse it until pyproject.toml changes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
QUIET  := $(if $(CI),--quiet)

# Small models on few cores: more threads than work makes them several times slower.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help venv setup demo test test-slow test-full test-packaging test-browser test-slurm check pretrain clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | \
	  while IFS='|' read -r name text; do printf '  make %-15s %s\n' "$$name" "$$text"; done
	@echo
	@echo '  Variables: PYTHON=python3.12 (for the first setup), ARGS="..." (passed on to the demo, pytest or pretraining)'
	@echo
	@echo '  torch: setup takes the build that pip takes, on Linux the one for CUDA (several GB). To have another one, such'
	@echo '  as the small build for the CPU, tell pip in its own way (pip.conf or PIP_* variables: they are honoured), or'
	@echo '  run `make venv`, install torch and torchvision into .venv yourself, then `make setup`: it keeps what fits.'

venv: ## make an empty .venv and stop there
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'sam3-lora needs Python 3.10 or newer; name one: make setup PYTHON=python3.12' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo 'Could not make $(VENV). On Debian and Ubuntu the venv module is a package: apt install python3-venv' >&2; exit 1; }

setup: $(STAMP) ## install sam3-lora and its development tools into .venv
	@:

# pip learned --group in 25.1.
$(STAMP): pyproject.toml
	@$(MAKE) --no-print-directory venv
	@echo 'Installing into $(VENV) (the first time takes minutes: torch is large)'
	@$(BIN)/python -m pip install $(QUIET) --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install $(QUIET) --editable . --group dev
	@touch $(STAMP)

demo: setup ## fine-tune a tiny SAM3 on shapes that it has never seen; results in runs/demo
	@$(BIN)/sam3-lora demo $(ARGS)

test: setup ## run the tests in two processes (ARGS="-k attention" for some of them)
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: setup ## run the tests that take minutes each
	@$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

test-full: setup ## run the tests on the full-size model, one at a time (several GB of memory)
	@$(BIN)/python -m pytest -m 'full or counts' $(ARGS)

test-packaging: setup ## build the source archive and the wheel, and test them installed
	@$(BIN)/python -m pytest -m packaging $(ARGS)

test-browser: setup ## look at a report in headless Chromium, light and dark (Debian: apt install chromium)
	@$(BIN)/python -m pytest -m browser $(ARGS)

test-slurm: setup ## submit jobs to a real Slurm on this machine (Debian or Ubuntu, as root; installs slurm-wlm and munge)
	@scripts/slurm-sandbox $(BIN)/python -m pytest -m slurm $(ARGS)

check: setup ## everything to run before a commit: format, lint, types, layers, tests, build
	@scripts/check $(ARGS)

pretrain: setup ## train the tiny base again from scratch (up to two hours on one core; goes on after a stop)
	@$(BIN)/python scripts/pretrain_tiny.py $(ARGS)

clean: ## remove caches and build results; keeps .venv and runs
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	@find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
