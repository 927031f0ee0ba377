# make demo | test | test-tensorrt | test-onnxruntime | test-package | verify-status | native | lint | types | clean. README.md says what each gives.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell command -v $(p) > /dev/null 2>&1 && \
  $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $(p))))
BIN := .venv/bin
NATIVE := build/dev/.installed
PYTEST := PYTHONPATH=. $(BIN)/python -m pytest
# A process for each core, each with one thread for PyTorch; a file's tests stay together, for its fixtures and their order.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n auto --maxprocesses 8 --dist loadfile
MODEL := models/byte-lm-4m
TEXT := tests/data/heldout.txt
PACKAGE := $(shell find hyperattention export validate -type f -not -path '*/lib/*' -not -name '*.pyc')

.PHONY: demo test test-tensorrt test-onnxruntime test-gpu test-package verify-status lint types native fetch clean help

help:
	@sed -n 1p Makefile

# --- set-up ---

.venv/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one and run make PYTHON=/path/to/python3"; exit 3; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || \
	  { echo "$(PYTHON) has no venv module (Debian: apt install python3-venv)"; exit 3; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --group dev
	$(BIN)/python -m pip install --quiet --no-build-isolation -C wheel.cmake=false -C editable.mode=inplace --editable .
	@touch $@

# The compiler's wheels go into a folder of their own: torch brings other releases of the same wheels into .venv.
CUDA_WHEELS = $(BIN)/python -c 'import tomllib; print(*(r for r in tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"] if r.startswith("nvidia-")))'
.deps/cuda/.installed: pyproject.toml | .venv/.installed
	@wheels=$$($(CUDA_WHEELS)); if [ "$$wheels" != "$$(cat $@ 2> /dev/null)" ]; then \
	  echo "CUDA compiler: $$wheels"; rm -rf .deps/cuda; $(BIN)/python -m pip install --quiet --no-deps --target .deps/cuda $$wheels || exit 3; fi; \
	  echo "$$wheels" > $@

# Without MAKEFLAGS: ninja would ask for the jobserver of a parallel make, which only a recursive make is handed.
native: $(NATIVE)
$(NATIVE): CMakeLists.txt $(wildcard cmake/* tests/trt_*) $(shell find plugins -type f) .deps/cuda/.installed | .venv/.installed
	$(BIN)/cmake -S . -B build/dev -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python --log-level=NOTICE
	env -u MAKEFLAGS $(BIN)/cmake --build build/dev
	$(BIN)/cmake --install build/dev --prefix .
	@touch $@

# --- what to run ---

demo: out/demo/manifest.json
	@$(BIN)/hyperattention inspect out/demo
	@echo "report: out/demo/report/report.html"

out/demo/manifest.json: $(NATIVE) $(PACKAGE) $(wildcard $(MODEL)/*) $(TEXT)
	$(BIN)/export-model $(MODEL) out/demo --input-ids bytes --text $(TEXT) --lengths 8192,16384,32768

lint: .venv/.installed
	$(BIN)/ruff check .

types: .venv/.installed
	$(BIN)/pyright

test: lint $(NATIVE)
	$(PARALLEL) -m "not tensorrt and not gpu and not package"

# Builds the sdist and, in isolation, a wheel from it; the wheel is installed and used elsewhere.
test-package: .venv/.installed
	$(PYTEST) -m package tests/test_package.py

test-gpu: $(NATIVE)
	$(PYTEST) -m gpu

# The plugin once more, against the headers of 11.4: either library has to run in either release.
build/dev/headers-11.4/.built: $(NATIVE)
	$(BIN)/cmake -S . -B build/dev -DHYPERATTENTION_TENSORRT_VARIANTS=11.4 --log-level=NOTICE
	env -u MAKEFLAGS $(BIN)/cmake --build build/dev
	@touch $@

TENSORRT := $(patsubst %,.deps/tensorrt/%/.installed,10.6 11.2)
ONNXRUNTIME := $(patsubst %,.deps/onnxruntime/%/.installed,1.20 1.24 1.31)
# What test-tensorrt and test-onnxruntime need besides: 2 GB to fetch while something else compiles.
fetch: $(TENSORRT) $(ONNXRUNTIME)

test-tensorrt: build/dev/headers-11.4/.built $(TENSORRT)
	$(MAKE) --no-print-directory run-tensorrt-10.6
	$(MAKE) --no-print-directory run-tensorrt-11.2

.deps/tensorrt/11.2/.installed: | .deps/tensorrt/10.6/.installed # one after the other: Maven's folder takes one writer
.deps/tensorrt/%/.installed: .ci/fetch_tensorrt | .venv/.installed
	.ci/fetch_tensorrt $* .deps/tensorrt/$* $(BIN)/python
	@touch $@

run-tensorrt-%:
	HYPERATTENTION_NO_SKIP=1 HYPERATTENTION_TENSORRT_VERSION=$* LD_LIBRARY_PATH=$(CURDIR)/.deps/tensorrt/$*/lib \
	  PYTHONPATH=.:$(CURDIR)/.deps/tensorrt/$*/site $(BIN)/python -m pytest -m "tensorrt and not gpu" $$(grep -l tensorrt tests/test_*.py)

test-onnxruntime: $(NATIVE) $(ONNXRUNTIME)
	$(MAKE) --no-print-directory run-onnxruntime-1.20
	$(MAKE) --no-print-directory run-onnxruntime-1.24
	$(MAKE) --no-print-directory run-onnxruntime-1.31

.deps/onnxruntime/%/.installed: .ci/fetch_onnxruntime | .venv/.installed
	.ci/fetch_onnxruntime $* .deps/onnxruntime/$* $(BIN)/python
	@touch $@

run-onnxruntime-%:
	HYPERATTENTION_ONNXRUNTIME_VERSION=$* PYTHONPATH=$(CURDIR)/.deps/onnxruntime/$*:. $(BIN)/python -m pytest tests/test_ort.py

# Whether docs/gpu_verification.json is of the present plugins/.
verify-status: .venv/.installed
	@PYTHONPATH=. $(BIN)/python tests/gpu/collect.py --status

clean:
	rm -rf build out hyperattention/lib
