# make demo   train with InfoEntropy and with cross entropy, compare on one page
# make test   every test that this machine can run
# Both make .venv and install what they need when it is not there.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*) setup.py

# Where this is set, every process compiles torch and Megatron anew: 25 seconds of importing, not 10.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-clients test-cluster faults fuzz sanitize audit lint docs bench bench-gpu gpu \
  gpu-6.7b build status pages clean

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh runs/demo

# Processes that take a file at a time, since files share what is costly to make. By number of tests,
# xdist's way, the files that take longest would come last: last is the room whose files are all
# short. A process uses one core, but for waits of minutes for Slurm and ssh, and up to some 3 GiB of
# memory: three for two cores, and two where there are not 12 GiB.
WORKERS := $(shell awk '/^MemAvailable/ && $$2 > 12e6 {more = 1} END {print 2 + more}' /proc/meminfo)
ASIDE := --numprocesses $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder \
  $(wildcard tests/test_*.py) $(filter-out %/__pycache__/ tests/data/,$(wildcard tests/*/)) tests/data

# Tests for GPUs see them, all others run as without one.
test: $(READY)
	@if nvidia-smi --list-gpus >/dev/null 2>&1; then $(BIN)/python -m pytest -m "gpu or multi_gpu"; \
	else echo "no GPU here: the tests marked gpu and multi_gpu do not run"; fi
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m "not gpu and not multi_gpu and not slow" $(ASIDE)

# The long forms (faults, kills, fuzzing), whose short forms are in `make test`: hours.
test-slow: $(READY)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m slow

# Trainings under a real Slurm and by a real ssh, all of them: half an hour. As root; INSTALL=1 has apt
# install the servers first.
test-cluster: $(READY)
	@[ -z "$(INSTALL)" ] || tools/servers.sh
	@$(BIN)/python tests/cluster/machines.py
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests/cluster

# 100 faults at random moments on the same servers, a row each; it goes on where it stopped.
faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/cluster/count_faults.py tools/results/faults_servers_cpu.csv

# Every reader of files, 30 minutes or 10 million inputs each; nightly. SECONDS_EACH=60 is a look.
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py --seconds $(or $(SECONDS_EACH),1800)

# vLLM, llama.cpp, CTranslate2, lm-evaluation-harness and Megatron-Bridge on an export of every family;
# makes 12 GB of environments in build/clients. CLIENTS="vllm" FAMILIES="llama,gpt2" does a part.
test-clients: $(READY)
	$(BIN)/python -W ignore tools/clients.py $(if $(CLIENTS),--clients "$(CLIENTS)") \
	  $(if $(FAMILIES),--families "$(FAMILIES)")

# The CPU kernels under the address, undefined-behaviour and thread sanitizers.
sanitize:
	tools/sanitize.sh

audit:
	tools/audit.sh

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation's site, in build/site; a warning is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The loss beside its peers. OUTPUT=tools/results writes the result file (only at a clean commit).
bench: $(READY)
	$(BIN)/infoentropy bench --grid small --hidden 256 $(if $(OUTPUT),--output $(OUTPUT))

# The same on one large GPU, without compiled peers, which tools/gpu.sh measures at the headline; it goes
# on with what OUTPUT has of this device and commit. See tools/gpu.sh for a card without a network.
bench-gpu: $(READY)
	$(BIN)/infoentropy bench --grid full --hidden 4096 --no-compiled --resume \
	  --output $(or $(OUTPUT),runs/bench_gpu.csv)

# What needs a GPU, in one command that goes on where it stopped: see tools/gpu.sh for PYTHON, OUT and
# for what is packed before, where a card is lent for minutes. STEPS="kernels headline" does a part.
gpu:
	tools/gpu.sh $(STEPS)

# The paper's models on one large GPU, docs/training-speed.md; STAGES="speed curves" does a part.
gpu-6.7b:
	tools/gpu.sh paper $(STAGES)

build: $(READY)

# the pages' generated parts: run every feature's tests and write them down; or only rewrite
status: $(READY)
	$(BIN)/python tools/status.py run

pages: $(READY)
	$(BIN)/python tools/status.py pages

$(READY): pyproject.toml constraints.txt tools/install.sh $(SOURCES)
	tools/install.sh $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build runs
