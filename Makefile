# make native: compile the libraries into quantkernels/_lib of this checkout, with the Python given (default: python3).
PYTHON ?= python3
JOBS ?= 2

native:
	$(PYTHON) setup.py build_ext --inplace

.PHONY: native
