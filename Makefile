# make figures | test | slow | lint | docs | browser | notebooks | clean.  Needs make and Python >= 3.11 with pip and venv.

VENV ?= .venv
PRESET ?= quick
WORKERS ?= 2
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

export TOKENIZERS_PARALLELISM ?= false
# One thread a test worker. A sweep shares the cores out among its runs by itself.
test slow: export OMP_NUM_THREADS = 1
# Many tests start a process: without bytecode each of them compiles the package anew.
test slow: export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help install figures test slow lint docs browser notebooks clean

help:
	@echo "make figures   compute what is missing and draw every figure (PRESET=quick|paper)"
	@echo "make test      the quick test suite, about ten minutes on two cores"
	@echo "make slow      the tests that train or solve for minutes"
	@echo "make lint      ruff and pyright"
	@echo "make docs      the documentation site, in build/docs/html (EXECUTE=1 runs the notebooks)"
	@echo "make browser   open every page of that site in Chromium, at two widths; ONLY=concepts/ some"
	@echo "make notebooks the notebooks with their outputs, as .ipynb and HTML, in build/notebooks"
	@echo "make clean     remove $(VENV), figures/ and caches; runs/ stays"

install: $(STAMP)

# A command named python3.12 may exist and not run, so each candidate is started once.
$(STAMP): pyproject.toml constraints.txt
	@set -e; python=; \
	for name in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "deltacontrol needs Python 3.11 or newer; none was found." >&2; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 2; \
	fi; \
	echo "installing into $(VENV) with $$($$python --version)"; \
	$$python -m venv "$(VENV)" || { \
	  echo "'$$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch "$(STAMP)"

figures: $(STAMP)
	"$(BIN)/deltacontrol" figures --preset $(PRESET)

test: $(STAMP)
	"$(BIN)/python" -m pytest -n $(WORKERS) --dist worksteal

slow: $(STAMP)
	"$(BIN)/python" -m pytest -m slow

lint: $(STAMP)
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m pyright --pythonpath "$(BIN)/python"

# Nothing of the site is loaded from elsewhere; docs.check looks at every link of it.
docs: export OMP_NUM_THREADS = 1
docs: $(VENV)/.docs-installed
	"$(BIN)/python" -m docs.generate build/docs/source $(if $(EXECUTE),--execute)
	"$(BIN)/python" -m sphinx -q -W --keep-going -j $(WORKERS) -d build/docs/doctrees \
	  build/docs/source build/docs/html
	"$(BIN)/python" -m docs.check build/docs/html
	@echo "open build/docs/html/index.html"

# Playwright drives the Chromium of the system, or its own: playwright install chromium.
browser: $(VENV)/.docs-installed
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]"
	"$(BIN)/python" -m docs.browser build/docs/html $(if $(ONLY),--only $(ONLY))

# Those whose text is as when they were executed are left alone; ANEW=1 executes all, in an hour.
notebooks: export OMP_NUM_THREADS = 1
notebooks: $(VENV)/.docs-installed
	"$(BIN)/python" -m docs.notebooks build/notebooks --workers $(WORKERS) $(if $(ANEW),--anew)

$(VENV)/.docs-installed: $(STAMP)
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch "$@"

clean:
	rm -rf "$(VENV)" figures .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
