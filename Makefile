# Each target works as the first command after `git clone`, with Python 3.11+ and make; run again, it starts at once.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ONLY ?=
FORCE ?=

BOOK ?= $(VENV)/book
BROWSER ?= $(VENV)/browser
SOURCE := build/book/source
COVERAGE := build/coverage.txt
PY := $(VENV)/bin/python
# What an extra of pyproject.toml names, without the package itself.
extra = $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"])')
PIP := $(PY) -m pip --disable-pip-version-check -qq
# --no-compile below: a module is compiled when it is first imported, and most never are. That installs a minute sooner.
# Python must then be free to keep what it compiles, which some containers forbid.
# Notebooks and tests run JOBS at a time, each on one thread: fastest on two cores, and repeatable.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export PYDEVD_DISABLE_FILE_VALIDATION = 1
export HF_HUB_OFFLINE ?= 1
unexport PYTHONPATH PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help tutorial test mutants gpu-check lab notebooks nbgrader nbgrader-check colab-check book slides browser-test api release clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

tutorial: $(VENV)/.notebooks  ## run every notebook headless (ONLY, FORCE=1); one table, results in build/tutorial/
	@$(PY) -m tools.course.tutorial --jobs $(JOBS) $(if $(FORCE),--force) $(ONLY)

test: $(VENV)/.dev  ## all that must hold: ruff, mypy, built notebooks, pytest (and its coverage), rehearsed notebooks
	@$(PY) -m ruff check --quiet .
	@$(PY) -m mypy --no-error-summary
	@$(PY) -m tools.course.build --check
	@mkdir -p build
	@$(PY) -m slipcover --source flowscale_lite --out $(COVERAGE) -m pytest -q -n $(JOBS) --dist worksteal -m "not apart" --ignore tests/browser
	@awk '/summary/ {print "pytest ran " $$NF " % of the lines of flowscale_lite; by file: $(COVERAGE)"}' $(COVERAGE)
	@PYTHONPATH=$(VENV)/torchao $(PY) -m pytest -q -n $(JOBS) -m apart tests/test_memory.py tests/test_gpu_check.py
	@$(PY) -m tools.course.rehearsal --jobs $(JOBS)

mutants: $(VENV)/.dev  ## plant mistakes in a copy; which test catches which (ONLY="SMC" picks some)
	@$(PY) -m tools.mutants --jobs $(JOBS) $(if $(ONLY),--only "$(ONLY)")

gpu-check: $(VENV)/.notebooks  ## what this code does on this machine's GPU, without a download; record in data/results/gpu/
	@$(PY) -m tools.runs.gpu_check

# Whoever is root here, in a container, means it.
lab: $(VENV)/.notebooks  ## open JupyterLab on the repository, at notebook 00
	@unset HF_HUB_OFFLINE OMP_NUM_THREADS MKL_NUM_THREADS; \
		$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start.ipynb \
		$(if $(filter 0,$(shell id -u)),--allow-root)

notebooks: $(VENV)/.notebooks  ## rebuild notebooks whose source changed (ONLY="03 05", FORCE=1)
	@$(PY) -m tools.course.build $(if $(FORCE),--force) $(ONLY)

nbgrader: $(VENV)/.notebooks  ## write the notebooks as nbgrader assignments into build/nbgrader/source/ (ONLY)
	@$(PY) -m tools.course.nbgrader $(ONLY)

nbgrader-check: $(VENV)/.notebooks build/nbgrader-venv/.done  ## nbgrader grades a right and a wrong submission of each (ONLY)
	@$(PY) -m tools.course.nbgrader --check build/nbgrader-venv/bin/nbgrader $(ONLY)

colab-check: $(VENV)/.dev  ## run each notebook twice as on Colab: empty folder, its versions, the built wheel (ONLY)
	@$(PY) -m tools.course.colab $(ONLY)

book: $(VENV)/.dev $(BOOK)/.stamp  ## build the book from the notebooks into build/book/: search, API, cheat sheet; no network to read it
	@$(PY) -m tools.course.book $(SOURCE)
	@mkdir -p $(SOURCE)/vendor/mathjax && cp $(BOOK)/node_modules/mathjax/es5/tex-svg-full.js $(SOURCE)/vendor/mathjax/
	@$(BOOK)/bin/python tools/course/sheet.py book/cheat_sheet.md $(SOURCE)/book/cheat_sheet.pdf
	@$(BOOK)/bin/jupyter-book build -q -W --keep-going --path-output build/book $(SOURCE)
	@echo "The book: build/book/_build/html/index.html"

slides: $(VENV)/.notebooks $(BOOK)/.stamp  ## build slides of every notebook's core into build/slides/ (ONLY="03 05")
	@$(PY) -m tools.course.slides --js $(BOOK)/node_modules $(ONLY)

browser-test: book slides $(BROWSER)/.stamp  ## open book, slides and JupyterLab in Chromium; skipped where there is none
	@PYTHONPATH=$(BROWSER) $(PY) -m pytest -q -rs tests/browser

release: $(VENV)/.dev  ## check notebooks, build wheel and sdist into dist/, print the tag's notes; publishes nothing
	@$(PY) -m tools.course.build --check
	@rm -rf dist
	@$(PY) -m hatchling build -d dist
	@$(PY) -m tools.release

api: $(VENV)/.dev  ## build the API reference from the docstrings into build/api/
	@$(PY) -m pdoc -o build/api flowscale_lite

clean:  ## remove the environment and everything generated outside git
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; ok = (3, 11) <= v < (3, 14); \
		sys.exit(None if ok else "Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.12 ..." % v)'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The stamps are newer than what they were installed from; dev holds everything notebooks does. torchao stands apart:
# where it can be imported it warns on every import of diffusers, and notebooks must be free of warnings.
$(VENV)/.notebooks: pyproject.toml constraints.txt | $(PY)
	@echo "Installing flowscale-lite and what the notebooks need (minutes, once)"
	@$(PIP) install --no-compile -c constraints.txt -e ".[notebooks]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(PY)
	@echo "Installing flowscale-lite and what the tests need (minutes, once)"
	@$(PIP) install --no-compile -c constraints.txt -e ".[notebooks,dev]"
	@$(PIP) install --no-compile -c constraints.txt --no-deps --upgrade --target $(VENV)/torchao torchao
	@touch $@ $(VENV)/.notebooks

# nbgrader brings a database and a server of its own, so it stands apart; it runs submissions with the kernel of $(VENV).
build/nbgrader-venv/.done: constraints.txt | $(PY)
	@echo "Installing nbgrader (minutes, once)"
	@$(PYTHON) -m venv build/nbgrader-venv
	@build/nbgrader-venv/bin/pip --disable-pip-version-check -qq install -c constraints.txt nbgrader
	@touch $@

# The book's tools stand apart: they want other versions of what the notebooks use. Node comes with them, for npm.
$(BOOK)/.stamp: pyproject.toml constraints.txt book/package-lock.json | $(PY)
	@echo "Installing what the book and the slides need (minutes, once)"
	@$(PYTHON) -m venv $(BOOK)
	@$(BOOK)/bin/python -m pip --disable-pip-version-check -qq install -c constraints.txt $(call extra,book)
	@cp book/package.json book/package-lock.json $(BOOK)/
	@$(BOOK)/bin/npm ci --prefix $(BOOK) --no-audit --no-fund --loglevel=error
	@touch $@

$(BROWSER)/.stamp: pyproject.toml constraints.txt | $(PY)
	@$(PIP) install --no-compile -c constraints.txt --upgrade --target $(BROWSER) $(call extra,browser)
	@touch $@
