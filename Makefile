# make figures              set up, get the data, bring every figure up to date, print a table   (FORCE=1: run every figure again)
# make figure PAPER=lion    run one figure again
# make test                 set up, get the data, nbdev_test and pytest
# make lab                  JupyterLab on the notebooks
# make bench                benchmarks against peers
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: help figures figure test lab bench data setup
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

# the environment is made anew when what it is made from changes; a half-made one is never taken for whole
$(BIN)/.ready: settings.ini setup.py constraints.txt
	@echo "== set-up: .venv with the versions of constraints.txt (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"Python 3.10 or newer is needed, this is {v.major}.{v.minor}; name one with PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(BIN)/.ready

data: setup
	@echo "== data: from the store in this repository (.dvc/store)"
	@dvc pull --quiet --allow-missing

figures: data
	@python -m efftrain.pipeline figures $(if $(FORCE),--force)

figure: data
	@test -n "$(PAPER)" || { echo "error: name the paper, for example: make figure PAPER=lion"; exit 2; }
	@python -m efftrain.pipeline figures --force $(PAPER)

test: data
	@echo "== nbdev_test: every notebook, figures at smoke scale"
	@nbdev_test --n_workers 2 --do_print
	@echo "== pytest"
	@python -m pytest

bench: setup
	@OMP_NUM_THREADS=$$(nproc) python -m pytest benchmarks -p no:xdist

lab: data
	@jupyter lab --notebook-dir nbs
