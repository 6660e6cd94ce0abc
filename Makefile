# These do everything on a machine that has Python >= 3.11, git and make:
#   make demo      set up, then shapes -> teacher -> cache -> students -> report in build/demo
#   make test      set up, then format, lint, types and a selection of the tests: every package, command and method
#   make test-all  the whole matrix of the tests, with branch coverage
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# processes of the tests, each with one thread
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal
# percent of lines and branches, just below what it is
COVERAGE := 96
# the stamp is written last, so an interrupted installation is done again; it is as new as the files it was made from
STAMP := $(VENV)/.kdcli-installed
DOCS_STAMP := $(VENV)/.kdcli-docs-installed

.PHONY: demo test test-all test-slow check format bench docs clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'kdcli needs Python >= 3.11; set PYTHON=...')"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/kdcli demo --out build/demo --overwrite

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy

test: check
	$(PYTEST) -m "not slow and not gpu and not full"

test-all: $(STAMP)
	$(PYTEST) -m "not slow and not gpu" --cov=kdcli --cov-report=term --cov-fail-under=$(COVERAGE)

test-slow: $(STAMP)
	$(BIN)/pytest -q -m "slow"

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/step_cost.py

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

# the site, in build/site; a broken link fails it
docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
