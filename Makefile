# The front door. `make` alone says what there is. `make demo` and `make test` need nothing set up before.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
TESTS ?= tests
# A make inside a test is not a part of this one.
WITHOUT_MAKE := env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL
SOURCES := $(wildcard src tests tools examples bench)

.PHONY: help setup setup-dev demo test check format sync bench doctor clean

help: ## Say what `make` can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Make .venv with agentos in it

setup-dev: $(VENV)/.installed-dev ## The same, with what tests and checks need

demo: setup ## Boot a VM and show what it can do
	@$(PYTHON) -m agentos demo

test: setup-dev ## Run the tests (TESTS=path picks some)
	$(WITHOUT_MAKE) $(PYTHON) -m pytest $(TESTS)

check: setup-dev ## Lint, format, types, generated files, import rules
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy
	$(PYTHON) tools/generate_sync.py --check
	$(PYTHON) -m pytest -q tests/unit/test_layers.py

format: setup-dev ## Format the code and sort the imports
	$(PYTHON) -m ruff check --fix-only --select I $(SOURCES)
	$(PYTHON) -m ruff format $(SOURCES)

sync: setup-dev ## Generate src/agentos/sync.py from the async classes
	$(PYTHON) tools/generate_sync.py

bench: setup-dev ## Measure, and write figures and a plot
	$(PYTHON) -m bench

doctor: setup ## Say what this host offers to VMs, and what it lacks
	@$(PYTHON) -m agentos doctor

clean: ## Remove what the targets above made
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@tools/make_venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo "installing agentos into $(VENV)"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	@echo "installing agentos with its development tools into $(VENV)"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed
