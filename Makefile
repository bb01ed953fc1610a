# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
BUILT_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/nybble/kernels/csrc/*)

.PHONY: help setup demo test test-slow lint docs bench gpu-check drills clean

help:
	@echo "make demo       fine-tune a small model on the documentation of Python's standard library"
	@echo "make test       install what the tests need; run the linter, the type checker and the tests"
	@echo "make test-slow  run the slow tests too"
	@echo "make docs       build the site of the documents into build/site; a broken link fails"
	@echo "make bench      measure the kernels, and whole steps against other stacks (in .venv-peers); an hour or two"
	@echo "make gpu-check  on an NVIDIA card: right, how fast, how much memory; eight minutes, nothing is downloaded"
	@echo "make drills     kill, starve, fill and damage runs; writes docs/reliability.md; half an hour, Linux, strace"
	@echo "make setup      make .venv and install nybble into it"
	@echo "make clean      remove .venv, .venv-* and what was built (runs/ stays)"

setup: .venv/.installed

demo: .venv/.installed
	$(BIN)/nybble train examples/demo.yaml

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A process of one thread for each core, and the tests in order, so that what a file's fixtures make is made once. Triton
# decides as it is imported whether to interpret, so the tests of its bodies, which have its name in theirs, run once more
# by themselves, and with them a training step of each family; `test-slow` has all that goes through them.
TESTS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal
test: lint
	$(TESTS)
	TRITON_INTERPRET=1 $(TESTS) -k triton tests/kernels tests/families/test_steps.py

# Folders that nybble writes are opened by transformers 4 too, conversations rendered by other projects, and runs tracked
# by real trackers; those tests are skipped where these cannot be made.
test-slow: lint
	-$(MAKE) .venv-transformers4/.installed
	-$(MAKE) .venv-oracles/.installed
	-$(MAKE) .venv-trackers/.installed
	$(BIN)/python -m pytest -m "not gpu and not benchmark"
	TRITON_INTERPRET=1 $(TESTS) --timeout 1200 -m "not gpu and not benchmark" \
	  -k triton tests/kernels tests/families tests/layers/test_decoder_block.py

docs: .venv/.installed-test
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# BENCH: options for all programs, such as --quick. BENCH_DATA: questions and answers, as for `nybble train --data`.
BENCH ?=
BENCH_DATA ?= builtin:pydoc
bench: .venv/.installed-test .venv-peers/.installed
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_attention.py
	$(BIN)/python benchmarks/bench_four_bit.py $(BENCH)
	$(BIN)/python benchmarks/bench_gemm_limit.py $(BENCH)
	$(BIN)/python benchmarks/bench_families.py $(BENCH)
	$(BIN)/python benchmarks/bench_step.py --data $(BENCH_DATA) $(BENCH)
	$(BIN)/python benchmarks/bench_memory.py --data $(BENCH_DATA) $(BENCH)
	$(BIN)/python benchmarks/bench_generate.py --data $(BENCH_DATA) $(BENCH)
	$(BIN)/python benchmarks/bench_plan.py
	$(BIN)/python benchmarks/bench_paging.py
	$(BIN)/python benchmarks/figures.py

# GPU_CHECK: options, such as --record or --only step.
GPU_CHECK ?=
gpu-check: .venv/.installed-test
	$(BIN)/python benchmarks/gpu_check.py $(GPU_CHECK)

drills: .venv/.installed-test
	$(BIN)/python tests/faults/drills.py

clean:
	rm -rf .venv .venv-peers .venv-transformers4 .venv-oracles .venv-trackers build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "nybble needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "Python's venv module is missing (Debian: apt-get install python3-venv)."; exit 1; }

.venv/.installed: $(BUILT_FROM) | .venv/bin/python
	@echo "Installing nybble and what it needs into .venv (the first time this downloads PyTorch)..."
	$(INSTALL) --editable .
	@touch $@

.venv/.installed-test: $(BUILT_FROM) | .venv/bin/python
	@echo "Installing nybble and what its tests need into .venv (the first time this downloads PyTorch)..."
	$(INSTALL) --editable '.[test,gpu-check,dev,docs]'
	@touch .venv/.installed $@

.venv-peers/.installed: benchmarks/peers/requirements.txt | .venv/bin/python
	@echo "Installing the stacks that nybble is measured against into .venv-peers..."
	$(BIN)/python -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement $<
	@touch $@

# What the list has before what .venv has; PyTorch and the rest are .venv's.
.venv-transformers4/.installed: tests/exporting/transformers4.txt
.venv-oracles/.installed: tests/data/oracles.txt
.venv-trackers/.installed: tests/training/trackers.txt
.venv-transformers4/.installed .venv-oracles/.installed .venv-trackers/.installed: | .venv/bin/python
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@touch $@
