# `make train` and `make test` work on a fresh machine with Python >= 3.10 and a C++ compiler. The first
# target to run makes .venv: on top of the PyTorch that PYTHON has where there is one, else with TORCH.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Where TORCH is looked for beside PyPI, whose builds for Linux come with several GB of CUDA.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),https://pypi.org/simple,https://download.pytorch.org/whl/cpu)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# A file of tests goes to one process, so that what its tests share is made once. Threads that wait must leave the
# cores to other processes.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile
CPP := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.h)
TEST_CPP := $(shell find tests -name '*.h' -o -name '*.cpp')

.PHONY: help train test test-all test-versions bench lint format info clean
help:
	@echo "make train      train on the digits, draw samples, print the figures (ARGS='--steps 100 ...')"
	@echo "make test       the tests, under 10 minutes       make test-all   the slow ones too"
	@echo "make test-versions   the tests under other versions of Python, PyTorch, Triton, compiler, settings"
	@echo "make bench      the benchmarks                    make lint       what CI checks; make format mends"
	@echo "make info       which backends can run here"

# The folders of PYTHON's packages go into .venv's path: PYTHON may itself belong to an environment, whose
# packages --system-site-packages would not show.
FOLDERS := import sys, torch; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	if folders=$$($(PYTHON) -c '$(FOLDERS)' 2>/dev/null); then \
	  echo "$$folders" > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/installed.pth; \
	else \
	  $(BIN)/python -m pip install -q "$(TORCH)" --extra-index-url $(TORCH_INDEX); \
	fi
	$(BIN)/python -c "from importlib.metadata import version; print('PyTorch', version('torch'))" > $@

# Installed again, and the edited sources compiled again, when any of these has changed.
$(INSTALLED): $(VENV)/torch pyproject.toml setup.py CMakeLists.txt $(CPP)
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@

train: $(INSTALLED)
	$(BIN)/python -m imf.train $(ARGS)

test: $(INSTALLED)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED)
	$(PYTEST) $(ARGS)

# ARGS="'python3.10*' --tests tests/test_jvp.py" for some rows and tests only.
test-versions: $(INSTALLED)
	$(BIN)/python tests/versions.py $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP) $(TEST_CPP)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(TEST_CPP)

info: $(INSTALLED)
	$(BIN)/python -m imf_kernels.info

clean:
	rm -rf $(VENV) build *.egg-info imf_kernels/_C.*.so
