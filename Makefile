# `make up` and `make test` do all the set-up by themselves, with only Python 3.11 or later, pip and make.
#
# One environment, .venv, at two levels: what a mesh on one machine needs (requirements/up.txt), and that plus what tests
# and checks need (requirements/dev.txt, whose versions the first never contradicts). Both are installed by plain pip, by
# hash. A level is installed when its stamp is missing, and the stamp's name holds a sum of the lock, of pyproject.toml
# and of this folder's path: a changed lock, a changed project or a moved folder is installed again, nothing else is.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
RUN = $(VENV)/bin/python -m
LEVEL = $(shell { cat requirements/$(1).txt pyproject.toml; pwd; } | cksum | cut -d ' ' -f 1)
UP := $(VENV)/.up-$(call LEVEL,up)
DEV := $(VENV)/.dev-$(call LEVEL,dev)
GPU := $(VENV)/.gpu-$(call LEVEL,gpu)

.DEFAULT_GOAL := help
.PHONY: help up demo test test-stores test-gpu test-cluster test-chaos test-attack test-onnx test-clients check cost bench image cluster cluster-image cluster-down proto manifests
.PHONY: lock format clean environment environment-gpu

help:  ## this list
	@echo 'make TARGET [ARGS="..."] [PYTHON=python3.12]'
	@echo
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F '\t' '{ printf "  %-13s %s\n", $$1, $$2 }'

up: $(UP)  ## a whole mesh on this machine, until Ctrl-C (ARGS="--pods 3": see mesh up --help)
	@$(RUN) mesh up $(ARGS)

demo: $(UP)  ## several hundred real models under skewed traffic, every answer compared with onnxruntime's
	@$(RUN) mesh demo $(ARGS)

test: check  ## checks, then all tests (ARGS="tests/wire -k split": only those)
	@$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(DEV)  ## format, lint, types, layers, freshness of generated code, language, cost of hot functions
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python proto/generate.py --check
	$(VENV)/bin/python deploy/manifests.py --check
	$(VENV)/bin/python .ci/language.py
	$(VENV)/bin/python -m tests.cost

test-stores: $(DEV)  ## the puller against versitygw, azurite and fake-gcs-server, made first (Go, Node; minutes)
	@$(RUN) tests.support.programs
	@$(RUN) pytest tests/stores $(ARGS)

test-clients: $(DEV)  ## third-party clients and proxies against a mesh: Java, Go, Node, made first, nginx, ab, curl (minutes)
	@$(RUN) tests.doors.clients
	@$(RUN) pytest tests/doors -rs $(ARGS)

test-gpu:  ## models on this machine's NVIDIA GPU, in an environment of its own, .venv-gpu (gigabytes)
	@if nvidia-smi -L 2>/dev/null; then $(MAKE) --no-print-directory VENV=.venv-gpu environment-gpu && .venv-gpu/bin/python -m pytest tests/gpu -rs $(ARGS); \
	else echo 'make test-gpu: SKIPPED, NO TEST HAS RUN: nvidia-smi finds no GPU on this machine'; fi

image:  ## the container image, by docker, podman or buildah (TAG=, ENGINE=, BASE=, LOCK=image-gpu, PIP_INDEX_URL=)
	@$(PYTHON) -m deploy.image

cluster:  ## a one-node Kubernetes on this machine, to test on (root, Go, 2.5 GB; the first time takes 15 minutes)
	@$(PYTHON) -m deploy.cluster up

cluster-image:  ## the image for that cluster, by the name that it prints (docs/kubernetes.md: how to install it)
	@$(PYTHON) -m deploy.cluster image

cluster-down:  ## ends that cluster, and leaves the machine as it was
	@$(PYTHON) -m deploy.cluster down

test-cluster: $(DEV)  ## the image on that cluster, which is made and started if it does not run
	@$(RUN) pytest tests/cluster -m cluster -o timeout_func_only=true $(ARGS)

test-chaos: $(DEV)  ## ten minutes of random faults, every answer judged (ARGS="--chaos-seed 7 --chaos-seconds 1800")
	@$(RUN) pytest tests/chaos -m "" $(ARGS)

test-attack: $(DEV)  ## callers, stores and models that misbehave, each beside a hot caller that must not notice
	@$(RUN) pytest tests/attack -m attack $(ARGS)

test-onnx: $(DEV)  ## the ONNX project's node tests through a mesh, beside onnxruntime alone (minutes)
	@$(RUN) tests.nodes $(ARGS)

cost: $(DEV)  ## instructions and memory of the hot functions beside the stored figures (ARGS=--accept: stores them)
	@$(RUN) tests.cost $(ARGS)

bench: $(DEV)  ## calls/s, CPU per call and latency, beside a plain grpc.aio server
	@$(RUN) tests.bench $(ARGS)

format: $(DEV)  ## rewrites the sources in the project's format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

proto: $(DEV)  ## mesh/pb/ from proto/
	$(VENV)/bin/python proto/generate.py

manifests: $(DEV)  ## deploy/kustomize/ from deploy/chart/ (needs helm)
	$(VENV)/bin/python deploy/manifests.py

environment-gpu: $(GPU)

environment: $(DEV)  ## only the environment, for an editor

# The larger lock first: the smaller one takes its versions from it, so `make test` after `make up` replaces nothing.
COMPILE = $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links pyproject.toml requirements/build.in

lock: $(VENV)/.made  ## the lock files again, at their present versions if those still fit (ARGS=--upgrade: the newest)
	@test -x $(VENV)/bin/uv || $(PIP) install --quiet uv
	$(COMPILE) --extra cpu --extra local --extra demo --extra pictures --extra dev --output-file requirements/dev.txt $(ARGS)
	$(COMPILE) --extra cpu --extra local --extra demo --constraints requirements/dev.txt --output-file requirements/up.txt $(ARGS)
	$(COMPILE) --extra cpu --extra edge --constraints requirements/dev.txt --output-file requirements/image.txt $(ARGS)
	$(COMPILE) --extra gpu --extra cuda --extra local --extra demo --extra dev --constraints requirements/dev.txt \
		--output-file requirements/gpu.txt $(ARGS)
	$(COMPILE) --extra gpu --extra cuda --extra edge --constraints requirements/dev.txt --output-file requirements/image-gpu.txt $(ARGS)

clean:  ## everything made here, the environment and the local mesh's data included
	@test ! -e /run/mesh-cluster/owner || $(PYTHON) -m deploy.cluster down
	rm -rf .venv .venv-gpu .mesh .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(UP): $(VENV)/.made
	$(call install,up)
	@touch $@

$(DEV): $(VENV)/.made
	$(call install,dev)
	@touch $@ $(UP)

$(GPU): $(VENV)/.made
	$(call install,gpu)
	@touch $@

define install
	@rm -f $(VENV)/.up-* $(VENV)/.dev-* $(VENV)/.gpu-*
	@echo "installing requirements/$(1).txt into $(VENV) (the first time takes a few minutes)"
	@$(PIP) install --quiet --require-hashes --requirement requirements/$(1).txt
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
endef

# Debian's python3 comes without ensurepip unless python3-venv is there; its pip can fill an environment from outside.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
		echo "There is no '$(PYTHON)' on PATH. Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), and Mesh needs Python 3.11 or later: make PYTHON=python3.12"; exit 1; }
	@if $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then :; \
	elif $(PYTHON) -c 'import ensurepip, venv' >/dev/null 2>&1; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1 && $(PYTHON) -c 'import venv' >/dev/null 2>&1; then \
		$(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; \
	else echo "$(PYTHON) can make no virtual environment: install its venv module (on Debian and Ubuntu: apt install python3-venv)"; exit 1; fi
	@$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(VENV) holds $$($(VENV)/bin/python --version 2>&1), and Mesh needs Python 3.11 or later: remove it and try again"; exit 1; }
	@touch $@
