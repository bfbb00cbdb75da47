# Everything from a fresh clone: `make reproduce`, `make test`. What each target needs is set up on the way.
# Nothing here holds logic of its own: the work is done by `python -m reproduce`, pytest, ruff and JupyterLab.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup reproduce grid test campaign lab doctor lint size notebooks lock clean

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
GRID := .venv-grid
GRID_STAMP := $(GRID)/.stamp
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
# Where this is set, each of 17 notebooks would compile torch and all others again: 14 s of imports in the place of 6.
unexport PYTHONDONTWRITEBYTECODE

# Which Python makes the environment: PYTHON=… or the first of these that really runs (a pyenv shim may not), is 3.11 or later, and has venv.
PYTHONS = $(if $(value PYTHON),$(call quoted,$(value PYTHON)),python3.13 python3.12 python3.11 python3)
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

# uv installs three times as fast as pip; it is itself pinned and hashed in the lock. It reads the system's certificates, not pip's settings.
INSTALL_UV = $(PY) -m pip install --quiet --no-deps --require-hashes -r <(sed -n '/^uv==/,/[^\\]$$/p' requirements.lock)
UV = UV_PYTHON=$(PY) $(PY) -m uv --system-certs

# Passed on only where given, on the command line or in the environment. A value is text: neither make nor the shell expands it.
KNOWN := PROFILE DATA BTAD WEIGHTS BACKBONE CATEGORIES EPOCHS SEEDS DEVICE SHARD RENDER_ONLY PYTHON
unexport $(KNOWN) # else make expands them for every command
quoted = '$(subst ','\'',$(1))'
option = $(if $(value $(2)),$(1)=$(call quoted,$(value $(2))))
OPTIONS = $(call option,--profile,PROFILE) $(call option,--data-root,DATA) $(call option,--btad-root,BTAD) $(call option,--weights,WEIGHTS) \
	$(call option,--backbone,BACKBONE) $(call option,--categories-words,CATEGORIES) $(call option,--epochs,EPOCHS) \
	$(call option,--seeds-words,SEEDS) $(call option,--device,DEVICE) $(call option,--shard,SHARD) \
	$(if $(filter-out 0 false False FALSE no No NO n off Off OFF,$(value RENDER_ONLY)),--render-only)
# The same for the workflow, which takes them as settings of its own, in YAML's quotes: else 01 would be a number.
setting = $(if $(value $(2)),$(1)=$(call quoted,'$(subst ','',$(value $(2)))'))
SETTINGS = $(call setting,profile,PROFILE) $(call setting,data_root,DATA) $(call setting,btad_root,BTAD) $(call setting,weights,WEIGHTS) \
	$(call setting,backbone,BACKBONE) $(call setting,categories,CATEGORIES) $(call setting,epochs,EPOCHS) \
	$(call setting,seeds,SEEDS) $(call setting,device,DEVICE) $(call setting,runs,RCP_RUNS)

# A mistyped option would silently run something else.
UNKNOWN := $(filter-out $(KNOWN),$(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v)))
nearest = $(shell python3 -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1))' $(call quoted,$(1)) $(KNOWN) 2>/dev/null)
$(foreach name,$(UNKNOWN),$(error unknown option '$(name)'.$(patsubst %, Did you mean '%'?,$(call nearest,$(name))) There are: $(KNOWN)))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Options of reproduce and grid: PROFILE=demo|paper DATA=dir BTAD=dir WEIGHTS=file BACKBONE=name CATEGORIES='bottle transistor'"
	@echo "  EPOCHS=n SEEDS='0 1 2' DEVICE=auto|cpu|cuda; of reproduce alone: SHARD=i/n RENDER_ONLY=1 (draws from what the store has)"

setup: $(STAMP) ## make .venv with the exact versions of requirements.lock (once; about 8 GB)
	@echo "setup: $(VENV) is ready"

$(STAMP): requirements.lock pyproject.toml
	@[ "$$(uname -sm)" = "Linux x86_64" ] || { echo "setup: requirements.lock is for Linux x86_64, this is $$(uname -sm):" \
		"use environment.yml with conda, or pip install -e '.[notebooks,test]' in an environment of your own"; exit 1; }
	@$(PY) -c '$(USABLE)' 2>/dev/null || { \
		for python in $(PYTHONS) none; do "$$python" -c '$(USABLE)' 2>/dev/null && break; done; \
		[ "$$python" != none ] || { echo "setup: no Python >= 3.11 with the module venv (tried:" $(PYTHONS)");" \
			"install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make setup PYTHON=/path/to/python3.11"; exit 1; }; \
		echo "setup: making $(VENV) with $$("$$python" -V)"; rm -rf $(VENV); "$$python" -m venv $(VENV); }
	@echo "setup: installing requirements.lock into $(VENV) (about 4 GB to fetch, 8 GB on disk; a few minutes)"
	@{ $(INSTALL_UV) && $(UV) pip install --require-hashes -r requirements.lock --build-constraints requirements.lock; } || { \
		echo "setup: uv could not; trying pip, which knows pip's own configuration"; \
		$(PY) -m pip install --require-hashes -r requirements.lock; } || { \
		echo "setup: the install failed; the reason stands above. Usual causes: no way to the package index (a proxy or a certificate:" \
			"HTTPS_PROXY, SSL_CERT_FILE), or too little room ($$(df -Ph . | awk 'NR == 2 {print $$4}') free here, about 8 GB needed)." \
			"Then run the same command again; if it fails still, rm -rf $(VENV) first"; exit 1; }
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@echo "$(CURDIR)" > "$$($(PY) -c 'import site; print(site.getsitepackages()[0])')/rcp-project.pth" # reproduce is no part of the package
	@touch $@

reproduce: $(STAMP) ## run every notebook through papermill and index the results; resumes (see the options below)
	@echo "reproduce: every notebook through papermill; finished entries are not computed again"
	@$(PY) -m reproduce reproduce $(OPTIONS) || { echo "reproduce: failed; the reason stands above. What is finished is kept:" \
		"mend the cause (make doctor says what is missing) and run the same command again"; exit 1; }

grid: $(STAMP) $(GRID_STAMP) ## the same in shards through Snakemake on this machine (clusters: workflow/README.md)
	@echo "grid: shards of the grids, one after another; what is finished is not computed again"
	@$(GRID)/bin/snakemake --snakefile workflow/Snakefile --workflow-profile workflow/profiles/local $(if $(strip $(SETTINGS)),--config $(SETTINGS)) || { \
		echo "grid: failed; the log of each failed job is named above. What is finished is kept: run the same command again"; exit 1; }

# Snakemake caps packaging, which others need newer: it lives in an environment of its own and calls rcp by its path.
$(GRID_STAMP): requirements-grid.lock $(STAMP)
	@echo "grid: making $(GRID) for Snakemake alone"
	@rm -rf $(GRID) && $(PY) -m venv $(GRID)
	@$(UV) pip install --quiet --python $(GRID)/bin/python --require-hashes -r requirements-grid.lock || \
		$(GRID)/bin/python -m pip install --quiet --require-hashes -r requirements-grid.lock
	@touch $@

# One pytest run, so that its summary covers all and stands last; three files at a time, so that two cores have no pauses, the long ones first.
# nbval-lax compares only cells with the tag nbval-check-output.
test: export OMP_NUM_THREADS ?= $(shell echo $$((($$(nproc) + 2) / 3)))
test: export NUMBA_NUM_THREADS ?= $(OMP_NUM_THREADS)
test: export TQDM_DISABLE := 1
test: $(STAMP) $(GRID_STAMP) ## all tests, and every notebook in the demo profile (nbval)
	@echo "test: $(words $(NOTEBOOKS)) notebooks in the demo profile, and tests/"
	@$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env --nbval-cell-timeout=900 $(NOTEBOOKS) tests || { \
		echo "test: failed. Run one again with: $(PY) -m pytest tests/rcp/test_NAME.py -k WORD -x --showlocals" \
			"(a notebook: add --nbval-lax and its path). If nothing can be imported: rm -rf $(VENV), then make test"; exit 1; }

# Kills and full disks first and alone: they fork, which a process that has computed with threads must not.
campaign: export RCP_CAMPAIGN := 10
campaign: $(STAMP) $(GRID_STAMP) ## attack it, on real images where they are at hand: kills, 8 processes, full disks, malformed calls and files, damage, archives, injection; a figure a line (half an hour)
	@timeout 1200 $(PY) -m pytest -q -s tests/reproduce/test_interrupted.py
	@timeout 600 $(PY) -m pytest -q -s tests/rcp/test_malformed.py tests/rcp/test_damage.py tests/rcp/test_download.py tests/rcp/test_cli.py \
		tests/reproduce/test_store.py tests/reproduce/test_environment.py tests/test_cases.py \
		-k "fault_that or malformed or sound_but or archives or damaged or flipped or another_identity or machine or text_to_make or pack_did_not or killed"

lab: $(STAMP) ## open JupyterLab on notebooks/00_start_here.ipynb
	@echo "lab: JupyterLab opens in the browser; its address is printed below; Ctrl-C ends it"
	@$(PY) -m jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

doctor: $(STAMP) ## print device, versions, data, weights, disk, and what the paper profile still needs
	@echo "doctor: what is here, and what is missing"
	@$(PY) -m reproduce doctor

lint: $(STAMP) ## check style and format (ruff, notebooks too)
	@echo "lint: ruff over modules, tests and notebooks"
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . || { \
		echo "lint: failed; mend with: $(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format ."; exit 1; }

size: ## print the code lines of rcp, reproduce and tests
	@python3 tests/size.py

notebooks: $(STAMP) ## execute in place, in the demo profile, the notebooks whose own cells have changed (before committing)
	@echo "notebooks: executing what is older than its cells"
	@$(PY) -m reproduce execute $(NOTEBOOKS)

lock: $(STAMP) ## resolve requirements.lock anew (maintainers; needs the package index)
	@echo "lock: resolving pyproject.toml with its extras notebooks and test; the torch, torchvision and faiss of the published run stay"
	@$(UV) pip compile pyproject.toml --extra notebooks --extra test --constraints <(printf '%s\n' 'torch==2.15.*' 'torchvision==0.29.*' 'faiss-gpu==1.15.*') \
		--universal --fork-strategy fewest --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url --upgrade --quiet \
		--custom-compile-command "make lock" --output-file requirements.lock
	@echo "snakemake>=8" | $(UV) pip compile - --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
		--upgrade --quiet --custom-compile-command "make lock" --output-file requirements-grid.lock

clean: ## remove caches and build leftovers; keeps .venv, data, runs and figures
	@echo "clean: caches and build leftovers"
	@rm -rf build ./*.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name $(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
