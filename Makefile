# Everything runs in .venv, which each target sets up first if it is missing or out of date.
# Needs Python 3.11 or newer and nothing else; XDIT_TORCH_SPEC picks another torch.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv/bin/python
PYTEST_ARGS ?=
# Two cores have time for three: every fourth second a test waits for something.
WORKERS ?= 3
TYPED := $(foreach p,protocol daemon comfy_client_node,$(if $(wildcard $(p)/__init__.py),-p xdit_sidecar.$(p)))

unexport PYTHONPATH
# Without bytecode on the disk every process of the tests compiles all of its modules again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup venv tools lint format types docs test coverage soak bench bench-gpu demo clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):[^#]*## */\1|/' \
		| while IFS='|' read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

setup: ## create or update .venv (CPU or CUDA build of torch, whichever fits this machine)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) tools/setup_env.py

venv: setup

lint: setup ## ruff: rules and format
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

format: setup ## ruff: fix what can be fixed
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

types: setup ## mypy, strict, over the package
	@mkdir -p .cache/types && ln -sfn ../.. .cache/types/xdit_sidecar
	$(if $(TYPED),$(VENV) -m mypy $(TYPED),@echo "nothing to type-check yet")

docs: setup ## docs/protocol.md from the message types
	$(VENV) tools/protocol_reference.py

tools:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) tools/setup_env.py --tools

test: tools ## every behaviour once, in parallel
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# Not in `test`: tracing takes half as much time again.
coverage: tools ## the same, and which lines of the package it ran
	@mkdir -p .cache/coverage
	PYTHONPATH="$(CURDIR)/tests/untraced" OMP_NUM_THREADS=1 \
		$(VENV) -m pytest -n $(WORKERS) --cov $(PYTEST_ARGS)

soak: setup ## the full counts, resumable, written as JSON
	OMP_NUM_THREADS=1 $(VENV) tests/soak/run.py

bench: setup ## times and memory against their thresholds
	$(VENV) benchmarks/run.py

# With XDIT_WHEELS, a directory of benchmarks/gpu/carry.py, nothing is set up: PYTHON has torch.
bench-gpu: $(if $(XDIT_WHEELS),,setup) ## targets on a GPU, and their table and plot; STAGES="…" picks some
	@status=0; \
	$(if $(XDIT_WHEELS),$(PYTHON),$(VENV)) benchmarks/gpu/run.py benchmarks/results $(STAGES) || status=$$?; \
	$(if $(XDIT_WHEELS),$(PYTHON),$(VENV)) benchmarks/report/run.py && exit $$status

demo: setup ## the main job once, on the GPUs or else on the CPU
	$(VENV) examples/demo.py

clean: ## remove .venv and everything generated
	rm -rf .venv .cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
