# `make help` lists the targets. They install what they need into .venv first; nothing is installed outside of it.

PYTHON ?= python3
VENV ?= .venv
# Each worker starts servers and waits for them: one more than there are cores, at most eight. A file's tests stay with one.
PYTEST_ARGS ?= -n $(shell $(PYTHON) -c "import os; print(min(8, 1 + (os.cpu_count() or 1)))") --dist loadfile --no-loadscope-reorder
# How often each window of a kill matrix is hit.
KILLS_EACH ?= 1

BIN := $(VENV)/bin
# The tests' arrays are small: the linear algebra's threads would only wait for each other.
PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)
STAMP := $(VENV)/.installed
REQUIREMENTS := requirements.lock requirements-falkordb-4.22.txt
CODE := lib scripts tests

.PHONY: help quickstart test faults test-all lint bench pictures venv lock size clean

help:
	@echo 'make quickstart  the whole guide on sample data, in a sandbox on this machine'
	@echo 'make test        what shows that the product works: minutes'
	@echo 'make faults      the rest: kills, damage, network, further cases (KILLS_EACH=5 hits each kill window five times)'
	@echo 'make test-all    both'
	@echo 'make lint        ruff, mypy, import-linter'
	@echo 'make bench       figures as ratios, in bench.json and as a table'
	@echo 'make pictures    docs/pictures from a run in the sandbox; needs Chromium for the last one'
	@echo 'make venv        only install into .venv (PYTHON=python3.12 chooses the Python)'
	@echo 'make lock        requirements.lock after a change of requirements*.txt (UPGRADE=--upgrade takes the newest versions)'
	@echo 'make size        files, lines and depth of imports of each package'
	@echo 'make clean       remove .venv and caches'

quickstart: venv
	$(BIN)/python scripts/quickstart.py

test: venv
	$(PYTEST) -m "not matrix"

faults: venv
	KILLS_EACH=$(KILLS_EACH) $(PYTEST) -m matrix

test-all: venv
	KILLS_EACH=$(KILLS_EACH) $(PYTEST)

lint: venv
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: venv
	$(BIN)/python -m tests.bench.bench

pictures: venv
	$(BIN)/python -m tests.pictures

venv: $(STAMP)

# Recreated whenever a requirement changes. If the newer FalkorDB must be compiled, that may take at most ten minutes.
# Without it the tools report what this machine cannot verify.
$(STAMP): $(REQUIREMENTS)
	@echo 'installing into $(VENV): about two minutes'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -c "$$TRY_FALKORDB_4_22"
	@touch $@

# For CPython 3.10 to 3.13 on Linux and macOS, in one file. Versions that are locked stay, unless UPGRADE is set.
lock: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
		--no-emit-index-url --custom-compile-command 'make lock' $(UPGRADE) requirements-dev.txt -o requirements.lock

size: venv
	$(BIN)/python -m tests.size

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache bench.json

define TRY_FALKORDB_4_22
import os, signal, subprocess, sys
if sys.version_info < (3, 12):
    sys.exit()
words = [sys.executable, "-m", "pip", "install", "--quiet", "-r", "requirements-falkordb-4.22.txt"]
child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
try:
    code = child.wait(timeout=600)
except subprocess.TimeoutExpired:
    os.killpg(child.pid, signal.SIGKILL)
    code = 1
if code:
    print("FalkorDB 4.22 (optional) does not install here: backups of FalkorDB 4.18 and later are checked, not loaded")
endef
export TRY_FALKORDB_4_22
