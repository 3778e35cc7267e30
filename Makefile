# make install   an environment in .venv with the tested versions     make demo     the whole recipe in under ten minutes
# make test      the tests                                           make bench    speed and memory beside peers
# make check     lint and types                                      make proofs   the slow proofs, whole
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo addition test check bench proofs clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[demo,test]"
	@touch $@

demo: install
	$(BIN)/python -m lit_palm.demo run

addition: install
	$(BIN)/python -m lit_palm.demo run --recipe addition

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m tests.benchmarks.speed

proofs: install
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache build *.egg-info
