# `make install` makes .venv; every other target installs first. Another interpreter: `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Transformer Engine's Python, which the contract tests run on a CPU: those of tests/te_stub.py.
TE_VERSIONS := 2.9.0 2.11.0 2.16.1 2.20.2
# Megatron-Bridge's own files, whose dependencies need CUDA: for tests/distributed/test_megatron_bridge.py.
BRIDGE_VERSION := 0.3.1
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench container-test clean distclean

help:
	@echo "make install    make $(VENV) and install the pinned versions of constraints.txt"
	@echo "make demo       pretrain a small GPT under a weight spike, once with predicted scales and once with delayed ones"
	@echo "make test       run the tests; ARGS='-k rope' passes options to pytest"
	@echo "make lint       ruff, and mypy --strict on spectral and bounds"
	@echo "make bench      cost, growth and tightness: the tables of docs/BENCHMARKS.md, in about eight minutes"
	@echo "make container-test    build the images and train inside; as root, with Debian's buildah and debootstrap"
	@echo "make clean      remove caches and build output; make distclean removes $(VENV) too"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "make: $(PYTHON) is missing or older than Python 3.10; name another one with PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "make: $(PYTHON) lacks the venv module; install it (Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# pip 22 is the first whose editable installs from pyproject.toml work with constraints
	@$(PY) -c 'import pip, sys; sys.exit(int(pip.__version__.split(".")[0]) < 22)' || $(PY) -m pip install --upgrade pip
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@for version in $(TE_VERSIONS); do \
		test -d $(VENV)/te/$$version/transformer_engine || $(PY) -m pip install --no-deps --quiet \
			--target $(VENV)/te/$$version transformer-engine==$$version || exit 1; \
	done
	@test -d $(VENV)/bridge/megatron || $(PY) -m pip install --no-deps --quiet \
		--target $(VENV)/bridge megatron-bridge==$(BRIDGE_VERSION)
	@touch $@

demo: install
	$(PY) tools/demo.py

test: install
	$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: install
	$(PY) benchmarks/refresh.py
	$(PY) benchmarks/growth.py
	$(PY) benchmarks/tightness.py

container-test: install
	PYTHON=$(PY) tests/container/build.sh

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name $(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
