PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Everything that one run needs lives under the checkout, so that runs never share a build lock.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo demo-quick test lint format package clean

setup: $(STAMP)

# torch first and pinned: an unpinned torch would pull gigabytes of CUDA wheels on a CPU machine.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,mpi,minilm,lora,low-bit,kernels,monitor]'
	touch $(STAMP)

demo: setup
	$(BIN)/python -m slimfit_ds.cli compare --config recipes/minilm_banking.yaml --ranks 2 --strategies full,lora,minimal

# A small ViT from scratch on scikit-learn's digits, in two minutes.
demo-quick: setup
	$(BIN)/python -m slimfit_ds.cli compare --config recipes/digits_vit.yaml --ranks 2 --strategies full,slimfit,minimal_host

# Two workers of one thread each; the tests of a file stay together and share what they have set up.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without isolation: setuptools is in the environment, and nothing has to be fetched.
package: setup
	rm -rf build dist
	$(BIN)/python -m build -q --no-isolation
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) .cache outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
