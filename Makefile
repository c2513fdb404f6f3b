# make train and make test need Python 3.11 or newer, pip and nothing else: each
# makes the environment in .venv that it needs, then does its job.

PYTHON ?= python3
BIN := .venv/bin/python
WORKDIR ?= runs/moe_32

.PHONY: train test clean

train: .venv/installed
	$(BIN) -m moejax train --config=configs/sotu/moe_32.py \
	  --workdir="$(WORKDIR)"

test: .venv/installed-test
	$(BIN) -m pytest -n auto --dist=worksteal --durations=40

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

clean:
	rm -rf .venv
