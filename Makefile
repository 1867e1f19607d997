# Two commands: `make demo` shows the main job on real input, `make test` checks everything. `make models` takes longer.
# Both make the environment first, in .venv, from pyproject.toml and the pins in constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test docs notebooks models test-reader bench clean

demo: $(READY)
	@DS_ACCELERATOR=cpu $(BIN)/python examples/demo.py demo  # else DeepSpeed, which tests need, warns where no GPU is

test: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

# Make the documentation site, build/site/index.html, from the pages and docstrings; a link that leads nowhere is an error
docs: $(READY)
	@PYTHONPATH=. $(BIN)/python -m sphinx -c docs -W --keep-going -q -b html . build/site
	@echo "open build/site/index.html"

# Run the notebooks again, and keep what they show: two minutes
notebooks: $(READY)
	@$(BIN)/python scripts/run_notebooks.py

# Check every model type of transformers, and write docs/models-table.md: half an hour on two idle cores; a sweep that was
# stopped goes on where it was
models: $(READY)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.models.sweep --jobs 2

# What an installation without torch can do, with the newest zarr and tensorstore: make test-reader PYTHON=python3.13
test-reader:
	@$(PYTHON) -m venv --clear .venv-reader
	@.venv-reader/bin/python -m pip install -qq --disable-pip-version-check --editable '.[reader-tests]'
	@.venv-reader/bin/python -c 'import sys, zarr, tensorstore, importlib.util; assert importlib.util.find_spec("torch") is None; print("Python", sys.version.split()[0], "zarr", zarr.__version__)'
	@.venv-reader/bin/python -m pytest -q tests/store tests/test_without_extras.py

bench: $(READY)
	@$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) .venv-reader build demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@echo "making the environment in $(VENV) (once, about two minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "Residua needs Python 3.11 or newer, found " + sys.version.split()[0])'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
