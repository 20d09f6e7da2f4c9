PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= 2
ARGS   ?=
DEMO   ?= outputs/demo

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_READY := $(VENV)/.installed-demo
LOWEST    := .venv-lowest
BARE      := build/bare
# -qq: errors only. Without it pip prints a line for each of some 100 packages.
PIP       := -m pip --disable-pip-version-check install -qq
# A file's tests run in one process, which makes their models and compiles their programs once.
PYTEST    := -m pytest -n $(JOBS) --dist loadfile
COMPILE   := uv pip compile -q pyproject.toml --extra test --no-annotate
# torch is named in TORCH. The CUDA packages that it asks for on Linux stay out: the tests run on the CPU.
NOT_TORCH := grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)=='

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-slow test-lowest lint format docs wheel lock clean

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

# What the demo needs, in the locked versions: neither PyTorch nor what the tests need.
$(DEMO_READY): requirements.lock pyproject.toml | $(BIN)/python
	@test -e $(INSTALLED) || { \
	    echo "Installing what the demo needs into $(VENV) (a minute or two the first time) ..."; \
	    $(BIN)/python $(PIP) -c requirements.lock -e ".[avatars,evaluation]"; }
	@touch $@

# The LCM command of the README on the model in assets/, and what one and two steps then draw. The teacher is better with
# guidance, which the student has built in.
demo: $(DEMO_READY)  ## distill a one-step student of the model in assets/ and compare the two (10 minutes on 2 cores)
	$(BIN)/python dataset_tools/avatars.py --train_data_dir $(DEMO)/data/train --max_train_samples 8000
	$(BIN)/python dataset_tools/avatars.py --train_data_dir $(DEMO)/data/validation --max_train_samples 100 \
	    --split validation
	$(BIN)/python training_scripts/train_lcm_flax.py --pretrained_teacher_model assets/avatars \
	    --train_data_dir $(DEMO)/data/train --validation_data_dir $(DEMO)/data/validation --resolution 64 \
	    --cache_latents --cache_dir $(DEMO)/cache --w_min 2 --w_max 2 --guidance_scale 3 --train_batch_size 32 \
	    --max_train_steps 240 --learning_rate 5e-4 --lr_scheduler cosine --lr_warmup_steps 20 --logging_steps 20 \
	    --checkpointing_steps 80 --checkpoints_total_limit 1 --resume_from_checkpoint latest --validation_steps 0 \
	    --output_dir $(DEMO)/student
	$(BIN)/python -m codi_jax.evaluate --models teacher@50,2,1=assets/avatars student@2,1=$(DEMO)/student \
	    --data $(DEMO)/data/validation --guidance_scale 3 --seeds 0 --output_dir $(DEMO)/evaluation

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

docs: $(INSTALLED)  ## build the documentation's site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "See build/site/index.html, or run: $(BIN)/mkdocs serve"

# Outside of the checkout, and without what only the tests need.
wheel: $(INSTALLED)  ## build the wheel in dist/, and try it in an environment of its own
	@rm -rf dist $(BARE)
	$(BIN)/uv build -q --wheel
	@$(BIN)/python -m venv $(BARE)
	$(BARE)/bin/python $(PIP) -c requirements.lock "$$(echo dist/*.whl)[avatars]"
	cd $(BARE) && bin/codi-jax data avatars --train_data_dir data --max_train_samples 4
	cd $(BARE) && bin/codi-jax train lcm --pretrained_teacher_model $(CURDIR)/assets/avatars --train_data_dir data \
	    --resolution 64 --train_batch_size 2 --max_train_steps 2 --validation_steps 0 --num_validation_images 1 \
	    --output_dir student
	cd $(BARE) && bin/codi-jax generate --model student --prompt "a green pot with a cactus" --steps 1 --output student.png

lock: | $(BIN)/python  ## resolve requirements.lock anew, for Python 3.11 and later
	@test -x $(BIN)/uv || $(BIN)/python $(PIP) uv
	@$(BIN)/$(COMPILE) --universal --python-version 3.11 --custom-compile-command "make lock" > requirements.resolved
	@$(NOT_TORCH) requirements.resolved > requirements.lock
	@rm requirements.resolved

clean:  ## remove environments, caches and build products
	rm -rf $(VENV) $(LOWEST) .cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
