# make run      the studio at http://127.0.0.1:7860, drawing with the toy checkpoint on board
# make test     style, types and the tests that must never break, the page in a real browser among them
# make test-all every test, property tests at full strength, and the engine as on other processors
# make test-processors   the engine and the model manager as on processors that can do less
# make test-times   where the last run of the tests spent its time
# make lint     style and types only
# make bench    times the toy checkpoint and writes benchmarks/results/nano.json
# make bench-core   times the transformer beside diffusers: ARGS="--size klein-4b --device cuda --compiled"
# make bench-gpu    all that wants a GPU: its tests, and bench-core's times of every model in ten minutes
# make plot     draws what bench-core measured, into benchmarks/results
#
# Everything is installed into $(VENV); delete it to start afresh. ARGS are passed on: make run ARGS="--port 8080",
# make test ARGS="-k cli", make bench ARGS="--runs 50". Tests run in WORKERS=2 processes side by side; 0 is one for all.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
WORKERS ?= 2
PROCESSORS := default:AVX2 avx2:AVX2 avx512:AVX512_CORE

# torch's threads would spin while they wait for each other, which starves them as soon as anything else (a browser, a
# test beside them) wants a core: measured on two busy cores, a picture takes several times as long. Sleeping costs an
# idle machine a few per cent.
export OMP_WAIT_POLICY ?= PASSIVE

# Tests start dozens of programs: each would translate the package again.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help run test test-all test-processors test-times lint bench bench-core bench-gpu plot chromium
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,13p'

run: $(VENV)/installed
	$(BIN)/python app.py $(ARGS)

test: lint chromium
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu" $(ARGS)

test-all: lint chromium
	$(BIN)/python -m pytest -n $(WORKERS) --hypothesis-profile=full --results build/tests/all $(ARGS)
	$(MAKE) test-processors

# ATEN_CPU_CAPABILITY limits what torch's own kernels use of a processor, ONEDNN_MAX_CPU_ISA what oneDNN's use.
test-processors: $(VENV)/installed-tests
	@set -e; for limits in $(PROCESSORS); do \
	    echo "As on a processor with: torch $${limits%:*}, oneDNN $${limits#*:}"; \
	    ATEN_CPU_CAPABILITY=$${limits%:*} ONEDNN_MAX_CPU_ISA=$${limits#*:} $(BIN)/python -m pytest -n $(WORKERS) \
	        -m "not slow and not process and not gpu" --results build/tests/$${limits%:*} tests/engine tests/models; \
	done

test-times: $(VENV)/installed-tests
	@$(BIN)/python -m tests.times $(ARGS)

lint: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.nano $(ARGS)

bench-core: $(VENV)/installed-tests
	$(BIN)/python -m benchmarks.core $(ARGS)

bench-gpu: $(VENV)/installed-tests
	$(BIN)/python -m benchmarks.gpu $(ARGS)

plot: $(VENV)/installed
	$(BIN)/python -m benchmarks.plot $(ARGS)

# --- installing: a stamp file each, older than its requirements when they have changed -----------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "flux2-studio needs Python 3.11 or newer, and '$(PYTHON)' is not (or is not there)." \
	         "Name another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; \
	    else \
	        echo "'$(PYTHON)' cannot make virtual environments." \
	             "Install its venv module first (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; \
	    fi; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(BIN)/python
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/installed-tests: requirements.txt tests/requirements.txt | $(BIN)/python
	$(PIP) install -r tests/requirements.txt
	@touch $(VENV)/installed $@

chromium:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation; \
	    else \
	        echo "The browser tests need Chromium: install 'chromium' or 'google-chrome' so that it is on the PATH," \
	             "or run 'make test' as root on Debian." >&2; exit 1; \
	    fi; }
