# Everything runs in .venv, which the first target that needs it creates. Nothing has to be activated.
#   PYTHON=python3.11   the interpreter that .venv is made with
#   FRESH=1             `make demo` starts a new run instead of resuming or showing the last one
#   MINUTES=9, ONLY=llama-65b,stock, WHEELS=folder, UNSLOTH=python, DRY=1   for `make gpu`: docs/gpu.md

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/installed
LIGER := .cache/liger/installed

# `make gpu` takes the Python that has this machine's torch. What that one lacks is put beside it, and nothing into it.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))
GPU_SITE := .cache/gpu-site
MINUTES ?= 9
WHEELS ?= $(wildcard wheels)

# DeepSpeed compiles its optimizer for the CPU on first use and looks for ninja on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test lint suite coverage grids chaos fast gpu speed bench training growth profile \
	waiting start scale planners figures site load fleet capacity screens accuracy format clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## plan a 65B fine-tune for one GPU, then fine-tune a tiny model here (FRESH=1: once more)
	$(BIN)/qlora-plan --model 65b --gpus 1
	$(BIN)/python examples/make_demo_base.py --out .cache/demo-base
	$(BIN)/qlora-train examples/demo.yaml $(if $(FRESH),--fresh)

SUITE := -m "not grid and not chaos" -rs -n 2 --dist loadgroup --no-loadscope-reorder

test: lint suite ## what CI runs: lint, then all tests

lint: $(INSTALLED) ## rules of style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

suite: $(INSTALLED) $(LIGER) ## all tests, the slow ones too
	$(BIN)/pytest $(SUITE)

coverage: $(INSTALLED) $(LIGER) ## the same with coverage, which makes tests that compute take nearly twice as long
	$(BIN)/pytest $(SUITE) --cov

grids: $(INSTALLED) ## the long grids of which `make test` runs a sample
	$(BIN)/pytest -m grid

fast: $(INSTALLED) ## the tests that take no workers and no training
	$(BIN)/pytest

chaos: $(INSTALLED) ## long real runs: kills, lost nodes, full disks, out of memory (docs/reliability.md)
	rm -rf .cache/chaos && mkdir -p .cache/chaos
	CHAOS_ROWS=$(CURDIR)/.cache/chaos/rows.jsonl CHAOS_CURVES=$(CURDIR)/.cache/chaos/curves.json \
		$(BIN)/pytest -m "" -n 2 --dist load tests/chaos tests/test_offsite.py \
		tests/test_submit.py::test_a_stopped_run_goes_on_when_it_is_submitted_again \
		tests/test_submit.py::test_a_run_waits_for_what_others_use_says_so_and_begins_when_it_is_free \
		tests/test_train_command.py::test_nor_does_a_second_interrupt \
		tests/test_hub.py::test_a_run_from_a_stand_in_hub_resumes_at_its_commit_and_its_adapter_names_it \
		tests/test_render.py::test_what_a_ray_job_says_is_carried_out_by_a_ray_that_was_started_as_it_says
	PYTHONPATH=examples $(BIN)/python -m benchmarks.reliability

gpu: $(if $(DRY),$(INSTALLED)) ## peaks of real steps on this machine's GPU beside the predictions (DRY=1: small, on the CPU)
ifdef DRY
	UNSLOTH_PYTHON="$(UNSLOTH)" $(BIN)/python -m benchmarks.gpu --dry --minutes $(MINUTES) --only "$(ONLY)"
else
	rm -rf $(GPU_SITE)
	$(if $(WHEELS),$(GPU_PYTHON) -m pip install -q --no-index --no-deps --target $(GPU_SITE) $(WHEELS)/*.whl)
	UNSLOTH_PYTHON="$(UNSLOTH)" PYTHONPATH="$(CURDIR)/$(GPU_SITE):examples:$$PYTHONPATH" $(GPU_PYTHON) -m benchmarks.gpu --minutes $(MINUTES) --only "$(ONLY)"
endif

speed: $(INSTALLED) ## how long planning takes, beside its bare imports and a peer (docs/speed.md)
	$(BIN)/python -m benchmarks.speed

bench: speed planners accuracy waiting start profile fleet load growth training figures ## all of these (docs/benchmarks.md); on a quiet machine, long

training: $(INSTALLED) ## training beside TRL's, Unsloth's and a bare loop, and its memory (docs/benchmarks.md); on a quiet machine
	PYTHONPATH=examples $(BIN)/python -m benchmarks.training

profile: $(INSTALLED) ## where the time of a training step goes on this CPU (docs/performance.md); on a quiet machine
	PYTHONPATH=examples $(BIN)/python -m benchmarks.training.profiling

growth: $(INSTALLED) ## time and memory against model size, length, workers and checkpoints (docs/benchmarks.md); on a quiet machine
	PYTHONPATH=examples $(BIN)/python -m benchmarks.growth

waiting: $(INSTALLED) ## what threads that spin, or sleep, while they wait cost a step (docs/performance.md)
	$(BIN)/python -m benchmarks.waiting

start: $(INSTALLED) ## from the command to the first step, part by part (docs/performance.md); on a quiet machine
	PYTHONPATH=examples $(BIN)/python -m benchmarks.start

scale: $(INSTALLED) ## 200 runs submitted by 20 clients at once to three nodes on this machine (docs/scale.md); two hours
	PYTHONPATH=examples $(BIN)/python -m benchmarks.scale

fleet: $(INSTALLED) ## how long qlora-capacity takes for 50 jobs and for 10,000 runs (docs/capacity.md); on a quiet machine
	$(BIN)/python -m benchmarks.fleet

planners: $(INSTALLED) ## other planners on the steps that were measured on a T4, beside ours (docs/planners.md)
	$(BIN)/python -m benchmarks.planners

figures: $(INSTALLED) ## the pictures of docs/memory.md
	$(BIN)/python -m benchmarks.figures

site: $(INSTALLED) ## the documentation as a site, in .cache/site; fails where a link leads nowhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

load: $(INSTALLED) ## how long qlora-plan serve takes to answer 50 clients (docs/serve.md); on a quiet machine
	QLORA_LEDGER=.cache/no-ledger $(BIN)/python -m benchmarks.load

capacity: $(INSTALLED) ## the three worked examples of docs/capacity.md: documents, pictures, and pages in .cache/capacity
	mkdir -p .cache/capacity
	for each in workstation two-pools thousand-nodes; do \
		QLORA_LEDGER=.cache/no-ledger $(BIN)/qlora-capacity clusters/examples/$$each.yaml \
			--jobs clusters/examples/jobs/$$each.yaml --seconds 10 --methods --report docs/capacity/$$each.md \
			--report .cache/capacity/$$each.html --figures docs/capacity/$$each || [ $$? -eq 1 ] || exit 2; \
	done
	rm docs/capacity/*/*.png

screens: $(INSTALLED) ## run the commands that README.md and docs/planning.md show, and put in what they print
	$(BIN)/python -m benchmarks.screens

accuracy: $(INSTALLED) ## write docs/accuracy.md, docs/step-time.md and plots: predicted beside measured (GRID=1: trace the grids too)
	$(BIN)/python -m benchmarks.accuracy --trace $(if $(GRID),--grid)

format: $(INSTALLED) ## sort the imports and format the code
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

clean: ## remove .venv and all caches; runs/ stays
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): constraints.txt pyproject.toml
	@echo "Installing the versions of constraints.txt into .venv: some minutes, the first time ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --constraint constraints.txt pip
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --build-constraint constraints.txt \
		--group dev --editable '.[train]'
	@touch $@

# Beside .venv: with Triton in it, as on a machine with a GPU, all that imports torch takes longer.
$(LIGER): constraints.txt $(INSTALLED)
	@rm -rf $(@D)
	@$(BIN)/python -m pip install -qq --no-deps --constraint constraints.txt --target $(@D) liger-kernel triton
	@touch $@
