# Each target does all its own set-up: a virtual environment in .venv with the pinned packages of constraints.txt.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready

.PHONY: train test setup bench gpu lint study

train: $(READY)            ## train a small model on generated scenes and show what it learned
	$(BIN)/torchrun --standalone train/main.py

test: $(READY)             ## the tests; SLOW=1: also those that are marked slow
	CLLIP_SLOW=$(SLOW) $(BIN)/python -m pytest tests -q -n 2 --dist loadfile --max-worker-restart 1

setup: $(READY)            ## only the environment

bench: $(READY)            ## the benchmarks, against the peers that are installed
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json .benchmarks/losses.json -q
	$(BIN)/python -m benchmarks.report .benchmarks/losses.json
	$(BIN)/python -m benchmarks.step_report .benchmarks/losses.json
	$(BIN)/python -m benchmarks.data_report .benchmarks/losses.json

study: $(READY)            ## which losses pay, 3 seeds of each: hours on a CPU (make study SHORT=1: minutes; STEPS=400)
	$(BIN)/python train/study.py $(if $(SHORT),--short) $(if $(STEPS),--steps $(STEPS))

gpu:                       ## on a machine with a GPU: installs into $(PYTHON), runs the gpu tests and all benchmarks
	PYTHON=$(PYTHON) bash benchmarks/gpu_all.sh

lint: $(READY)             ## style and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# open_clip_torch and transformers are peers of the tests: they load single files of them, so their own requirements stay
# out.
$(READY): setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing the packages of constraints.txt into $(VENV) (about a minute)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,triton,clip,sentencepiece,parquet,simplejpeg,onnx,plots,tensorboard]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt open_clip_torch transformers
	@touch $(READY)
