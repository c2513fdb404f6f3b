# make train and make test need Python 3.11 or newer, pip and nothing else: each
# makes the environment in .venv that it needs, then does its job.

PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/moe_32

.PHONY: train test clean

train: .venv/installed
	$(BIN)/moejax train --config=configs/sotu/moe_32.py --workdir=$(WORKDIR)

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto

# pip installs into the environment from outside: a plain machine's Python may
# lack what it takes to put pip inside.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moejax needs Python 3.11 or newer, but $(PYTHON) is older or" \
	    "missing; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --without-pip .venv

.venv/installed: setup.py .venv/bin/python
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable .
	@touch $@

.venv/installed-test: setup.py .venv/installed
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv
