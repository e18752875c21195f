# vitkernels: `make run` shows it, `make test` proves it. Everything is installed into .venv; nothing else is touched.
VENV    ?= .venv
PYTHON  ?= python3
PY      := $(VENV)/bin/python
STAMPS  := $(VENV)/.stamps
PIP     := $(PY) -m pip install --quiet --disable-pip-version-check
JOBS    ?= 2
# The demo builds CUDA code only where a GPU can run it, to start fast; tests build it wherever nvcc is found.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo auto || echo 0)
BUILD   := VITKERNELS_WERROR=1 $(PY) setup.py --quiet build_ext --inplace
PYTEST  := $(PY) -m pytest
CPP     := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.cu' 'tests/*.cuh' 2>/dev/null)

.PHONY: run build test test-all test-gpu test-emu-tsan test-emu-asan bench-gpu bench lint format clean

run: $(STAMPS)/package
	VITKERNELS_CUDA=$(HAS_GPU) $(BUILD)
	$(VENV)/bin/vitkernels demo $(ARGS)

build: $(STAMPS)/test
	VITKERNELS_EMULATOR=1 $(BUILD)

test: build
	$(PYTEST) -n $(JOBS) $(ARGS)

# Everything that fits no quarter of an hour: all architectures and settings, long fuzz.
test-all: build
	$(PYTEST) -n $(JOBS) -m "not gpu" $(ARGS)

# On a machine with an NVIDIA GPU, into the records of OUT (benchmarks/results/); the same command goes on where it
# stopped. PART is one or more of numerics, determinism, sanitize; of bench-gpu kernels, models.
test-gpu: build
	$(PY) -m benchmarks.gpu $(or $(PART),numerics determinism sanitize) $(if $(OUT),--out $(OUT)) $(ARGS)

bench-gpu: build
	$(PY) -m benchmarks.gpu $(or $(PART),kernels models) $(if $(OUT),--out $(OUT)) $(ARGS)

# Emulated kernels under ThreadSanitizer, or AddressSanitizer: races and bounds, no GPU needed (csrc/emulator/README.md).
test-emu-tsan test-emu-asan: test-emu-%: build
	VITKERNELS_EMULATOR=1,$* $(BUILD)
	$(PYTEST) -m slow tests/test_emulator_sanitizers.py -k $* $(ARGS)

bench: build
	$(PY) -m benchmarks $(ARGS)

lint: $(STAMPS)/lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(STAMPS)/lint
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info vitkernels/lib vitkernels/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# --- the environment, one stamp a step -------------------------------------------------------------------------------
$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/run: requirements/run.txt $(STAMPS)/venv
	@echo "Installing the pinned packages (torch is large; this happens once)"
	$(PIP) -r requirements/run.txt
	touch $@

$(STAMPS)/package: pyproject.toml $(STAMPS)/run
	VITKERNELS_NATIVE=0 $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(STAMPS)/test: requirements/test.txt requirements/peers.txt $(STAMPS)/package
	$(PIP) -r requirements/test.txt
	$(PIP) --no-deps -r requirements/peers.txt
	touch $@

# mypy reads torch's types, so linting needs what running needs.
$(STAMPS)/lint: requirements/lint.txt $(STAMPS)/run
	$(PIP) -r requirements/lint.txt
	touch $@
