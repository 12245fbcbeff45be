# Every target sets up its own environment first and then does its job.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# Seconds in place of minutes for the notebooks; empty for all of them.
SHORT ?= 1
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
# Without it JAX looks for accelerators first; set it to cuda or tpu there.
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-fast test-aot test-sanitize lint format bench notebooks soak test-gpu bench-gpu clean

demo: $(VENV)/.run
	$(RUN) -m experiments.demo --workdir=runs/demo

test: $(VENV)/.dev
	$(RUN) -m pytest -n 2 --dist loadgroup -m 'not aot and not gpu' --durations=15

test-fast: $(VENV)/.dev
	$(RUN) -m pytest -n 2 --dist loadgroup -m 'not slow and not aot and not gpu'

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(RUN) -m pytest tests/architecture_test.py

format: $(VENV)/.dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/.bench
	$(RUN) -m pallas_kernels.bench
	$(RUN) -m experiments.bench_torch
	$(RUN) -m experiments.bench_pipeline
	$(RUN) -m experiments.bench_sparse
	$(RUN) -m experiments.bench_memory
	$(RUN) -m experiments.bench_serving
	$(RUN) -m experiments.bench_allocation

# In a copy, so that no output gets into the notebooks; minutes without SHORT.
notebooks: $(VENV)/.dev
	RECJAX_SHORT=$(SHORT) PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
		$(VENV)/bin/jupyter execute --timeout=600 notebooks/*.ipynb

# One process at a time may use a TPU's compiler, unless it is told otherwise.
test-aot: $(VENV)/.aot
	ALLOW_MULTIPLE_LIBTPU_LOAD=1 $(RUN) -m pytest -n 2 -m aot tests/aot

# The C++ kernels under the address and undefined-behaviour sanitizers.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g
test-sanitize: $(VENV)/.dev
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so) $$(c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PALLAS_KERNELS_CXXFLAGS="$(SANITIZE)" \
		$(RUN) -m pytest tests/pallas_kernels -k 'not Build'

# On a machine with a GPU, which they need.
test-gpu: $(VENV)/.gpu
	JAX_PLATFORMS=cuda $(RUN) -m pytest -m gpu tests/gpu

bench-gpu: $(VENV)/.gpu
	JAX_PLATFORMS=cuda $(RUN) -m pallas_kernels.bench_gpu

soak:
	@echo "make $@: nothing to do yet; it comes with the soaks"

$(VENV)/.run: requirements.txt
	@echo "Setting up $(VENV) (about a minute) ..."
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "recjax needs Python 3.11 or newer; call make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.run pyproject.toml
	$(PIP) -e '.[dev]'
	@touch $@

# fbgemm-gpu-cpu asks for a numpy of its own; it runs with ours.
$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	$(PIP) --no-deps 'fbgemm-gpu-cpu==1.8.0'
	@touch $@

$(VENV)/.gpu: $(VENV)/.dev
	$(PIP) -e '.[gpu]' torch
	@touch $@

$(VENV)/.aot: $(VENV)/.dev
	$(PIP) -e '.[aot]'
	@touch $@

clean:
	rm -rf $(VENV) runs
