# Two commands set everything up on a fresh machine: `make bench` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Set in many containers. Hundreds of processes start here, and each would compile the package and the tests again.
unexport PYTHONDONTWRITEBYTECODE
# OpenMP's threads sleep while they wait, and leave the cores to other processes (dgal_bench/cli/main.py says more).
export OMP_WAIT_POLICY ?= PASSIVE
# faiss-cpu and faiss-gpu own the same module: exactly one is installed, by whether a GPU driver answers.
FAISS := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
# What running needs, what tests need too, and what only benchmarks do (peers: some of them need a C++ compiler).
INSTALLED := $(VENV)/.installed-$(FAISS)
FOR_TESTS := $(VENV)/.installed-dev
FOR_BENCHMARKS := $(VENV)/.installed-peers
FOR_ENGINE = $(if $(filter ray slurm,$(ENGINE)),$(VENV)/.installed-$(ENGINE))

ARGS = $(if $(SUITE),suite=$(SUITE)) $(if $(DATASET),dataset=$(DATASET)) $(if $(DATA_PATH),dataset.path=$(DATA_PATH)) \
       $(if $(STRATEGIES),strategy=$(STRATEGIES)) \
       $(if $(SEEDS),seed=$(SEEDS)) $(if $(ROUNDS),rounds=$(ROUNDS)) $(if $(PROFILE),profile=$(PROFILE)) \
       $(if $(RESULTS),results=$(RESULTS)) $(if $(ENGINE),engine=$(ENGINE)) $(if $(JOBS),jobs=$(JOBS)) \
       $(if $(PLUGINS),plugins=$(PLUGINS)) $(OVERRIDES)

.DEFAULT_GOAL := help
.PHONY: help setup setup-browser bench smoke report claims dashboard status validate replay benchmarks data doctor test test-all mutants lint type clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  bench takes DATASET= DATA_PATH= STRATEGIES= SEEDS= ROUNDS= PROFILE= SUITE= RESULTS= ENGINE= JOBS= PLUGINS= OVERRIDES='key=value ...'"

setup: $(FOR_TESTS)  ## make .venv with everything that tests need (a few minutes, once)

PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-input -e
$(INSTALLED): pyproject.toml
	@echo "Set-up, once: $(VENV) gets torch and the rest, about 6 GB, in two to five minutes."
	$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	@$(BIN)/python -m pip uninstall --quiet --yes faiss-cpu faiss-gpu faiss-gpu-cuvs 2>/dev/null || true
	$(PIP_INSTALL) '.[$(FAISS)]'
	@touch $@

$(FOR_TESTS): $(INSTALLED)
	$(PIP_INSTALL) '.[$(FAISS),ray,slurm,dashboard,dev]'
	@touch $@

# an extra by its name: ray, slurm, dashboard, peers
$(VENV)/.installed-%: $(INSTALLED)
	$(PIP_INSTALL) '.[$(FAISS),$*]'
	@touch $@

# For the tests alone, which look at report.html as its reader does; they are skipped where there is no browser.
BROWSERS = chromium google-chrome
AS_ROOT = $(shell [ "$$(id -u)" = 0 ] || echo sudo)
APT = $(AS_ROOT) env DEBIAN_FRONTEND=noninteractive apt-get -qq
setup-browser:  ## install Debian's Chromium, unless a browser is there: tests look at reports with it
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	for tool in apt-get $(AS_ROOT); do command -v $$tool >/dev/null || { \
	  echo "setup-browser needs $$tool, which is not here: install Chromium by hand, as 'chromium' on the path" >&2; exit 1; }; done; \
	echo "Set-up, once: Chromium and a font, by apt-get."; \
	$(APT) update && $(APT) install --yes --no-install-recommends chromium fonts-dejavu-core >/dev/null

bench: $(INSTALLED) $(FOR_ENGINE)  ## run a suite (default: digits, the strategies of the paper, 5 seeds), then report
	@$(BIN)/dgal-bench bench $(strip $(ARGS))

smoke: $(INSTALLED) $(FOR_ENGINE)  ## run every strategy for seconds, on a tiny subset
	@$(BIN)/dgal-bench bench suite=smoke $(filter-out suite=%,$(strip $(ARGS)))

ON_RESULTS = @$(BIN)/dgal-bench $@ $(or $(RESULTS),results/runs)
report: $(INSTALLED)  ## tables and figures of RESULTS (default results/runs)
	$(ON_RESULTS) $(if $(GROWTH),growth=$(GROWTH))

claims: $(INSTALLED)  ## the paper's claims, each with its verdict by RESULTS (GROWTH=FILE: of benchmarks/scaling.py)
	$(ON_RESULTS) $(if $(GROWTH),growth=$(GROWTH))

dashboard: $(VENV)/.installed-dashboard  ## the W&B workspace of RESULTS, as JSON in RESULTS/dashboard.json
	$(ON_RESULTS) --dry-run $(or $(RESULTS),results/runs)/dashboard.json
	@echo "To push it: $(BIN)/dgal-bench dashboard $(or $(RESULTS),results/runs) --push wandb.entity=NAME"

status: $(INSTALLED)  ## what is done, at work, failed or missing in RESULTS
	$(ON_RESULTS)

validate: $(INSTALLED)  ## every row of RESULTS checked
	$(ON_RESULTS)

replay: $(INSTALLED)  ## queries of RESULTS timed again, alone
	$(ON_RESULTS)

# The small sizes, beside the committed results; benchmarks/README.md has the commands of those.
MEASURED = build/benchmarks
measure = @$(BIN)/python benchmarks/$(1).py $(2) --out $(MEASURED)/$(1).json
benchmarks: $(FOR_BENCHMARKS)  ## measure graphs, queries, their growth, training, memory and the rest; an hour on two cores, quiet
	$(call measure,graph_build,--large 250000 --limit 120)
	$(call measure,diffusion,--points 60000)
	$(call measure,query,--sample 200)
	$(call measure,scaling,--points 10000 30000 100000)
	$(call measure,acquisition)
	$(call measure,inference)
	$(call measure,training)
	$(call measure,memory,--small)
	$(call measure,scheduling)
	$(call measure,reporting)

comma := ,
data: $(INSTALLED)  ## find, download and check the files of DATASET (none named: say what is there)
	@$(BIN)/dgal-bench data $(subst $(comma), ,$(DATASET))

doctor: $(INSTALLED)  ## is this machine fit to run, and if not, what mends it
	@$(BIN)/dgal-bench doctor

PYTEST = @$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal
test: setup  ## the fast tests
	$(PYTEST)

test-all: test  ## every test: the fast ones, then the slow ones; GPU tests are skipped without a GPU
	$(PYTEST) -rs -m '(slow or gpu) and not alone'
	@$(BIN)/python -m pytest -m alone

mutants: setup  ## make seeded mistakes in a copy, one at a time, each to be caught by its tests
	@$(BIN)/python tests/mutants.py

lint: setup  ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: setup  ## mypy --strict
	@$(BIN)/mypy

clean:  ## remove build products and tool caches; never results or data
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
