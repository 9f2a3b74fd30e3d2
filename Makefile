# `make demo` and `make test` need only Python (3.10 or newer), make and git; both work in .venv, which they make or reuse.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
NB     ?= $(wildcard nbs/*.ipynb)
INPUTS := settings.ini setup.py pyproject.toml .ci/constraints.txt

.PHONY: demo test lint sync notebooks readme docs hub tritons gpu clean help

help:  ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1	/'

demo: $(VENV)/.installed  ## answer questions with the model that ships in the package
	$(BIN)/pagedlit demo

test: $(VENV)/.installed-dev  ## everything that CI checks
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory sync
	$(BIN)/python -m pytest -n 2 --cov=pagedlit --cov-report=term-missing

lint: $(VENV)/.installed-dev  ## ruff, and mypy --strict on the library
	$(BIN)/ruff check pagedlit tests .ci setup.py
	$(BIN)/mypy

sync: $(VENV)/.installed-dev  ## are the library and the notebooks what nbdev would write?
	PATH="$(abspath $(BIN)):$$PATH" .ci/sync

notebooks: $(VENV)/.installed-dev  ## execute the notebooks and store their outputs (NB=nbs/02_allocator.ipynb for one)
	$(BIN)/python .ci/execute.py $(NB)
	$(BIN)/python .ci/readme.py

readme: $(VENV)/.installed-dev  ## write README.md from nbs/index.ipynb
	$(BIN)/python .ci/readme.py

docs: $(VENV)/.installed-dev  ## render the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto: https://quarto.org/docs/get-started"; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" nbdev_docs
	$(BIN)/python .ci/readme.py

hub: $(VENV)/.installed-dev  ## build the Kernel Hub project into kernels/build
	$(BIN)/python .ci/hub.py

TRITONS ?= 3.6.0 3.9.0
tritons: $(VENV)/.installed-dev  ## run the compile gate with other versions of Triton (downloads each, about 180 MB)
	for version in $(TRITONS); do test -d .triton-$$version || $(BIN)/python -m pip install --quiet --no-deps --target .triton-$$version triton==$$version || exit 1; done
	test -d .triton-3.6.0/numpy || ! test -d .triton-3.6.0 || $(BIN)/python -m pip install --quiet --no-deps --target .triton-3.6.0 'numpy<2.4'
	$(BIN)/python -m pytest -q tests/test_triton_versions.py

gpu:  ## on a machine with a GPU, with the Python that has torch: test the kernels, measure them, keep the numbers (.ci/gpu says how)
	.ci/gpu all

clean:  ## remove what was built; .venv stays
	rm -rf build dist _docs _proc kernels/build .triton-* *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
	find nbs pagedlit tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed $(VENV)/.installed-dev

# The stamps say when .venv was last installed into; a change of the requirements makes them stale.
$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "pagedlit needs Python 3.10 or newer: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(VENV)/pyvenv.cfg
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(VENV)/pyvenv.cfg
	$(PIP) -e '.[dev,notebook]'
	@touch $@ $(VENV)/.installed
