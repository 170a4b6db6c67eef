# `make help` lists the targets. `make quickstart` and `make test` do all the set-up on a fresh machine.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# Further arguments for pip, for example PIP_ARGS="--index-url ..." to choose a torch build.
PIP_ARGS ?=
VENV := .venv
# What pip is told of versions; test-newest takes none but those of setup.py.
VERSIONS := -c constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# pytest workers; 1 switches the parallel runner off.
WORKERS ?= 2
# The slow tests wait for other processes a third of their time.
SLOW_WORKERS ?= 3

# Of setup.py: everything that the project and its tests need.
EXTRAS := quickstart,dev,alpaca-eval
# Modules are compiled when they are first imported: half of the set-up's time went into modules that nothing imports.
INSTALL = $(BIN)/python -m pip install --no-compile --disable-pip-version-check $(VERSIONS) $(PIP_ARGS) -e '.[$(EXTRAS)]'
COUNT = awk -v live=$$([ -t 1 ] && echo 1 || echo 0) '/^Collecting/ { count++; if (live) { printf "\r  %d packages: %-60.60s", count, $$2; fflush() } } \
    /^Successfully installed/ { done = 1 } \
    END { if (live && count) print ""; if (done) print "  " (count ? count " packages were missing and are installed" : "all packages are there") }'

.PHONY: help setup quickstart test test-slow test-nightly test-newest check style schema

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with everything the project needs
	@echo "setup: $(BIN) is ready"
	@echo "next: . $(BIN)/activate && recipes doctor"

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' || { \
	    echo "setup: Python 3.11 to 3.14 is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
	    echo "  name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@[ -x $(BIN)/python ] || { echo "setup: creating $(VENV) with $$($(PYTHON) --version)"; \
	    $(PYTHON) -m venv $(VENV) || { echo "setup: could not create $(VENV) (Debian and Ubuntu: apt install python3-venv)" >&2; rm -rf $(VENV); exit 1; }; }
	@echo "setup: installing the packages of setup.py into $(VENV) (about 2 GB with the CPU build of torch; minutes on a first run)"
	@if command -v uv > /dev/null && uv pip install --quiet --python $(BIN)/python $(VERSIONS) $(PIP_ARGS) -e '.[$(EXTRAS)]'; \
	    then echo "  installed by uv"; else $(INSTALL) | $(COUNT); fi
	@touch $@

quickstart: setup  ## train two small adapters on this machine and compare them
	@$(BIN)/recipes study run recipes/studies/quickstart.yaml
	@echo "the report, for a browser: $${RECIPES_RUNS_ROOT:-runs}/quickstart/report/report.html"
	@echo "next: . $(BIN)/activate && recipes chat quickstart--r8 quickstart--r32"

test: setup  ## run the fast tests
	$(BIN)/python -m pytest -m "not slow and not nightly" -n $(WORKERS) --dist worksteal

test-slow: setup  ## run the tests that take minutes or start several processes
	$(BIN)/python -m pytest -m "slow and not nightly" -n $(SLOW_WORKERS) --dist worksteal

test-nightly: setup  ## run grids of model families, kill moments, disks and simulations; not in CI
	$(BIN)/python -m pytest -m nightly -n $(SLOW_WORKERS) --dist worksteal

test-newest:  ## run the fast tests on the newest versions that setup.py allows, in an environment of their own
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest VERSIONS=

check: setup  ## check style, types and every YAML
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	files=0; $(BIN)/mypy & types=$$!; \
	    $(BIN)/recipes check --full $(wildcard recipes accelerate_configs evals launch examples) || files=$$?; \
	    wait $$types && exit $$files

style: setup  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: setup  ## write schema/ from the installed versions
	$(BIN)/python -m recipes_lib.config.schema  # upstream's fields, of which the schemas are made
	$(BIN)/python -m recipes_lib.config.schema
