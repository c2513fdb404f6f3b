# Every target needs Python 3.11 or newer and pip, and nothing else: each makes
# the environment in .venv that it needs, then does its job.

PYTHON ?= python3
BIN := .venv/bin/python
WORKDIR ?= runs/moe_32

.PHONY: help train test lint docs notebooks clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

train: .venv/installed ## train 4 of 32 experts on the presidents' messages
	$(BIN) -m moejax train --config=configs/sotu/moe_32_muon.py \
	  --workdir="$(WORKDIR)"

test: .venv/installed-test ## run all tests
	$(BIN) -m pytest -n auto --dist=worksteal --durations=40

lint: .venv/installed-test ## check style, and who imports whom
	$(BIN) -m ruff check
	$(BIN) -m ruff format --check
	.venv/bin/lint-imports --no-cache tests/importlinter.ini

docs: .venv/installed-test ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN) -m mkdocs build

notebooks: .venv/installed-test ## run the notebooks anew, with their pictures
	$(BIN) -m notebooks.execute

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moejax needs Python 3.11 or newer, but $(PYTHON) is older or" \
	    "missing; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || $(PYTHON) -m venv --clear --without-pip .venv

# A plain machine's Python may lack what it takes to put pip inside the
# environment; its own pip then installs from outside.
install = if $(BIN) -m pip --version >/dev/null 2>&1; \
  then $(BIN) -m pip install --quiet --editable $(1); \
  else $(PYTHON) -m pip --python $(BIN) install --quiet --editable $(1); fi

.venv/installed: setup.py .venv/bin/python
	@echo "installing moejax into .venv (once)"
	@$(call install,.)
	@touch $@

.venv/installed-test: setup.py .venv/installed
	@echo "installing what the tests need into .venv (once)"
	@$(call install,'.[test]')
	@touch $@

clean: ## remove the environment and the documentation
	rm -rf .venv site
