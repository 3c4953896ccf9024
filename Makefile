# Two commands for a newcomer: `make study` and `make test`. Each sets up what it needs, and is quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERIAL := build/serial
SANITIZE := build/sanitize
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/normkit/csrc/*)

.PHONY: study test check bench bench-gpu sanitize clean

study: $(VENV)/installed
	$(BIN)/normkit study $(ARGS)

test: $(VENV)/installed-dev $(SERIAL)/built
	NORMKIT_SERIAL_CORE=$(SERIAL) $(BIN)/python -m pytest $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror src/normkit/csrc/*.h src/normkit/csrc/*.cpp

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/cpu.py $(ARGS)

# On a machine with a GPU, in an environment that has a CUDA build of torch, triton and, as a peer, liger-kernel.
bench-gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	{ echo "bench-gpu needs a torch that finds a CUDA device; name its Python with make bench-gpu PYTHON=..."; exit 1; }
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(ARGS)

# The tests of the core on a build with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/installed-dev $(SANITIZE)/built
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	NORMKIT_TEST_CORE=$(SANITIZE) $(BIN)/python -m pytest tests/test_core.py -p no:xdist $(ARGS)

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "normkit needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); name another one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "pip>=25.1"  # the first that reads dependency groups
	@touch $@

# torch first and by its pin: an unpinned one may bring gigabytes of CUDA. The build runs in this environment, so that
# nothing is fetched twice.
$(VENV)/installed: $(VENV)/created $(SOURCES)
	@command -v $${CXX:-c++} > /dev/null || { echo "normkit needs a C++17 compiler to build its CPU core and found no $${CXX:-c++}; \
	install one (on Debian: apt-get install g++) or name it with CXX=..."; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt scikit-build-core nanobind cmake ninja
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation --editable ".[study]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --group dev
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --group bench
	@touch $@

$(SERIAL)/built $(SANITIZE)/built: %/built: $(VENV)/installed
	@mkdir -p build; echo "building the core again for the tests: $*"
	@$(BIN)/cmake -S . -B $* -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  $(if $(filter $(SANITIZE),$*),-DNORMKIT_SANITIZE=ON,-DNORMKIT_OPENMP=OFF) > $*.log 2>&1 \
	  && $(BIN)/cmake --build $* >> $*.log 2>&1 || { cat $*.log; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build
