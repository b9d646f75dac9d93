# Everything runs in a virtual environment that is built here when pyproject.toml changes.
VENV ?= .venv
PYTHON ?= python3
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

python := $(VENV)/bin/python
run_stamp := $(VENV)/.run.stamp
dev_stamp := $(VENV)/.dev.stamp

.PHONY: help venv serve test lint clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-6s %s\n", $$1, $$2 }'
	@echo 'Variables: VENV (now $(VENV)), PYTHON (now $(PYTHON)), ARGS.'

venv: $(dev_stamp) ## build the virtual environment with everything that tests and linters need

serve: $(run_stamp) ## serve the demo model, or ARGS="--model ..."; ARGS go to the server
	@exec $(python) -m server $(ARGS)

test: $(dev_stamp) ## run the tests; ARGS go to pytest
	$(python) -m pytest $(ARGS)

lint: $(dev_stamp) ## check style, format and types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

clean: ## remove caches, builds and .venv (another VENV is left alone)
	find . -name __pycache__ -type d -not -path './.git/*' -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist .venv

$(python):
	$(PYTHON) -m venv '$(VENV)'

$(run_stamp): pyproject.toml | $(python)
	$(python) -m pip install --quiet --editable .
	@touch $@

$(dev_stamp): pyproject.toml | $(python)
	$(python) -m pip install --quiet --editable '.[dev]'
	@touch $@ $(run_stamp)
