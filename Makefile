# make quickstart   the main job, from nothing: set up, fine-tune the shipped policy, roll it out, write the report
# make ablation     the same from three starts (shipped, fresh action expert, untrained), three seeds each
# make test         lint, types, import contracts, tests
#
# Each needs Python 3.11 to 3.13, and makes .venv when there is none. Another Python: make PYTHON=python3.12 test.
# On a Linux machine without a GPU, torch for CPUs alone is a much smaller download:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart

PYTHON ?= python3
BIN := .venv/bin
SET_UP := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart ablation test lint types imports unit clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: .venv/ready
	$(BIN)/vlafit train quickstart --out runs/quickstart --resume

ablation: .venv/ready
	$(BIN)/python eval/pretraining.py --jobs 2

test: lint types imports unit

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: .venv/ready-dev
	$(BIN)/lint-imports

unit: .venv/ready-dev
	$(BIN)/pytest -n 2 --dist loadfile

clean:
	rm -rf .venv build dist

# ------------------------------------------------------------------------------------------------- set-up

.venv/made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else \
	  "vlafit needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is " + ".".join(map(str, v[:3])) + \
	  ". Name another one: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo \
	  "$(PYTHON) cannot make virtual environments (Debian and Ubuntu keep that in the package python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/ready: .venv/made $(SET_UP)
	@echo "Installing vlafit and Meta-World into .venv (once; some minutes, mostly torch) ..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[metaworld,sweep]'
	@touch $@

# gym-pusht asks for the OpenCV that needs X libraries; this way it gets the headless one (see pyproject.toml).
.venv/ready-dev: .venv/ready
	@echo "Installing PushT and the tools for the tests into .venv (once) ..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[metaworld,pusht-headless,sweep,quantise,dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps gym-pusht
	@touch $@
