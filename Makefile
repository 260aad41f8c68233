# make setup | demo | test | lint. Everything else sets up first.
PYTHON ?= python3
VENV ?= .venv
# Another torch for a machine with a GPU: make setup TORCH='torch==2.13.0' TORCH_INDEX=<index URL of a CUDA build>
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
EXTRAS ?= dev

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test test-slow lint bench clean
setup: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip 'setuptools>=77' wheel numpy
	$(BIN)/python -m pip install --quiet '$(TORCH)' $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)')
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

# The whole recipe at toy scale on this machine; the report is runs/demo/report.html.
demo: setup
	$(BIN)/python train.py stage=recipe model=tiny preset=demo

# A test process a core, each with one thread: most tests are too small to gain from more.
TESTERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(TESTERS) --dist loadfile

test: setup
	$(PYTEST) -m 'not slow and not gpu'

test-slow: setup
	$(PYTEST) -m 'slow and not gpu'

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build *.egg-info internlm2/ops/*.so
