# Everything a newcomer types. `make` alone lists the commands.
#
# Set-up happens by itself: the stamp file below is written only when the installation has
# succeeded, so an interrupted set-up starts again and a finished one is not repeated.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Present while pip works. Found at the start, it says that an earlier run was cut short.
UNFINISHED := $(VENV)/.unfinished

TEXT ?= What are the side effects of this drug?
# The sentence travels through the environment, as typed: neither make nor the shell
# expands quotes, dollar signs or parentheses in it.
override TEXT := $(value TEXT)
export TEXT

RECENT := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help install demo serve test lint format bench audit screenshots clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  make demo TEXT='your own sentence'"

install: $(STAMP) ## create .venv with everything in it (the commands below do this by themselves)

demo: $(STAMP) ## embed a sentence, then recover it from the vector alone
	@$(BIN)/unembed invert --text "$$TEXT"

serve: $(STAMP) ## open the live demo in a browser (http://127.0.0.1:8080)
	@$(BIN)/unembed serve --open

test: $(STAMP) ## run the tests, the slow ones too, several at a time
	@$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(PYTEST_OPTIONS)

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## rewrite the code in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP) ## run the benchmarks and print their tables (some minutes)
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.encoding
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.preparation
	$(BIN)/python -m benchmarks.serving

audit: $(STAMP) ## build a demo vector store of 5,000 records and audit it (report: audit-report/)
	@$(BIN)/python examples/audit_store.py audit-demo
	@$(BIN)/unembed audit audit-demo --group-by tenant --out audit-report

screenshots: audit ## take the pictures of the demo and of the audit again, for the README (needs Chromium)
	$(BIN)/python -m tests.browser.screenshots

clean: ## remove .venv, build results and caches (data/ and runs/ stay)
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks examples src tests -type d -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt hashes.txt
	@$(PYTHON) -c '$(RECENT)' 2>/dev/null || { \
		echo "error: unembed needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing); name another one: make PYTHON=python3.11" >&2; \
		exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -c '$(RECENT)' 2>/dev/null || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "creating $(VENV)"; \
		$(PYTHON) -m venv --clear $(VENV) || { \
			echo "error: '$(PYTHON) -m venv' failed (Debian and Ubuntu: apt install python3-venv)" >&2; \
			exit 1; }; \
	fi
	@touch $(UNFINISHED)
	@echo "installing (the first time takes a few minutes)"
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --require-hashes --no-deps -r hashes.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[embedded,demo,dev]'
	@rm -f $(UNFINISHED)
	@touch $@
