# `make train` and `make test` do everything on a fresh machine: Python >= 3.10, a C++ compiler, make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py tools/build_backend.py tools/cuda_build.py

.DEFAULT_GOAL := help
.PHONY: help setup installed-and-built wheel train reproduce-toy test test-integrations test-wheel bench bench-readme control bench-save bench-compare cuda-check gpu-smoke gpu-verify gpu-bench gpu-prebuilt sanitize lint format docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# What the C++ is built with and against.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile -c constraints.txt setuptools pybind11 ninja numpy torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	ENTROPY_KERNELS_SKIP_CPP=1 $(PIP) install -q --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true # as pip would, on all cores, what is ever imported
	touch $@

$(VENV)/.built: $(VENV)/.torch $(CSRC)
	mkdir -p build
	$(BIN)/python setup.py -q build_ext --inplace >build/compiler.log || { cat build/compiler.log; exit 1; }
	touch $@

setup: $(VENV)/.torch ## create .venv and build the C++ extension, which takes a core while pip takes the other
	@$(MAKE) --no-print-directory -j2 installed-and-built

installed-and-built: $(VENV)/.installed $(VENV)/.built
	@:

wheel: setup ## a wheel for every Python >= 3.10 and torch of the support window, in dist/
	$(PIP) wheel -q --no-deps --no-build-isolation -w dist .

train: setup ## train a tiny model under GRPO, Clip-Cov, KL-Cov and a target entropy; writes runs/quickstart/report.html
	$(BIN)/python -m entropy_kernels.trainer quickstart --out runs/quickstart

reproduce-toy: setup ## three seeds with the random-token controls (8 to 25 minutes)
	$(BIN)/python -m entropy_kernels.trainer reproduce --out runs/reproduce-toy

# CPU=avx2 | avx512 | avx512_bf16: as on a CPU that has no more, in the order ours, torch's, oneDNN's, MKL's.
# Not ?=: an environment's CPU means something else.
CPU =
forced = ENTROPY_KERNELS_CPU_CAPABILITY=$(1) ATEN_CPU_CAPABILITY=$(1) ONEDNN_MAX_CPU_ISA=$(2) MKL_ENABLE_INSTRUCTIONS=$(3)
CPU_avx2 = $(call forced,avx2,AVX2,AVX2)
CPU_avx512 = $(call forced,avx512,AVX512_CORE,AVX512)
CPU_avx512_bf16 = $(call forced,avx512,AVX512_CORE_BF16,AVX512)

# A process per core with one thread each; with worksteal none is left alone with the long tests of one file. Bytecode is
# written, whatever the environment says: else every process that a test starts compiles the package anew.
test: setup ## the whole test suite
	$(if $(CPU),$(or $(CPU_$(CPU)),$(error CPU: expected avx2, avx512 or avx512_bf16, got $(CPU)))) \
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

# verl, TRL and what they need, in an environment of their own; the package is there for its entry points, and runs from
# here with the libraries that `make setup` built.
PEERS := .venv-integrations
PEERS_PIP := $(PEERS)/bin/python -m pip --disable-pip-version-check
$(PEERS)/.installed: tests/integrations/requirements.txt pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.12 ...")'
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) install -q -c constraints.txt -r tests/integrations/requirements.txt
	$(PEERS_PIP) install -q --no-deps verl==0.9.1
	ENTROPY_KERNELS_SKIP_CPP=1 $(PEERS_PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

test-integrations: setup $(PEERS)/.installed ## real runs of verl and TRL with ours in place, and their own tests of what we replace
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PEERS)/bin/python -m pytest -n auto --dist worksteal tests/integrations $(PYTEST_ARGS)

# The wheel under another Python and torch, in an environment of its own that has these and numpy.
OTHER := .venv-wheel
test-wheel: setup ## build a wheel and try it under another Python and torch: PYTHON=python3.12 TORCH=2.11.0
	$(PYTHON) -m venv --clear $(OTHER)
	$(OTHER)/bin/python -m pip --disable-pip-version-check install -q torch==$(or $(TORCH),2.11.0) numpy
	ENTROPY_KERNELS_OTHER_PYTHON='$(abspath $(OTHER)/bin/python)' $(BIN)/python -m pytest tests/test_wheel.py $(PYTEST_ARGS)

bench: setup ## measure ours and peers on this machine; writes benchmarks/results/<machine>/ (with BENCH_ARGS: runs/bench/<machine>/)
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

# Times of another machine, or of another number of threads, are nothing to compare with: each has a folder of its own.
REGRESSION = store=.benchmarks/$$($(BIN)/python -m benchmarks.results) && \
	run="$(BIN)/python -m pytest benchmarks/test_regression.py --benchmark-storage=file://$$store"

bench-save: setup ## time the regression set and save it as the base of bench-compare
	$(REGRESSION) && $$run --benchmark-save=base $(PYTEST_ARGS)

bench-compare: setup ## time the regression set; fails if a minimum is 25 % above this machine's last saved run
	$(REGRESSION) && { test -d $$store || { echo "nothing of this machine in $$store: run make bench-save first" >&2; exit 1; }; } && \
	$$run --benchmark-compare --benchmark-compare-fail=min:25% $(PYTEST_ARGS)

bench-readme: setup ## write the tables of README.md and docs/ from the result files
	$(BIN)/python -m benchmarks.report --readme

# Not ?=, as below.
QUICK =

control: setup ## methods at equal entropy, and entropy as a set point; some two hours on two cores, QUICK=1 ten minutes
	$(BIN)/python -m benchmarks.control $(if $(QUICK),--quick) $(CONTROL_ARGS)

# Not ?=: an environment's ARCH or OUT means something else.
ARCH = 9.0a
OUT = build/gpu-prebuilt

gpu-prebuilt: ## build both libraries for one GPU architecture against TORCH=FOLDER, an unpacked CUDA wheel of torch
	$(PYTHON) tools/gpu_prebuilt.py $(if $(TORCH),'$(TORCH)') --arch '$(ARCH)' --out '$(OUT)'

gpu-smoke: ## on a GPU: is every kernel right, and how fast? at most 3 minutes
	@$(PYTHON) tools/gpu_smoke.py smoke $(GPU_ARGS)

gpu-verify: ## on a GPU: all GPU tests and a search for data races; decides what backend="auto" may use; at most 4 minutes
	@$(PYTHON) tools/gpu_smoke.py verify $(GPU_ARGS)

gpu-bench: ## on a GPU: the benchmark with its peers, the other backends' tests, more sanitizers; at most 9 minutes
	@$(PYTHON) tools/gpu_smoke.py bench $(GPU_ARGS)

cuda-check: setup ## compile every CUDA kernel for sm_80, sm_90a and sm_100a, without a GPU; fails on a spill
	$(BIN)/python tools/cuda_check.py

sanitize: setup ## the C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer, with 10^5 hostile calls; some minutes
	$(BIN)/python tools/sanitize.py $(SANITIZE_ARGS)

lint: setup ## ruff and mypy, pinned
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## let ruff rewrite the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup ## write docs/api.md from the docstrings
	$(BIN)/python tools/api_reference.py

clean: ## remove build outputs, keep .venv and runs
	rm -rf build dist *.egg-info entropy_kernels/*.so $(VENV)/.built
