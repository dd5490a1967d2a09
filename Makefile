# For a machine with Python 3.10 or newer, g++ and make. Every target makes and updates its own .venv
# from constraints.txt; nothing else on the machine is touched.
#   PYTHON=python3.12 make test   another interpreter      ARGS="..." make bench   more arguments

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The interpreter at hand: .venv's where there is one, whatever PYTHON says by now.
HERE := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
TAG = $(shell $(1) -c 'import sys; print(sys.implementation.cache_tag)' 2>/dev/null)
BUILD := build/$(call TAG,$(HERE))
NATIVE := CMakeLists.txt setup.py fastrnn/_version.py $(shell find csrc -type f 2>/dev/null)
CXX_SOURCES := $(filter %.cc %.h %.cu %.cuh,$(NATIVE))
HYPOTHESIS_CASES ?= 20000
CUDA_ARCH ?= 90a
# Tests that run side by side: one is mostly Python, or an emulator, on one core.
JOBS ?= $(shell nproc)

export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help same-python build test pytest cpp-test cuda cuda-all wheel wheel-test bench bench-full gpu docs lint format fuzz \
        sanitize emulate-avx512 clean

help:
	@echo "make test        C++ tests, pytest, the wheel in an empty environment, with nvcc the CUDA gate"
	@echo "make bench       fastrnn verified against torch.nn and timed beside it, then a real training run"
	@echo "make bench-full  the whole grid, results under benchmarks/results"
	@echo "make wheel       sdist and wheel under dist/"
	@echo "make lint        ruff, clang-format, mypy        make format    ruff and clang-format in place"
	@echo "make fuzz        $(HYPOTHESIS_CASES) random cases per hypothesis test"
	@echo "make cuda        CUDA kernels through nvcc and ptxas for CUDA_ARCH=$(CUDA_ARCH)    make cuda-all    for all"
	@echo "make gpu         on a machine with a GPU: build, test and measure there, in stages that resume"
	@echo "make docs        the documentation site under build/site; needs Python 3.11"
	@echo "make sanitize    C++ tests under ASan + UBSan, then TSan"
	@echo "make emulate-avx512   the AVX-512 kernels tested on a machine that has AVX2 only, slowly"
	@echo "make build       .venv with the library installed in place"

# ---- environment -------------------------------------------------------------------------------------------
# A .venv stays what it is: one of another version than PYTHON=... asks for is not touched.
same-python:
ifneq ($(origin PYTHON),file)
	@test "$(call TAG,$(PYTHON))" = "$(notdir $(BUILD))" || { \
	  echo "$(VENV) is of $(notdir $(BUILD)), not of PYTHON=$(PYTHON): \`make clean\` first, or leave out PYTHON" >&2; exit 1; }
endif

$(VENV)/.tools: constraints.txt scripts/preflight.sh | same-python
	@PYTHON="$(PYTHON)" scripts/preflight.sh
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) install --quiet setuptools cmake ninja pybind11
	@touch $@

# No build isolation here: the build tools are pinned in .venv already, and the build folder keeps its objects.
$(VENV)/.installed: $(VENV)/.tools pyproject.toml $(NATIVE)
	$(PIP) install --quiet --no-build-isolation --editable ".[dev]"
	@cat $(BUILD)/summary.txt
	@touch $@

build: $(VENV)/.installed

# ---- tests ---------------------------------------------------------------------------------------------------
# The last one says so and passes where there is no nvcc.
test: cpp-test pytest wheel-test cuda

cpp-test: build
	$(BIN)/cmake -S . -B $(BUILD) -DFASTRNN_BUILD_TESTS=ON > $(BUILD)/configure.log
	$(BIN)/cmake --build $(BUILD) --target fastrnn_tests
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --parallel $(JOBS)

# With the CUDA kernels compiled for the SIMT emulator, so that their backend is tested without a GPU.
pytest: build
	$(BIN)/cmake -S . -B $(BUILD) -DFASTRNN_BUILD_TESTS=ON > $(BUILD)/configure.log
	$(BIN)/cmake --build $(BUILD) --target _cuda_emulated
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 20 -m "not wheel and not slow" $(ARGS)

wheel-test: wheel
	FASTRNN_WHEEL="$$(ls dist/*.whl)" $(BIN)/python -m pytest -m wheel tests/packaging

# No spill, no local memory, register bounds; needs nvcc, no GPU.
cuda: $(VENV)/.tools
	$(BIN)/python scripts/cuda_gate.py --arch $(CUDA_ARCH) $(ARGS)

cuda-all: $(VENV)/.tools
	$(BIN)/python scripts/cuda_gate.py $(ARGS)

fuzz: build
	FASTRNN_HYPOTHESIS_CASES=$(HYPOTHESIS_CASES) $(BIN)/python -m pytest -o faulthandler_timeout=0 tests/test_hypothesis.py $(ARGS)

# On a machine with AVX2; where AVX-512 is, the tests above run its kernels.
emulate-avx512: build
	scripts/emulate_avx512.sh $(BIN)/python $(ARGS)

sanitize: $(VENV)/.tools
	scripts/sanitize.sh $(BIN)/cmake address,undefined
	scripts/sanitize.sh $(BIN)/cmake thread

# ---- benchmarks ------------------------------------------------------------------------------------------------
bench: build
	$(BIN)/python -m benchmarks --quick $(ARGS)
	$(BIN)/python examples/sequential_digits.py

bench-full: build
	$(BIN)/python -m benchmarks --full $(ARGS)

# In the environment at hand, which has torch for the GPU: .venv where there is one, else $(PYTHON). No index is asked.
gpu:
	@$(HERE) -m benchmarks.gpu $(ARGS)

# ---- documentation -----------------------------------------------------------------------------------------------
# Warnings are errors: a dead link, a page outside the navigation, an API name that is not there.
docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# ---- release and style -------------------------------------------------------------------------------------------
# Under build isolation, as a stranger's pip; the wheel takes the objects that `build` has compiled.
wheel: build
	@rm -rf dist build/lib.* build/bdist.*
	$(BIN)/python -m build --sdist --wheel --outdir dist

lint: build
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build dist $(VENV) *.egg-info fastrnn/*.so
