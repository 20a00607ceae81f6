# `make demo` and `make test` need Python 3.11 and nothing else: both create .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTOS := $(wildcard protos/fedloom/v1/*.proto)
PEERS ?= $(filter --quick,$(BENCH))
IDLE ?= $(filter --quick,$(BENCH))
PROFILE ?= short

SECONDS ?= 60
MINUTES ?= 60
SEED ?= 1

.PHONY: setup demo test test-slow test-faults soak test-docker test-gpu fuzz deploy-check bench bench-peers bench-learning bench-training check protos clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(READY) ## create .venv with fedloom and its tools

demo: $(READY) ## three sites train one GPT together on this machine
	$(BIN)/python examples/shakespeare/demo.py $(DEMO)

test: $(READY) ## the everyday test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow and not docker and not gpu and not faults"

test-slow: $(READY) ## tests that take minutes
	$(BIN)/python -m pytest -m "slow and not docker and not gpu"

test-faults: $(READY) ## kills, pauses, cuts, full disks: what docs/reliability.md tells
	$(BIN)/python -m pytest -m faults tests/faults

soak: $(READY) ## random faults for MINUTES=60, with SEED=1
	PYTHONPATH=tests $(BIN)/python tests/faults/chaos.py $(MINUTES) $(SEED)

test-docker: $(READY) ## docker compose with a real engine
	$(BIN)/python -m pytest -m docker

test-gpu: $(READY) ## training on CUDA devices
	$(BIN)/python -m pytest -m gpu

deploy-check: $(READY) ## systemd units, Kubernetes manifests and Prometheus files, by their own tools
	$(BIN)/python -m pytest -rs tests/deploy

fuzz: $(READY) ## coverage-guided fuzzing of the parsers, SECONDS=60 for each
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	SECONDS_EACH=$(SECONDS) $(BIN)/python tests/fuzz/fuzz.py

bench: $(READY) ## transport, codecs, idle sites and the peers, measured; BENCH=--quick for minutes
	$(BIN)/python benchmarks/transport.py $(BENCH)
	$(BIN)/python benchmarks/codecs.py
	$(BIN)/python benchmarks/idle.py $(IDLE)
	$(BIN)/python benchmarks/peers.py $(PEERS)

bench-peers: $(READY) ## the same rounds with Flower and NVIDIA FLARE, which it installs; PEERS=--quick
	$(BIN)/python benchmarks/peers.py $(PEERS)

bench-learning: $(READY) ## federated beside pooled training, half an hour; PROFILE=full for all, CORPUS=folder of .txt files
	PYTHONPATH=benchmarks $(BIN)/python -m learning --profile $(PROFILE) $(if $(CORPUS),--corpus $(CORPUS)) $(LEARNING)

bench-training: $(READY) ## tokens/s of a site's training beside plain torch and HF Trainer; TRAINING=--help
	$(BIN)/python benchmarks/training.py $(TRAINING)

check: $(READY) ## lint, types, layers, generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	./protos/generate --check

protos: $(READY) ## regenerate the gRPC code
	./protos/generate

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
