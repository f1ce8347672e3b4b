# make demo: from nothing to a plan. make test: the test suite. make docs: the documentation as a
# site, its commands run. make matrix: every kind of plan of every model, run and compared. Each sets
# up .venv once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test matrix lint docs setup clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[hf,dev]'
	touch $@

demo: setup
	$(BIN)/plan trace examples/llama.py --hardware h100x64

test: setup
	$(BIN)/python -m pytest

matrix: setup
	$(BIN)/python tests/matrix.py

# The site in build/site, links checked; then every command of the pages is run, and the wheel.
docs: setup
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --quiet
	$(BIN)/python -m pytest docs/site

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info
