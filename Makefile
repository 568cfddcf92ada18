# `make demo` shows it, `make test` proves it; both set up what they need. See README.md.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Debian's own interpreter: it comes with the library that is linked into the programs.
PYTHON ?= /usr/bin/python3
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := $(shell find cni flanneld launcher packaging -name '*.py' -o -name '*.spec' -o -name '*.c') pyproject.toml

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: packaging/apt.done $(VENV)/.done ## install Debian packages that are missing, and the virtual environment

packaging/apt.done: packaging/debian-packages.txt
	@packaging/install-debian-packages.sh $<
	@touch $@

$(VENV)/.done: requirements.txt requirements-build.txt | packaging/apt.done
	@echo "==> virtual environment $(VENV): pinned Python packages, checked by hash"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-build.txt
	@$(PY) -m pip install -qq --disable-pip-version-check --require-hashes --no-build-isolation -r requirements.txt
	@touch $@

build: dist/.done ## freeze the programs into dist/cni-bin and dist/bin

dist/.done: $(VENV)/.done $(SOURCES)
	@echo "==> freezing the programs into dist/ (PyInstaller; takes half a minute)"
	@$(PY) packaging/build.py
	@touch $@

image: dist/image/flannel.tar ## the container image as an OCI archive, made without a registry (needs root)

dist/image/flannel.tar: dist/.done build/image/.done packaging/mk-docker-opts.sh packaging/kube-flannel.yml \
    $(wildcard packaging/Dockerfile* packaging/image/*)
	@packaging/image/build.sh build/image $@

build/image/.done: packaging/image/base.sh packaging/image/buildah.sh | packaging/apt.done
	@rm -rf build/image
	@packaging/image/base.sh build/image
	@touch $@

demo: build ## run the whole path: three nodes, six pods (STORE=sqlite|etcd, KEEP=1 leaves it running)
	@$(PY) -m tests.lab.demo

guest-kernel: build/guest/kernel/.done ## unpack Debian's cloud kernel for the virtual machines

build/guest/kernel/.done: packaging/fetch-guest-kernel.sh | packaging/apt.done
	@packaging/fetch-guest-kernel.sh build/guest/kernel
	@touch $@

demo-vm: build guest-kernel ## two virtual machines in pods, one for each binding
	@$(PY) -m tests.lab.demo_vm

demo-down: $(VENV)/.done ## remove what `make demo KEEP=1` left
	@$(PY) -m tests.lab.demo down

lint: $(VENV)/.done ## format, lint, types, import direction
	@$(VENV)/bin/ruff format --check -q .
	@$(VENV)/bin/ruff check -q .
	@$(VENV)/bin/mypy
	@$(PY) -m pytest -q tests/unit/test_import_direction.py

unit: $(VENV)/.done ## tests that need neither root nor the network
	@$(PY) -m pytest -q --numprocesses=auto tests/unit

root:
	@[ "$$(id -u)" = 0 ] || { echo "must run as root, since it makes network namespaces: sudo make $(MAKECMDGOALS)"; exit 1; }

test: root build image guest-kernel lint ## everything, on real parts (needs root)
	@$(PY) -m pytest --numprocesses=auto tests/unit tests/netns
	@$(PY) -m pytest --numprocesses=auto --dist=loadfile tests/e2e

bench: build ## timings beside the real peers
	@$(PY) -m pytest -q -s tests/bench

lock: ## pin the Python packages again (needs pip-tools)
	@for extra in "requirements.txt --extra etcd --extra kube --extra dev"; do \
	  pip-compile -q --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
	    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host -o $$extra pyproject.toml; done

clean: ## remove everything that was made here
	@rm -rf build dist $(VENV) packaging/apt.done .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help root setup build image guest-kernel demo demo-vm demo-down lint unit test bench lock clean
