# Every target makes its own environment in .venv first; nothing else on the machine is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
WORK   ?= /tmp/liborth-bench
PEERS  := .venv-peers

.PHONY: help demo test test-slow lint format docs build bench bench-gpu bench-memory bench-curvature bench-curvature-memory clean

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 24

demo: $(VENV)/.ready   ## set everything up and run the main job on the real pair that ships with liborth
	@$(BIN)/liborth demo

test: $(VENV)/.ready   ## set everything up and pass the tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	$(BIN)/python -m pytest

test-slow: $(VENV)/.ready   ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready   ## ruff and pyright; never edits
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.ready   ## let ruff edit
	$(BIN)/ruff check --fix -q . && $(BIN)/ruff format .

docs: $(VENV)/.ready   ## write docs/cli.md and the README's demo table from the commands
	$(BIN)/python tests/write_docs.py

build: $(VENV)/.ready   ## one wheel with both packages
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m build --wheel

bench: $(VENV)/.ready $(PEERS)/.ready $(WORK)/pair/.ready   ## against mergekit; writes docs/benchmarks.md
	$(BIN)/python tests/benchmarks/peers.py --pair $(WORK)/pair --peers $(PEERS)/bin --work $(WORK)/peers --repeat 3

bench-memory: $(VENV)/.ready   ## peak memory at three depths; writes docs/benchmarks.md
	$(BIN)/python tests/benchmarks/memory.py --work $(WORK)/memory

bench-gpu: $(VENV)/.ready   ## what only an NVIDIA GPU can settle: kernels and whole commands; writes docs/benchmarks.md
	$(BIN)/python tests/benchmarks/gpu.py --work $(WORK)/gpu

bench-curvature: $(VENV)/.ready   ## curvature against kronfluence on one core; writes docs/benchmarks.md
	$(PIP) install -q --no-deps -r tests/benchmarks/curvature_peers.txt
	$(BIN)/python tests/benchmarks/curvature_peers.py --work $(WORK)/curvature

bench-curvature-memory: $(VENV)/.ready   ## peak memory of curvature at three depths; writes docs/benchmarks.md
	$(BIN)/python tests/benchmarks/curvature_depths.py --work $(WORK)/curvature-depths

clean:           ## remove the environments and everything built
	rm -rf $(VENV) $(PEERS) dist build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml constraints.txt tests/oracles.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "liborth needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[test]'
	$(PIP) install -q --no-deps -r tests/oracles.txt
	@touch $@

# torch comes first and pinned, so that nothing the peers depend on brings another one.
$(PEERS)/.ready: constraints.txt tests/benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q -c constraints.txt torch
	$(PEERS)/bin/python -m pip install -q -c constraints.txt -r tests/benchmarks/peers.txt
	@touch $@

$(WORK)/pair/.ready: tests/benchmarks/make_pair.py | $(VENV)/.ready
	$(BIN)/python tests/benchmarks/make_pair.py $(WORK)/pair
	@touch $@
