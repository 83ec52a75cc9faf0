# The commands of this project; `make help` lists them. Steps that are done already are skipped.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A machine without an NVIDIA GPU saves gigabytes with: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Passed on: make demo ARGS="--iterations 50", make test ARGS="-k client"
ARGS ?=
# Test files that run at the same time; each worker takes about 1 GiB.
TEST_WORKERS ?= 2
# Debian keeps the programs of a PostgreSQL server, which tests start, off the PATH.
POSTGRES_BIN = $(lastword $(sort $(wildcard /usr/lib/postgresql/*/bin)))
CONTRACT := pyproject.toml hatch_build.py $(wildcard services/*/kernels/*.cpp services/*/kernels/*.h) $(wildcard protos/granq/v1/*.proto)
DEMO_OUT ?= demo-out

.DEFAULT_GOAL := help
.PHONY: help venv install install-dev demo test fuzz chaos soak lock sbom audit lint types format protos images-check clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.made ## Make the virtual environment in .venv

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || tools/apt.sh python3-venv
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

install: $(VENV)/.installed ## Install everything that the servers and the command need

$(VENV)/.installed: $(VENV)/.made $(CONTRACT)
	$(PIP) --editable '.[all,rtx]'
	@touch $@

install-dev: $(VENV)/.installed-dev ## Install what tests and checks need, too

$(VENV)/.installed-dev: $(VENV)/.made $(CONTRACT)
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/.installed $@

demo: $(VENV)/.installed ## Quantize the example model through four real servers; ends with a table and demo-out/
	$(BIN)/python examples/fashion_mnist/demo.py --out $(DEMO_OUT) $(ARGS)

test: $(VENV)/.installed-dev ## Run all tests; ARGS go to pytest
	@tools/apt.sh dataset-fashion-mnist postgresql prometheus || echo "tests that need these packages will skip" >&2
	PATH="$$PATH:$(POSTGRES_BIN)" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(ARGS)

fuzz: $(VENV)/.installed-dev ## Feed 100,000 damaged inputs to every parser; ARGS="--seconds 60" for less
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz $(ARGS)

lock: $(VENV)/.installed-dev ## Fix versions and hashes of what is installed, in constraints/ (needs uv on the PATH)
	$(BIN)/python tools/supply_chain.py lock

sbom: $(VENV)/.installed-dev ## List what is installed as sbom.json, with licences; fails for the GPL alone (needs uv)
	$(BIN)/python tools/supply_chain.py sbom
	$(BIN)/python tools/supply_chain.py licenses

audit: $(VENV)/.installed-dev ## Ask PyPI for known vulnerabilities of what is installed (needs uv and network)
	$(BIN)/python tools/supply_chain.py audit

chaos: $(VENV)/.installed-dev ## Pipelines while servers, connections, database and disk are broken; ARGS="--pipelines 20 --real 2"
	@tools/apt.sh postgresql
	PATH="$$PATH:$(POSTGRES_BIN)" OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos.run $(ARGS)

soak: $(VENV)/.installed-dev ## Half an hour of small pipelines: fails if memory, files, threads or tables grow; ARGS="--minutes 10"
	@tools/apt.sh postgresql
	PATH="$$PATH:$(POSTGRES_BIN)" OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.run $(ARGS)

lint: $(VENV)/.installed-dev ## Check style, import rules and the contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/lint_protos.py

types: $(VENV)/.installed-dev ## Check types
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Format the code and sort its imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.installed-dev ## Generate the stubs in granq/v1 from protos/ anew
	$(BIN)/python hatch_build.py

images-check: $(VENV)/.installed-dev ## Build all images by buildah, run each and ask for its health; root, minutes, 40 GB of disk
	tools/apt.sh buildah mmdebstrap iproute2
	$(BIN)/python -m benchmarks.images --out benchmarks/results/images.md $(ARGS)

clean: ## Remove the virtual environment and everything generated
	rm -rf $(VENV) demo-out granq-data dist build granq/v1 .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
