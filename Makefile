# One environment, .venv, made by `make install`; everything else runs inside it.
#
#   PYTHON=python3.12    the interpreter to make .venv with (3.11 or 3.12)
#   CONSTRAINTS=FILE     versions for pip; CONSTRAINTS= takes the newest
#   PYTEST="-k resume"   arguments for pytest, with `make test`, `make test-all` and `make coverage`
#   JOBS=3               processes that run tests, a file at a time; each needs 2 GB of memory
#   DATA=archive.zip     FER2013, with `make reproduce`; WEIGHTS=FILE, RECIPE=NAME, RUN=FOLDER, INTO=FOLDER as well

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PYTEST ?=
JOBS ?= 3
RECIPE ?= patt_lite_best

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIN = $(if $(strip $(CONSTRAINTS)),-c $(CONSTRAINTS))

.PHONY: help install demo reproduce test test-all coverage check format clean FORCE
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name about; do \
	  printf '  make %-9s %s\n' "$$name" "$$about"; done
	@sed -n 's/^#   /  /p' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## make .venv, with every extra that this machine can have

demo: install  ## train patt_lite on drawn faces with two ranks: under 3 minutes on 2 cores
	$(BIN)/torchrun --standalone --nproc_per_node=2 -m fer_dist.train --config demo

reproduce: install  ## from FER2013's archive to the model that ships: make reproduce DATA=archive.zip
	@test -n "$(DATA)" || { echo "error: make reproduce needs the pictures of FER2013" >&2; \
	  echo "  -> make reproduce DATA=archive.zip" >&2; exit 2; }
	$(BIN)/python -m benchmarks.reproduce --data "$(DATA)" --recipe "$(RECIPE)" $(if $(WEIGHTS),--weights "$(WEIGHTS)") \
	  $(foreach folder,$(RUN),--run "$(folder)") $(if $(wildcard docs/failures.md),--failures docs/failures.md) $(if $(INTO),--into "$(INTO)")

# A test often waits for processes that it has started: more of pytest's processes than cores.
# tests/conftest.py puts the long files first; pytest-xdist would sort them by their number of tests.
RUN_TESTS = $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder $(PYTEST)

test: install  ## run the tests that any change can break: 10 minutes on 2 cores
	$(RUN_TESTS) -n $(JOBS)

test-all: test  ## the same, and real kills, lost Ray processes, SLURM and the browser: 30 minutes
	$(RUN_TESTS) -n $(JOBS) -m "slow and not soak"

coverage: install  ## which lines the first tier runs, subprocesses included: coverage/index.html
	rm -rf .coverage coverage
	TEST_FRESH_PROCESSES=1 TEST_TIME_FACTOR=10 $(BIN)/coverage run -m pytest $(PYTEST)
	$(BIN)/coverage combine -q
	$(BIN)/coverage html -q -d coverage
	$(BIN)/coverage report --sort=cover

check: install  ## format, lint, types, shell scripts, and the order of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@command -v shellcheck >/dev/null || { echo "error: make check needs shellcheck" >&2; \
	  echo "  -> apt-get install shellcheck (or https://www.shellcheck.net)" >&2; exit 2; }
	shellcheck -x -P . slurm/*.sh .ci/run
	$(BIN)/python -m pytest -q tests/test_import_order.py

format: install  ## put the code into the form that `make check` wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and what tools leave behind; runs/ stays
	rm -rf $(VENV) .coverage coverage build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

# The stamp holds the constraints that .venv was made with: other ones, named by hand, install again;
# a plain `make test` keeps what is there.
ifneq ($(origin CONSTRAINTS),file)
ifneq ($(strip $(CONSTRAINTS)),$(strip $(shell cat $(STAMP) 2>/dev/null)))
$(STAMP): FORCE
endif
endif

$(STAMP): pyproject.toml Makefile $(wildcard $(CONSTRAINTS))
	@$(call require_python,$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)))
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIN) -e '.[dev]'
	@$(call try_extra,tensorrt-rtx)
	@if nvidia-smi >/dev/null 2>&1; then $(call try_extra,tensorrt); \
	  else echo "extra tensorrt: left out, it needs a GPU and nvidia-smi shows none"; fi
	@echo '$(strip $(CONSTRAINTS))' > $@

# $(call require_python,INTERPRETER): stop unless it is one that torch, ray and the rest have wheels for.
define require_python
found=$$($(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo missing); \
case "$$found" in 3.11|3.12) ;; *) \
  echo "error: fer_dist needs Python 3.11 or 3.12; $(1) is $$found" >&2; \
  if [ -e $(BIN)/python ]; then echo "  -> make clean, then make install PYTHON=python3.11" >&2; \
  else echo "  -> make install PYTHON=python3.11 (or the path of another interpreter)" >&2; fi; \
  exit 2;; esac
endef

# $(call try_extra,NAME): an extra that cannot be had here costs one line, not the installation.
define try_extra
if $(PIP) install -q $(PIN) -e '.[$(1)]' > $(VENV)/$(1).log 2>&1; then echo "extra $(1): installed"; \
else echo "extra $(1): cannot be installed here ($$(grep -m1 -i error $(VENV)/$(1).log || echo 'no reason given'); see $(VENV)/$(1).log)"; fi
endef
