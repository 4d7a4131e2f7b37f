# The commands of the lab. Each makes the virtual environment and installs requirements.txt when needed.
PROFILE ?= cpu
DATA ?=
SEED ?= 0
SET ?=
WEIGHTS ?=
STUDIES ?=
PORT ?= 8888
PYTHON ?= python3
VENV ?= .venv

RUN = $(VENV)/bin/python -m labcore.lab
VARIABLES = PROFILE DATA SEED SET WEIGHTS STUDIES PYTHON VENV PORT
UNKNOWN := $(filter-out $(VARIABLES),$(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v)))
$(if $(UNKNOWN),$(error unknown variable $(UNKNOWN): known are $(VARIABLES)))
# Through the environment and as they are, so that a path may hold blanks, quotes and dollars: make runs none of them.
export LAB_PROFILE := $(value PROFILE)
export LAB_DATA := $(value DATA)
export LAB_SEED := $(value SEED)
export LAB_SET := $(value SET)
export LAB_WEIGHTS := $(value WEIGHTS)
export LAB_STUDIES := $(value STUDIES)
unexport $(VARIABLES)
# glibc would give every large block of memory back and ask for it again, layer by layer. Keeping it saves 10 to 20 % of a
# training step on a CPU (docs/benchmarks). Other systems ignore this.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
export MALLOC_TOP_PAD_ ?= 268435456
# pip does not compile what it installs, which takes a minute or more for packages of which few files are used. Python compiles
# those when they are first imported, and must be allowed to keep what it compiled.
unexport PYTHONDONTWRITEBYTECODE
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder
# JupyterLab would fetch news, and ask for its newest release.
QUIET = --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate
OPTIONS = --profile="$$LAB_PROFILE" --data="$$LAB_DATA" --seed="$$LAB_SEED" --set="$$LAB_SET" --weights="$$LAB_WEIGHTS" --studies="$$LAB_STUDIES"

.PHONY: help report studies data verify test test-fast lab status keep clean
.DEFAULT_GOAL := help

help:
	@echo 'make report   train, quantize, compare; write report/$$PROFILE and figures/$$PROFILE'
	@echo '              PROFILE=smoke|cpu|resnet50|reference  DATA=cifar10|cifar100|digits|PATH  SEED=0  SET="fp32.epochs=2 width=16"'
	@echo '              WEIGHTS=committed or a folder: FP32 weights trained before, so that it takes minutes'
	@echo 'make studies  what report does, and the studies, which are notebooks 05 to 13 without 08 (same options, hours);'
	@echo '              STUDIES="05 09" runs these two only'
	@echo 'make data     fetch CIFAR-10 ahead of time, by torchvision or, where its site cannot be reached, npm'
	@echo 'make verify   every number of report/$$PROFILE again from the results beside it (PROFILE)'
	@echo 'make status   which stage is stale, and why (same options)'
	@echo 'make lab      JupyterLab on this machine, PORT=8888; its notebooks take the same options'
	@echo 'make test     all tests, among them the whole pipeline on profile smoke; make test-fast leaves that out'
	@echo 'make keep     the trained networks of PROFILE beside its report, for WEIGHTS=committed and make lab'
	@echo 'make clean    remove what the runs of PROFILE wrote'

report studies data status keep clean: $(VENV)/.installed
	@$(RUN) $@ $(OPTIONS)

verify: $(VENV)/.installed
	@$(VENV)/bin/python -m labcore.report.verify --profile="$$LAB_PROFILE"

test: $(VENV)/.installed
	@$(PYTEST)

test-fast: $(VENV)/.installed
	@$(PYTEST) -m "not slow"

lab: $(VENV)/.installed
	@$(RUN) restore $(OPTIONS) || true
	@$(VENV)/bin/jupyter lab --ip=127.0.0.1 --port=$(PORT) --allow-root $(QUIET) notebooks

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: Python 3.11 or newer is needed, found '"$$($(PYTHON) --version)"'; give another with PYTHON=python3.12' >&2; exit 1; }
	@echo 'installing requirements.txt into $(VENV) (a few minutes, about 5 GB on Linux)'
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt -e . || { echo 'error: the packages could not be installed; is there a network, and space for 5 GB?' >&2; exit 1; }
	@touch $@
