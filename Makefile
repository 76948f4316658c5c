# Two commands: `make demo` trains, evaluates and exports a small encoder; `make test` runs the tests.
# Both work from a fresh clone with Python 3.11, its venv module and a C++ compiler.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-seconds
# Made by the tests of a simulated GPU (tests/support/simulated_gpu/environment.py).
SIMULATED := .venv-simulated-gpu
# What was skipped and why, and which tests took longest: above 20 s one is marked slow.
REPORT := -rs --durations 10 --durations-min 20

.PHONY: demo test test-all test-numerics bench-cpu bench-gpu lint clean help

help:
	@echo "make demo       environment, demo data, ZeRO-3 training on 2 processes, evaluation, export (about 5 minutes)"
	@echo "make test       lint and all tests but the long ones (within 15 minutes on two cores)"
	@echo "make test-all   the long tests that make test leaves out, some on a simulated GPU (1.2 GB are installed for it)"
	@echo "make test-numerics  tests of numbers, as other processors would run them (about 5 minutes)"
	@echo "make lint       ruff"
	@echo "make bench-cpu  a training step of the encoder on the CPU, and other ways to run it (about 10 minutes)"
	@echo "make bench-gpu  the fused kernels and a training step on a GPU"
	@echo "make clean      remove the environment and what the demo wrote in its folder"

# The demo and the tests train on the CPU, on a machine with GPUs too.
demo test test-all: export DS_ACCELERATOR := cpu

# The file holds how long the installation took; the demo's table shows it.
$(INSTALLED): requirements.txt pyproject.toml
	@if [ -e $(VENV) ] && [ ! -f $(VENV)/.univitar-ds ] && [ ! -f $@ ]; then \
	  echo "error: $(VENV) is there and was not made by make; move it, or name another folder: make VENV=FOLDER ..."; \
	  exit 2; \
	fi
	@echo "installing into $(VENV) (log: $(VENV)/install.log)"
	@start=$$(date +%s); \
	  mkdir -p $(VENV) && touch $(VENV)/.univitar-ds \
	  && $(PYTHON) -m venv $(VENV) \
	  && { $(BIN)/python -m pip install --quiet torch==2.13.0 \
	    && $(BIN)/python -m pip install --quiet --editable '.[dev]'; } > $(VENV)/install.log 2>&1 \
	  || { tail -n 30 $(VENV)/install.log; exit 1; }; \
	  echo $$(( $$(date +%s) - start )) > $@

demo: $(INSTALLED)
	$(BIN)/univitar-ds demo --install-seconds $$(cat $(INSTALLED))

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(REPORT) -m "not slow"

# Three at a time: many of these wait for the programs that they start.
test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile $(REPORT) -m "slow and not alone"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(REPORT) -m alone

# Those tests that compare sums, with other instruction sets and numbers of threads.
test-numerics: $(INSTALLED)
	.ci/numerics

# Runs in any environment with torch and triton: PYTHON=... make bench-gpu; ours where it is installed.
bench-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/bench_gpu.py

lint: $(INSTALLED)
	$(BIN)/ruff check .

bench-cpu: $(INSTALLED)
	$(BIN)/python benchmarks/bench_cpu.py

# Only what was made here: environments with the mark of the line above (or of an earlier version's installation), and
# of the demo's folder the files that the demo writes.
clean:
	@if [ ! -e $(VENV) ]; then :; \
	elif [ ! -L $(VENV) ] && { [ -f $(VENV)/.univitar-ds ] || [ -f $(INSTALLED) ]; }; then rm -rf $(VENV); \
	else echo "$(VENV) stays: it was not made by make"; fi
	@if [ ! -e $(SIMULATED) ]; then :; \
	elif [ ! -L $(SIMULATED) ] && [ -f $(SIMULATED)/.univitar-ds ]; then rm -rf $(SIMULATED); \
	else echo "$(SIMULATED) stays: it was not made by the tests"; fi
	@$(PYTHON) -c 'import sys; sys.path.insert(0, "."); from univitar_ds.demo.folder import main; main("demo")'
