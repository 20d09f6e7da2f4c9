PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= 2
ARGS   ?=

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST    := .venv-lowest
# -qq: errors only. Without it pip prints a line for each of some 100 packages.
PIP       := -m pip --disable-pip-version-check install -qq
PYTEST    := -m pytest -n $(JOBS) --dist worksteal
COMPILE   := uv pip compile -q pyproject.toml --extra test --no-annotate
# torch is named in TORCH. The CUDA packages that it asks for on Linux stay out: the tests run on the CPU.
NOT_TORCH := grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)=='

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test test-slow test-lowest lint format lock clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON=$(PYTHON) makes the environment, JOBS=$(JOBS) test processes, ARGS= is passed to pytest."

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "codi_jax needs Python 3.11 or newer and $(PYTHON) is not: name one, as in 'make PYTHON=python3.12 venv'." >&2; \
	    exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)

# The stamp is touched last, so that an interrupted installation is taken up again.
$(INSTALLED): requirements.lock pyproject.toml | $(BIN)/python
	@echo "Installing requirements.lock and $(TORCH) into $(VENV) (some minutes the first time) ..."
	@$(BIN)/python $(PIP) -r requirements.lock $(TORCH)
	@$(BIN)/python $(PIP) --no-deps -e .
	@touch $@

venv: $(INSTALLED)  ## make .venv with the locked packages, where it is missing or out of date

test: $(INSTALLED)  ## run the tests, except the slow ones
	$(BIN)/python $(PYTEST) $(ARGS)

test-slow: $(INSTALLED)  ## run the slow tests only
	$(BIN)/python $(PYTEST) -m slow $(ARGS) || test $$? = 5  # 5: there are none

$(LOWEST)/.installed: pyproject.toml | $(INSTALLED)
	@echo "Installing the lowest versions that pyproject.toml allows into $(LOWEST) ..."
	@$(BIN)/python -m venv $(LOWEST)
	@$(BIN)/$(COMPILE) --resolution lowest-direct --python $(LOWEST)/bin/python > $(LOWEST)/resolved.txt
	@$(NOT_TORCH) $(LOWEST)/resolved.txt > $(LOWEST)/requirements.txt
	@$(LOWEST)/bin/python $(PIP) -r $(LOWEST)/requirements.txt $(TORCH)
	@$(LOWEST)/bin/python $(PIP) --no-deps -e .
	@touch $@

test-lowest: $(LOWEST)/.installed  ## run the tests with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python $(PYTEST) $(ARGS)

lint: $(INSTALLED)  ## ruff check, ruff format --check, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)  ## let ruff mend and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: | $(BIN)/python  ## resolve requirements.lock anew, for Python 3.11 and later
	@test -x $(BIN)/uv || $(BIN)/python $(PIP) uv
	@$(BIN)/$(COMPILE) --universal --python-version 3.11 --custom-compile-command "make lock" > requirements.resolved
	@$(NOT_TORCH) requirements.resolved > requirements.lock
	@rm requirements.resolved

clean:  ## remove environments, caches and build products
	rm -rf $(VENV) $(LOWEST) .cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
