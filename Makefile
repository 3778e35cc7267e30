# make install           an environment in .venv with the tested versions
# make install-plugins   the packages of plugins/ into it, editable
# make demo              the whole recipe, PPO beside the packages' objectives: under fifteen minutes on two cores
# make addition          PPO on a reward that can be verified: a minute, no download
# make test              the tests of lit_palm      make test-plugins   those of the packages
# make check             lint and types             make proofs         the slow proofs, whole
# make bench             speed and memory beside peers, which get an environment of their own in .venv-peers;
#                        QUICK=1: under twenty minutes on two cores; ONLY='generation*': some of it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PLUGINS := $(VENV)/.plugins
PEERS := .venv-peers/.ready
PACKAGES := $(wildcard plugins/lit-palm-*)
# tests of lit_palm that run whole only with the packages
WITH_PACKAGES := tests/benchmarks/test_alignment.py tests/modules/test_plugin_strategies.py tests/test_coming_from.py \
	tests/foreign/test_aligning_packages.py tests/lora/test_lora_stages.py::test_offline_objectives_need_no_change \
	tests/lora/test_lora_stages.py::test_objectives_that_sample_groups_need_no_change
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# two workers, each with one thread
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: install install-plugins demo addition test test-plugins check bench proofs clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo,test]"
	@touch $@

install-plugins: $(PLUGINS)

$(PLUGINS): $(READY) $(PACKAGES:%=%/pyproject.toml)
	$(PIP) $(PACKAGES:%=-e ./%)
	@touch $@

demo: install-plugins
	$(BIN)/python -m lit_palm.demo run

addition: install
	$(BIN)/python -m lit_palm.demo run --recipe addition

test: install
	$(PYTEST)

test-plugins: install-plugins
	$(PYTEST) $(PACKAGES:%=%/tests) $(WITH_PACKAGES)

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install-plugins $(PEERS)
	$(BIN)/python -m tests.benchmarks $(if $(QUICK),--quick) $(foreach name,$(ONLY),--only '$(name)')

# one line of the list at a time, so that a peer that cannot be installed takes no other with it
$(PEERS): tests/benchmarks/peers.txt constraints.txt
	$(PYTHON) -m venv .venv-peers
	grep -v '^#' tests/benchmarks/peers.txt | while read -r line; do \
		.venv-peers/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt $$line \
			|| echo "make bench: left out, pip could not install $$line"; \
	done
	.venv-peers/bin/python -c "import torch"
	@touch $@

proofs: install-plugins
	$(BIN)/python -m pytest -m slow tests plugins

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache build *.egg-info
