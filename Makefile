# Everything starts from here: `make run` and `make test` create the environment they need.
# `make help` lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.complete

# The interpreter that the environment is made from: Python 3.11 if there is one, else a newer one.
PYTHON ?= $(shell for name in python3.11 python3 python; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$name"; break; }; done)

# What to run, and with how many simulated SuperNodes.
APP        ?= apps/quickstart
SUPERNODES ?= 10
# More options for apps/run.py, for instance ARGS="--run-config 'num-server-rounds=3'"
ARGS       ?=

.PHONY: help
help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{ printf "  make %-18s %s\n", $$1, $$2 }'

.PHONY: env
env: $(STAMP) ## Create the environment, or bring it up to date

# The variables hold for the isolated build of flsplit itself, in older and in newer pips.
PIP_INSTALL = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet

# The stamp is written last: an interrupted installation is taken up again by the next make.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: flsplit needs Python 3.11 or newer (make PYTHON=/path/to/python3.11)" >&2; exit 1; }
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

.PHONY: run
run: $(STAMP) ## Run an app in a simulation (APP=apps/quickstart SUPERNODES=10 ARGS=...)
	@$(BIN)/python apps/run.py $(APP) --num-supernodes $(SUPERNODES) $(ARGS)

# Finished runs are kept, so a comparison that was stopped goes on. Other data, or arguments that
# change numbers, need another folder: ARGS="--dataset mnist --data-dir /path/to/data --out mnist".
.PHONY: compare
compare: $(STAMP) ## Compare all methods: digits, skewed and IID labels, 3 seeds
	@$(BIN)/python apps/compare/compare.py --alpha 0.1 inf --fleet apps/quickstart/fleet.toml \
		--out runs/compare $(ARGS)

.PHONY: compare-quick
compare-quick: $(STAMP) ## The same, shorter, with fewer methods
	@$(BIN)/python apps/compare/compare.py --quick --alpha 0.1 inf --fleet apps/quickstart/fleet.toml \
		--out runs/compare-quick $(ARGS)

.PHONY: compare-decoupled
compare-decoupled: $(STAMP) ## FSL-SAGE, CSE-FSL and what changes them, SplitFed, FedAvg: bytes
	@$(BIN)/python apps/compare/compare.py --methods decoupled ablations --alpha 1 \
		--out runs/compare-decoupled $(ARGS)

# MNIST as torchvision keeps it: ARGS="--data-dir /path/to/data".
.PHONY: privacy
privacy: $(STAMP) ## Accuracy against leakage against bytes: all rows, 2 cuts, 3 seeds (docs/privacy.md)
	@$(BIN)/python apps/privacy/privacy.py --out runs/privacy $(ARGS)

.PHONY: privacy-quick
privacy-quick: $(STAMP) ## The same, shorter: some rows, one cut, one seed
	@$(BIN)/python apps/privacy/privacy.py --quick --out runs/privacy-quick $(ARGS)

.PHONY: compare-llm
compare-llm: $(STAMP) ## Compare the methods on language models: 3 seeds
	@$(BIN)/python apps/llm/compare_llm.py --out runs/llm $(ARGS)

.PHONY: test
test: $(STAMP) ## Run the tests: the quick ones, then those that start Flower, several at a time
	@$(BIN)/python -m pytest -m 'not e2e and not long' --numprocesses 2 --dist worksteal $(ARGS)
	@$(BIN)/python -m pytest -m 'e2e and not long' --numprocesses 3 --dist worksteal $(ARGS) \
		$$(grep -rl --include 'test_*.py' pytest.mark.e2e tests)

.PHONY: test-long
test-long: $(STAMP) ## Run the tests that "test" leaves out because they take long, but those of "chaos"
	@$(BIN)/python -m pytest -m 'long and not chaos' --numprocesses 2 --dist worksteal $(ARGS)

.PHONY: test-gpu
test-gpu: $(STAMP) ## Compare what a GPU computes with what the processor does (a build of torch with CUDA)
	@FLSPLIT_TEST_GPU=1 $(BIN)/python -m pytest $(ARGS) tests/strategies/test_devices.py

.PHONY: chaos
chaos: $(STAMP) ## Disturb runs in every way we know; ends with a table of the faults
	@$(BIN)/python -m pytest -m chaos --chaos-table $(ARGS)

.PHONY: fuzz
fuzz: $(STAMP) ## Run the property tests with ten times as many examples
	@$(BIN)/python -m pytest --hypothesis-profile thorough $(ARGS) \
		$$(grep -rl --include 'test_*.py' '^@given' tests)

# A tenth of it is among the tests. Some models come with the extra "zoo", which nothing else needs.
.PHONY: zoo
zoo: $(STAMP) ## Cut many models and compare them with the uncut ones, bit for bit
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[zoo]'
	@$(BIN)/python tests/cut/zoo.py $(ARGS)

.PHONY: lint
lint: $(STAMP) ## Check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy --strict -p flsplit

.PHONY: format
format: $(STAMP) ## Mend style and format where ruff can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# torch and torchvision stay as they are: a newer one may be there as a CUDA build only, and brings
# gigabytes with it. Suffixes like "+cpu" are left out: any build of the pinned version will do.
.PHONY: constraints
constraints: ## Pin the newest versions of everything but torch
	rm -rf build/fresh
	$(PYTHON) -m venv build/fresh
	grep -E '^(#|torch==|torchvision==)' constraints.txt > build/kept.txt
	build/fresh/bin/python -m pip install --quiet --constraint build/kept.txt '.[zoo]'
	{ grep '^#' constraints.txt; build/fresh/bin/python -m pip freeze --all --exclude pip --exclude flsplit \
		| sed -E 's/\+[a-z0-9.]+$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/fresh

.PHONY: clean
clean: ## Remove the environment, caches and what runs left behind
	rm -rf $(VENV) .flwr-home .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
