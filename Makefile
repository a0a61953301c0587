# `make up` and `make test` set up everything themselves; they need only Python 3.11 or later, pip and make.
#
# The one environment, .venv, has two levels: packages for a mesh on one machine (requirements/up.txt), and those plus
# packages for tests and checks (requirements/dev.txt, in the same versions). Plain pip installs both, with hashes. A
# level is installed when its stamp is missing. The stamp's name contains a checksum of the lock, pyproject.toml and this
# folder's path, so that a level is installed again only if the lock or the project has changed, or the folder has moved.

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
.PHONY: help up demo test test-stores test-gpu test-cluster test-chaos test-streams test-long test-vmodels test-foreign test-servers test-compatibility test-attack test-onnx test-clients check cost bench performance image cluster cluster-image cluster-down proto manifests
.PHONY: lock format clean environment environment-gpu

help:  ## prints this list
	@echo 'make TARGET [ARGS="..."] [PYTHON=python3.12]'
	@echo
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F '\t' '{ printf "  %-13s %s\n", $$1, $$2 }'

up: $(UP)  ## runs a complete mesh on this machine until Ctrl-C (ARGS="--pods 3": see mesh up --help)
	@$(RUN) mesh up $(ARGS)

demo: $(UP)  ## serves several hundred real models under skewed traffic, and compares every answer with onnxruntime's
	@$(RUN) mesh demo $(ARGS)

test: check  ## runs all checks, then the tests that take no long time and need no other programs (ARGS="tests/wire -k split": only those tests)
	@$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(DEV)  ## checks format, lint, types, layers, freshness of generated code, language, cost of hot functions
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python proto/generate.py --check
	$(VENV)/bin/python deploy/manifests.py --check
	$(VENV)/bin/python .ci/language.py
	$(VENV)/bin/python -m tests.cost

test-stores: $(DEV)  ## tests the puller against versitygw, azurite and fake-gcs-server, built first (Go, Node; minutes)
	@$(RUN) tests.support.programs
	@$(RUN) pytest tests/stores $(ARGS)

test-clients: $(DEV)  ## tests third-party clients, proxies and gRPC servers: Java, Go, Node (built first), nginx, ab, curl (minutes)
	@$(RUN) tests.doors.clients
	@$(RUN) pytest tests/doors -m "" -rs $(ARGS)

test-gpu:  ## tests models on this machine's NVIDIA GPU, in a separate environment, .venv-gpu (gigabytes)
	@if nvidia-smi -L 2>/dev/null; then $(MAKE) --no-print-directory VENV=.venv-gpu environment-gpu && .venv-gpu/bin/python -m pytest tests/gpu -rs $(ARGS); \
	else echo 'make test-gpu: SKIPPED, NO TEST HAS RUN: nvidia-smi finds no GPU on this machine'; fi

image:  ## builds the container image with docker, podman or buildah (TAG=, ENGINE=, BASE=, LOCK=image-gpu, PIP_INDEX_URL=)
	@$(PYTHON) -m deploy.image

cluster:  ## builds and starts a one-node Kubernetes on this machine (root, Go, 2.5 GB; 15 minutes the first time)
	@$(PYTHON) -m deploy.cluster up

cluster-image:  ## builds the image into that cluster and prints its name (to install it: docs/kubernetes.md)
	@$(PYTHON) -m deploy.cluster image

cluster-down:  ## stops that cluster, and leaves the machine as it was
	@$(PYTHON) -m deploy.cluster down

test-cluster: $(DEV)  ## tests the image on that cluster; builds and starts the cluster if it is not running
	@$(RUN) pytest tests/cluster -m cluster -o timeout_func_only=true $(ARGS)

test-long: $(DEV)  ## runs the tests that take longest, and property tests with many examples (minutes)
	@HYPOTHESIS_EXAMPLES=$${HYPOTHESIS_EXAMPLES:-400} $(RUN) pytest -n 2 --dist loadfile -m "long or hypothesis" $(ARGS)

test-vmodels: $(DEV)  ## makes 10,000 random calls while leaders die, and 200 moves under traffic (ARGS="--vmodel-seed 7"; minutes)
	@$(RUN) pytest tests/system/test_vmodel_calls.py tests/system/test_vmodel_moves.py -s --vmodel-calls 10000 --vmodel-moves 200 $(ARGS)

test-compatibility: $(DEV)  ## tests what users of ModelMesh rely on, over each edge with each kind of foreign server (minutes)
	@$(RUN) pytest tests/system/test_compatibility.py --every-way $(ARGS)

test-foreign: $(DEV)  ## runs 400 models of a foreign server and ours through troubles, and all variants of its tests (ARGS="--foreign-seed 7"; minutes)
	@$(RUN) pytest tests/foreign tests/system/test_foreign.py tests/system/test_foreign_losses.py -m "" $(ARGS)

test-servers: $(DEV)  ## tests MLServer and Triton, installed first (0.7 GB download), and TorchServe if it is here, also under troubles (ARGS="--mixed-seed 7"; minutes)
	@$(RUN) mesh servers install mlserver
	@$(RUN) mesh servers install triton || echo 'test-servers: TRITON IS NOT TESTED'
	@$(RUN) pytest tests/servers -m "" -rs $(ARGS)

test-streams: $(DEV)  ## passes a message of 1 GiB and holds 1,000 streams open, over both edges, and prints what they cost (minutes)
	@$(RUN) pytest tests/system/test_streams.py -m "" -s --streams 1000 --stream-bytes 1GiB $(ARGS)

test-chaos: $(DEV)  ## injects ten minutes of random faults and judges every answer (ARGS="--chaos-seed 7 --chaos-seconds 1800")
	@$(RUN) pytest tests/chaos -m "" $(ARGS)

test-attack: $(DEV)  ## attacks a mesh by callers, stores and models; a hot caller must not be affected
	@$(RUN) pytest tests/attack -m attack $(ARGS)

test-onnx: $(DEV)  ## runs the ONNX project's node tests through a mesh, and compares with onnxruntime alone (minutes)
	@$(RUN) tests.nodes $(ARGS)

cost: $(DEV)  ## compares instructions and memory of hot functions with the stored figures (ARGS=--accept: stores new ones)
	@$(RUN) tests.cost $(ARGS)

bench: $(DEV)  ## measures calls/s, CPU per call and latency beside other servers, installed first (1.5 GB; 20 minutes)
	@$(RUN) tests.bench $(ARGS)

performance: $(DEV)  ## writes docs/performance.md and its pictures from the results of the last complete make bench
	@$(RUN) tests.bench.page $(ARGS)

format: $(DEV)  ## formats the sources
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

proto: $(DEV)  ## generates mesh/pb/ from proto/
	$(VENV)/bin/python proto/generate.py

manifests: $(DEV)  ## generates deploy/kustomize/ from deploy/chart/ (needs helm)
	$(VENV)/bin/python deploy/manifests.py

environment-gpu: $(GPU)

environment: $(DEV)  ## creates only the environment, for an editor

# The larger lock first: the smaller one takes its versions from it, so `make test` after `make up` replaces nothing.
RESOLVE = $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links
COMPILE = $(RESOLVE) pyproject.toml requirements/build.in
PEERS = mlserver kserve ray
SERVERS = mlserver

lock: $(VENV)/.made  ## updates the lock files, keeping versions that still fit (ARGS=--upgrade: the newest)
	@test -x $(VENV)/bin/uv || $(PIP) install --quiet uv
	$(COMPILE) --extra cpu --extra local --extra demo --extra convert --extra pictures --extra dev --output-file requirements/dev.txt $(ARGS)
	$(COMPILE) --extra cpu --extra local --extra demo --extra convert --constraints requirements/dev.txt --output-file requirements/up.txt $(ARGS)
	$(COMPILE) --extra cpu --extra edge --constraints requirements/dev.txt --output-file requirements/image.txt $(ARGS)
	$(COMPILE) --extra gpu --extra cuda --extra local --extra demo --extra dev --constraints requirements/dev.txt \
		--output-file requirements/gpu.txt $(ARGS)
	$(COMPILE) --extra gpu --extra cuda --extra edge --constraints requirements/dev.txt --output-file requirements/image-gpu.txt $(ARGS)
	grep -oE '^scikit-learn==[^ ]+' requirements/up.txt > $(VENV)/shared.in
	for server in $(SERVERS); do $(RESOLVE) requirements/server-$$server.in --override requirements/server-overrides.in \
		--constraints $(VENV)/shared.in --output-file mesh/modelservers/locks/$$server.txt $(ARGS) || exit 1; done
	for peer in $(PEERS); do $(RESOLVE) requirements/peer-$$peer.in --output-file requirements/peer-$$peer.txt $(ARGS) || exit 1; done

clean:  ## removes everything made here, including the environment and the local mesh's data
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
	@$(VENV)/bin/python requirements/install.py requirements/$(1).txt $(PIP) install
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
endef

# Debian's python3 has no ensurepip unless python3-venv is installed, but its pip can fill an environment from outside.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
		echo "There is no '$(PYTHON)' on PATH. Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but Mesh needs Python 3.11 or later: make PYTHON=python3.12"; exit 1; }
	@if $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then :; \
	elif $(PYTHON) -c 'import ensurepip, venv' >/dev/null 2>&1; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1 && $(PYTHON) -c 'import venv' >/dev/null 2>&1; then \
		$(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; \
	else echo "$(PYTHON) cannot create a virtual environment: install its venv module (on Debian and Ubuntu: apt install python3-venv)"; exit 1; fi
	@$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(VENV) holds $$($(VENV)/bin/python --version 2>&1), but Mesh needs Python 3.11 or later: remove $(VENV) and try again"; exit 1; }
	@touch $@
