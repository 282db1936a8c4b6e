# `make quickstart` shows the whole guide on sample data, `make test` proves the tools. Both install what they need
# into .venv first; nothing is installed outside of it.

PYTHON ?= python3
VENV ?= .venv
# One worker a core, at most four: each starts servers of its own, and a file's tests stay with one of them.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REQUIREMENTS := requirements.txt requirements-dev.txt requirements-falkordb-4.22.txt
CODE := lib scripts tests

.PHONY: quickstart test faults lint bench venv clean

quickstart: venv
	$(BIN)/python scripts/quickstart.py

test: venv
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

# How often each window of a kill matrix is hit; `make test` hits it once.
KILLS_EACH ?= 5

faults: venv
	KILLS_EACH=$(KILLS_EACH) $(BIN)/python -m pytest -q $(PYTEST_ARGS) tests/faults

lint: venv
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: venv
	$(BIN)/python -m tests.bench.bench

venv: $(STAMP)

# Made anew whenever a requirement changes. The newer FalkorDB may have to be compiled: at most ten minutes are
# given to that, and without it the tools say what this machine cannot prove.
$(STAMP): $(REQUIREMENTS)
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -c "$$TRY_FALKORDB_4_22"
	@touch $@

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
