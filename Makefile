# Needs git, make and Python >= 3.11; `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format contract mutants chaos bench services-start services-stop lock clean

RUN := .venv/bin/python -m
LOCKS := requirements-build.lock pyproject.toml

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

demo: .venv/runtime ## Follow ten simulated chats and check every fold (ARGS="--serve" or "--dialect d3", see `relay demo --help`)
	@.venv/bin/relay demo $(ARGS)

test: lint ## Start RabbitMQ and PostgreSQL, lint, run the whole suite (ARGS="tests/core -x" narrows it)
	@.venv/bin/python scripts/services run -- $(RUN) pytest --numprocesses 3 --dist worksteal $(ARGS)

mutants: .venv/dev ## Break the code on purpose, many times, and see that the tests notice (ARGS="--list", "--only NAME")
	@.venv/bin/python scripts/services run -- .venv/bin/python scripts/mutants $(ARGS)

chaos: .venv/dev ## Strike the relay in every way while chats talk (ARGS="--plans all --seeds 50 --dialect d3", "--help")
	@$(RUN) tests.chaos $(ARGS)

bench: .venv/dev ## Measure everything briefly (ARGS="all --json figures.json" measures it well, see `relay bench --help`)
	@.venv/bin/python scripts/services run -- .venv/bin/relay bench $(or $(ARGS),all --short)

lint: .venv/dev ## Check style, format, types, floors and shell scripts
	@$(RUN) ruff check --quiet
	@$(RUN) ruff format --check --quiet || { echo 'not formatted: run "make format"' >&2; exit 1; }
	@$(RUN) mypy
	@.venv/bin/lint-imports
	@.venv/bin/shellcheck scripts/venv scripts/lock .ci/run

format: .venv/dev ## Format the code and repair what ruff can
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

contract: .venv/dev ## Remake docs/contract, docs/metrics.md, docs/compatibility.md
	@$(RUN) tests.contract_events docs/contract/examples
	@.venv/bin/relay contract write docs/contract
	@.venv/bin/relay contract metrics > docs/metrics.md
	@$(RUN) tests.compatibility > docs/compatibility.md

services-start: .venv/dev ## Start RabbitMQ and PostgreSQL, leave them running, print their variables
	@.venv/bin/python scripts/services start

services-stop: .venv/dev ## Stop what services-start left running
	@.venv/bin/python scripts/services stop

lock: .venv/runtime ## Remake the locks from pyproject.toml (ARGS=--upgrade takes the newest versions)
	@scripts/lock $(ARGS)

clean: ## Stop the services; remove .venv, caches and builds
	@if [ -x .venv/bin/python ]; then .venv/bin/python scripts/services stop; fi
	@rm -rf .venv .services .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	@find relay tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/runtime: requirements.lock $(LOCKS)
	@scripts/venv runtime

.venv/dev: requirements-dev.lock $(LOCKS)
	@scripts/venv dev
