# Each target does all the set-up that it needs: a virtual environment in .venv and the versions of
# constraints.txt in it. Needed on the machine: Python 3.11 and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test slow check clean

help:  ## Say what there is to make.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1	/'

install: $(INSTALLED)  ## Set up .venv.

$(INSTALLED): setup.py constraints.txt
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev,training]"
	touch $@

demo: $(INSTALLED)  ## Draw six prompts, plain and searched, and the search trees.
	$(BIN)/python -m mctd_diffusers demo --output outputs/demo

test: $(INSTALLED)  ## Run the default tests.
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test

slow: $(INSTALLED)  ## Run the slow tests too.
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test -m "slow and not gpu and not hub"

check: $(INSTALLED)  ## Run the linter and the type checker.
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

clean:  ## Take away what the tools left (not .venv, not outputs).
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
