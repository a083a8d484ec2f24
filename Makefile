# Everything runs in .venv, which the first target makes. Without a GPU: CPU torch and the CPU library.
#   make demo            train, pack and run 2-bit networks on digits; a table and demo-report/report.html
#   make test            the quick test suite        make test-training   the slow one
#   make lint            ruff, clang-format, mypy    make bench           measure, and render the README's table
#   make cuda-check      compile every CUDA kernel for every target: registers, spills, SASS (needs nvcc, no GPU)
#   make emu-sanitize    the CUDA kernels in the emulator, under AddressSanitizer and UBSan
#   make gpu-check       on a machine with a GPU, with $(PYTHON) as it is and offline: PART=build+tests|sanitize|bench[-products|-networks|-elementwise],
#                        OUT=folder
#   make native          compile into quantkernels/_lib with $(PYTHON), no .venv
# RUNS: how often `make bench` measures; of each workload the run that the machine was least disturbed in is kept.
# TORCH_INDEX: another package index for torch alone (for instance PyTorch's own index of CPU builds).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
CXX_FILES := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
RUNS ?= 3
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)
# cmake and ninja come from the environment's own packages.
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"
PY := $(VENV)/bin/python

$(VENV)/requirements.stamp: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The editable install compiles the libraries; CMake knows what is out of date.
build: $(VENV)/requirements.stamp
	$(RUN) $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(PY) -c "import quantkernels as qk; i = qk.build_info(); print('quantkernels', i['version'], '| CPU:', i['cpu_isa'], '| CUDA:', i['cuda_build'], '|', i['cuda'])"

demo: export QK_CUDA ?= $(GPU)
demo: build
	$(PY) -m training.demo

# Without a GPU the CUDA kernels are tested in the emulator.
test test-training emu-sanitize: export QK_EMU ?= $(if $(filter 1,$(GPU)),0,1)

test: build
	$(PY) -m pytest -m "not slow"

test-training: build
	$(PY) -m pytest -m slow tests

bench: build
	$(PY) -m pytest benchmarks --benchmark-only
	for more in $$(seq 2 $(RUNS)); do $(PY) -m pytest benchmarks --benchmark-only --again || exit; done
	$(PY) -m benchmarks.render

lint: $(VENV)/requirements.stamp
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) clang-format --dry-run -Werror $(CXX_FILES)
	$(RUN) mypy

format: $(VENV)/requirements.stamp
	$(RUN) ruff check --fix-only --quiet .
	$(RUN) ruff format --quiet .
	$(RUN) clang-format -i $(CXX_FILES)

cuda-check: $(VENV)/requirements.stamp
	$(PY) tests/cuda_gate.py

emu-sanitize: build
	$(RUN) $(PY) tests/emu/sanitize.py

PART ?= build+tests
OUT ?= gpu-check
gpu-check:
	$(PYTHON) tests/gpu/check.py --part "$(PART)" --out "$(OUT)"

native:
	$(PYTHON) setup.py build_ext --inplace

clean:
	rm -rf build dist *.egg-info quantkernels/_lib/*.so demo-report

.PHONY: build demo test test-training bench lint format cuda-check emu-sanitize gpu-check native clean
