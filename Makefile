# Everything needs only python3 (3.11 or newer) and make; the first use makes .venv and installs the pinned packages.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
OLDER := 3.6.0
# Two files of tests at a time: ranks wait for one another, and for ranks that are lost. Files of many short tests come last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help train test faults check gate clean
.DEFAULT_GOAL := help

help: ## Say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo 'Options: ARGS="..." is passed on, e.g. make train ARGS="train.total_tokens=200000"; PYTHON=python3.12'

train: $(READY) ## Pretrain the tiny model on this machine (minutes on a laptop)
	$(BIN)/deepseek-train experiment=tiny $(ARGS)

test: $(READY) ## Run the tests
	$(PYTEST) $(ARGS)

faults: $(READY) ## Inject every fault there is a test for (minutes)
	$(PYTEST) -m "slow_faults or not slow_faults" tests/faults $(ARGS)

check: $(READY) ## Lint, format, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gate: $(READY) .venv/triton-$(OLDER)/triton ## Compile all kernels for Hopper, no GPU needed, and hold them to their limits
	@PYTHONPATH=.venv/triton-$(OLDER) env -u TRITON_INTERPRET \
		$(BIN)/python -m deepseek_kernels.gate $(ARGS) >.venv/gate-$(OLDER).log 2>&1 & older=$$!; \
	env -u TRITON_INTERPRET $(BIN)/python -W ignore -m deepseek_kernels.gate $(ARGS); newest=$$?; \
	wait $$older; older=$$?; cat .venv/gate-$(OLDER).log; exit $$((newest + older))

.PHONY: soak
soak: $(READY) ## One run suffers 30 faults and must end in the bits of a clean one (some 10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak $(ARGS)

clean: ## Remove the environment and the caches (never runs/ and datasets/)
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# The gate's second Triton, beside the first: that of torch 2.11.
.venv/triton-$(OLDER)/triton: $(READY)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .venv/triton-$(OLDER) triton==$(OLDER)

# torch goes first and alone: deepspeed looks for it, and its index may be another one than that of the rest.
$(READY): requirements/lock.txt requirements/kernels.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "$(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { \
		echo "no virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -r requirements/lock.txt \
		-r requirements/kernels.txt
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
