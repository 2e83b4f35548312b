# Every target works on a fresh checkout by itself: it makes .venv, installs, runs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamps

# Built-in sources that need a rebuild; Python files are picked up by the editable install.
NATIVE := CMakeLists.txt pyproject.toml $(wildcard cpu_backend/csrc/*)
CXX_FILES := $(wildcard cpu_backend/csrc/*.cpp cpu_backend/csrc/*.h tests/cpu_backend/*.cpp \
  tests/cpu_backend/*.h)

.PHONY: demo test test-all check format sanitize bench bench-peers bench-plan soak clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    start a server with the bundled model, ask it twice, stop it"
	@echo "make test    the tests (about 6 minutes on 2 cores)"
	@echo "make check   ruff, mypy --strict, import-linter, clang-format"
	@echo "make sanitize   the C++ under AddressSanitizer and UBSan, on random input (about 4 minutes)"
	@echo "make bench   short benchmarks of this machine"
	@echo "make bench-peers   beside llama.cpp and transformers (an hour; 50 GB of disk)"
	@echo "make bench-plan  what moeserve plan predicts beside what the engine does (two hours)"
	@echo "make soak    64 streams with cancels for 2 minutes against a real server"

# torch goes in first and alone: pip then takes the build named by TORCH (a CPU wheel where one is
# configured) and nothing later replaces it. An interpreter that already has torch keeps its own.
$(STAMP)/venv:
	if $(PYTHON) -c "import torch" 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	mkdir -p $(STAMP) && touch $@

$(STAMP)/install: $(STAMP)/venv $(NATIVE)
	$(BIN)/pip install -q "scikit-build-core>=0.11" "nanobind>=2.4" "cmake>=3.18" ninja
	$(BIN)/pip install -q --no-build-isolation -e .
	touch $@

$(STAMP)/test: $(STAMP)/install
	$(BIN)/pip install -q --no-build-isolation -e ".[test]"
	touch $@

$(STAMP)/check: $(STAMP)/test
	$(BIN)/pip install -q --no-build-isolation -e ".[test,check]"
	touch $@

# llama-cpp-python is built from source here, so that it uses what this processor has.
$(STAMP)/peers: $(STAMP)/install
	$(BIN)/pip install -q --no-build-isolation -e ".[peers]"
	touch $@

demo: $(STAMP)/install
	$(BIN)/python scripts/demo.py

# So many processes run tests, a file at a time (0: make's own, all of them). torch is given one
# thread by each: idle ones of OpenMP spin, on a core that the other process wants.
TEST_JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile

test: $(STAMP)/test
	$(PYTEST) -m "not slow"

test-all: $(STAMP)/test
	$(PYTEST)

check: $(STAMP)/check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p moeserve
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(STAMP)/check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# ARGS="seconds seed": how long, and a seed that an earlier run printed.
sanitize: $(STAMP)/install
	$(BIN)/cmake -S . -B build/sanitize -DCMAKE_BUILD_TYPE=Debug -DMOESERVE_FUZZ=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) > /dev/null
	$(BIN)/cmake --build build/sanitize --target fuzz_native
	build/sanitize/fuzz_native $(ARGS)

bench: $(STAMP)/install
	$(BIN)/python scripts/bench_decode.py

bench-peers: $(STAMP)/peers
	$(BIN)/python scripts/bench_peers.py $(ARGS)

# Goes on where a run was stopped; ARGS="--again" measures anew, "--configs 12" a part, "--rounds 3" evens out more.
bench-plan: $(STAMP)/test
	$(BIN)/python scripts/bench_plan.py --calibrate --out benchmarks/results $(ARGS)

soak: $(STAMP)/test
	$(BIN)/python scripts/soak.py --seconds 120

clean:
	rm -rf $(VENV) build dist
