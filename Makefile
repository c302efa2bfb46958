# Every target makes its own environment in .venv first; nothing else on the machine is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
WORK   ?= /tmp/liborth-bench
MINUTES ?= 30
TIER   ?= small
WORKERS ?= 2
PEERS  := .venv-peers
CORE   := tests/test_cli.py tests/test_split_excise.py tests/test_manifest.py $(addprefix tests/checkpoint/test_,blockscaled.py documents.py journal.py signing.py)

.PHONY: help demo test test-slow test-oldest test-newest torture lint hooks format docs session notebook site build release-check clean
.PHONY: bench bench-mergekit bench-own bench-before bench-memory bench-curvature bench-curvature-memory bench-70b bench-gpu bench-surgery bench-tofu bench-real

help:            ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 24

demo: $(VENV)/.ready   ## set everything up and run the main job on the real pair that ships with liborth
	@$(BIN)/liborth demo

test: lint   ## ruff, pyright and the tests, file by file on WORKERS=2 processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.ready   ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-oldest:     ## the core's tests with the oldest dependencies that pyproject.toml allows, in .venv-oldest; TORCH=VERSION for another torch
	$(PYTHON) -m venv .venv-oldest
	sed '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' constraints-oldest.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/constraints.txt -e . pytest hypothesis
	.venv-oldest/bin/python -m pytest $(CORE)

test-newest:     ## the same with the newest ones there are, in .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q -U -e . pytest hypothesis $(if $(TORCH),torch==$(TORCH))
	.venv-newest/bin/python -m pytest $(CORE)

torture: $(VENV)/.ready   ## kills, failing disks, flipped bits, hostile trees, damaged files; MINUTES=30; goes on where it stopped
	$(BIN)/python -m tools.torture.campaign --minutes $(MINUTES) --work $(WORK)/torture

lint: $(VENV)/.ready   ## ruff and pyright; never edits
	$(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	$(BIN)/pyright --pythonpath $(BIN)/python

hooks: $(VENV)/.ready   ## check what is committed, with ruff and the house rules
	$(BIN)/pre-commit install

format: $(VENV)/.ready   ## let ruff edit
	$(BIN)/ruff check --fix -q . && $(BIN)/ruff format .

docs: $(VENV)/.ready   ## write docs/cli.md and the README's demo table from the commands, and draw the charts of docs/methods.md
	$(BIN)/python tools/write_docs.py
	$(BIN)/python benchmarks/frontier.py

session: $(VENV)/.ready   ## type the README's terminal session and record it in docs/session.svg; half a minute
	$(BIN)/python tools/record_session.py docs/session.svg

notebook: $(VENV)/.ready   ## run docs/notebook.ipynb; a minute
	$(BIN)/python -m pytest -m slow tests/test_api.py

site: $(VENV)/.ready   ## the documentation as a site, in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q

build: $(VENV)/.ready   ## one wheel with both packages, and the source
	$(BIN)/python -m build --no-isolation

release-check: build   ## install wheel and source each into an environment of its own, and run what was installed
	$(BIN)/python tools/release_check.py dist

bench: bench-mergekit bench-own bench-memory bench-curvature bench-curvature-memory bench-70b   ## all that a CPU can settle; an hour and a half

bench-mergekit: $(VENV)/.ready $(PEERS)/.ready $(WORK)/pair/.ready   ## against mergekit, both cores and one; writes docs/benchmarks.md
	$(BIN)/python benchmarks/peers.py --pair $(WORK)/pair --peers $(PEERS)/bin --work $(WORK)/peers --repeat 5
	$(BIN)/python benchmarks/peers.py --pair $(WORK)/pair --peers $(PEERS)/bin --work $(WORK)/peers --repeat 3 --cores 0

bench-own: $(VENV)/.ready $(WORK)/pair/.ready   ## our commands against each other and the floor; writes docs/benchmarks.md
	$(BIN)/python benchmarks/rates.py --pair $(WORK)/pair --work $(WORK)/rates
	$(BIN)/python benchmarks/copying.py --pair $(WORK)/pair --work $(WORK)/copying
	$(BIN)/python benchmarks/one_matrix.py
	taskset -c 0 $(BIN)/python benchmarks/profile_split.py --pair $(WORK)/pair --work $(WORK)/profile

bench-before: $(VENV)/.ready $(WORK)/pair/.ready   ## our commands against an older tree, OLD=a worktree of it; writes docs/benchmarks.md
	$(BIN)/python benchmarks/against_before.py --old $(OLD) --pair $(WORK)/pair --work $(WORK)/before

bench-70b: $(VENV)/.ready   ## a 70B from its headers and one real layer; writes docs/benchmarks.md
	$(BIN)/python benchmarks/seventy.py --work $(WORK)/seventy --layer

bench-memory: $(VENV)/.ready   ## peak memory at three depths; writes docs/benchmarks.md
	$(BIN)/python benchmarks/memory.py --work $(WORK)/memory
	$(BIN)/python benchmarks/one_walk.py --work $(WORK)/one-walk

bench-gpu: $(VENV)/.ready   ## what only an NVIDIA GPU can settle: kernels and whole commands; writes docs/benchmarks.md
	$(BIN)/python benchmarks/gpu.py --work $(WORK)/gpu

bench-surgery: $(VENV)/.ready   ## kinds of memory, every edit and the rivals, attacked; DATA=DIR, TIER=small or full; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks.surgery.pairs --data $(DATA) --work $(WORK)/surgery --tier $(TIER)
	$(BIN)/python -m benchmarks.surgery.run --work $(WORK)/surgery --tier $(TIER)

bench-tofu: $(VENV)/.ready   ## made-up authors (TOFU), small tier; DATA=folder of tofu and tinystories; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks.surgery.tofu --tier small --data $(DATA)/tofu --stories $(DATA)/tinystories/train_944k.txt \
	  --work $(WORK)/tofu
	$(BIN)/python -m benchmarks.surgery.tofu --work $(WORK)/tofu --publish

bench-real: $(VENV)/.ready   ## SmolLM2-135M fine-tuned and split in every way; DATA=folder of gsm8k, wikitext2, tinystories; two hours
	$(PIP) install -q --no-deps -r benchmarks/real/needs.txt
	$(BIN)/python -m benchmarks.real.run --data $(DATA) --work $(WORK)/real

bench-curvature: $(VENV)/.ready   ## curvature against kronfluence on one core; writes docs/benchmarks.md
	$(PIP) install -q --no-deps -r benchmarks/curvature_peers.txt
	$(BIN)/python benchmarks/curvature_peers.py --work $(WORK)/curvature

bench-curvature-memory: $(VENV)/.ready   ## peak memory of curvature at three depths; writes docs/benchmarks.md
	$(BIN)/python benchmarks/curvature_depths.py --work $(WORK)/curvature-depths

clean:           ## remove the environments and everything built
	rm -rf $(VENV) $(PEERS) .venv-oldest .venv-newest dist build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml constraints.txt tests/oracles.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "liborth needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[test,dev]'
	$(PIP) install -q --no-deps -r tests/oracles.txt
	@touch $@

# torch comes first and pinned, so that nothing the peers depend on brings another one.
$(PEERS)/.ready: constraints.txt benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q -c constraints.txt torch
	$(PEERS)/bin/python -m pip install -q -c constraints.txt -r benchmarks/peers.txt
	@touch $@

$(WORK)/pair/.ready: benchmarks/make_pair.py | $(VENV)/.ready
	$(BIN)/python benchmarks/make_pair.py $(WORK)/pair
	@touch $@
