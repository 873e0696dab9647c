# make test    environment (first time), style check and tests      make lint    style and types
# make demo    the four methods on Fashion-MNIST and one report     make native  the CPU library again
# make test-floor  kernels, methods, steps and the null GPU again on the lowest promised versions
# make soak    200 kills and stops of one run                        SOAK_CYCLES=...  another number
# PYTHON=...   interpreter of the new environment                   DEMO_FLAGS=...  options of each demo run
# TEST_FLAGS=...  options of pytest, in place of those that spread the files over the cores
# FLOOR_TESTS=...  what test-floor runs
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
METHODS := ce kd dfpt dfpt_plus
SOAK_CYCLES ?= 200
TEST_FLAGS ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# The lowest versions in setup.py; triton comes with torch.
FLOOR := .venv-floor
# numpy: the interpreter of Triton 3.6 fails with newer ones.
FLOOR_VERSIONS := torch==2.11.0 torchvision==0.26.0 "numpy<2.4"
FLOOR_TESTS ?= tests/kernels tests/engine/methods tests/engine/test_step.py tests/null_gpu

.PHONY: install test test-floor lint native demo aot soak

install: $(STAMP)

# torch comes first: the native library is built against it, and no build isolation may fetch another.
$(STAMP): setup.py pyproject.toml CMakeLists.txt $(wildcard kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "torch>=2.11" "torchvision>=0.26" "setuptools>=77" cmake
	$(BIN)/python -m pip install --no-build-isolation -e ".[dev]"
	touch $@

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest $(TEST_FLAGS)

# No cmake there: the native library of the first environment serves, as one build is to do for all.
$(FLOOR)/.installed: $(STAMP)
	test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install $(FLOOR_VERSIONS) "setuptools>=77"
	$(FLOOR)/bin/python -m pip install --no-build-isolation -e ".[test]"
	touch $@

test-floor: $(FLOOR)/.installed
	$(FLOOR)/bin/python -m pytest $(TEST_FLAGS) $(FLOOR_TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

native: $(STAMP)
	$(BIN)/dfptkd doctor --build-native

demo: $(STAMP)
	for method in $(METHODS); do \
	  $(BIN)/dfptkd train quickstart --method $$method --seeds 0,1,2 $(DEMO_FLAGS) || exit $$?; \
	done
	$(BIN)/dfptkd report runs/quickstart-*-seed* --out runs/quickstart.html

# Compiles every Triton kernel for every architecture and dtype, without a GPU; fails on a spill.
aot: $(STAMP)
	$(BIN)/python -m dfptkd.bench.aot

# Ends in the bits of a run that nothing has disturbed.
soak: $(STAMP)
	DFPTKD_SOAK_CYCLES=$(SOAK_CYCLES) $(BIN)/python -m pytest tests/faults/test_soak.py -s
