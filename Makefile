# Every target does its own set-up: a virtual environment in .venv, the pinned versions, then the job.
# A second run installs nothing unless pyproject.toml or constraints.txt changed.

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python

.PHONY: help demo test test-slow audit check docs gpu clean

help:
	@echo "make demo       train on real handwritten digits and draw new ones (a few minutes on 2 CPU cores)"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that take minutes, the demo's independent check among them"
	@echo "make audit      compile the Triton kernels for three GPUs and check the machine code; needs no GPU (5 to 9 minutes)"
	@echo "make docs       build the documentation as a site, build/site/index.html; fails on a broken link"
	@echo "make check      lint and type-check; edits nothing (.pre-commit-config.yaml runs the same)"
	@echo "make gpu        on a CUDA device: its tests and the benchmarks of a step in ten minutes, into one file of bench/results/"
	@echo "make clean      remove the virtual environment and caches; runs/ stays"

.venv/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11.5 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11, 5) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/.installed
	$(RUN) -m engine.train --fused-ama

test: .venv/.installed
	$(RUN) -m pytest --numprocesses auto --dist loadfile --ignore tests/kernels
	# On its own: Triton's interpreter has to be chosen before anything imports Triton.
	$(RUN) -m pytest --numprocesses auto --dist loadfile tests/kernels

test-slow: .venv/.installed
	$(RUN) -m pytest -m slow --capture no

audit: .venv/.installed
	$(RUN) -m bench.kernels --audit $(if $(TARGETS),--targets $(TARGETS))

check: .venv/.installed
	$(RUN) -m ruff check --no-fix .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

gpu: .venv/.installed
	@$(RUN) -m bench.gpu

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
