# make demo     draw eight pictures with the model that ships with the repository
# make check    ruff, mypy and the tests that start nothing, in a minute and a half
# make test     ruff, mypy and the test suite, in a quarter of an hour
# make install  create .venv from requirements.lock
# make audit    look up known vulnerabilities of the locked packages
# make lock     write requirements.lock anew after a change of requirements.txt
# The first three create .venv from requirements.lock first, once.

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.requirements-installed
PIP    := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
TESTS   = $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.PHONY: help install demo lint check quick test audit lock clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is another:" \
	    "try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "installing into $(VENV): a few minutes and 5 GB, once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $(READY)

demo: $(READY)
	$(VENV)/bin/python autoregressive/serve/sample_c2i.py --gpt-model GPT-demo --captions --output demo.png

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# mypy has one thread for much of its time, so that the tests run beside it.
check: $(READY)
	@$(MAKE) --no-print-directory --jobs 2 lint quick

quick: $(READY)
	$(TESTS) -q -m "not gpu and not soak and not timing and not slow"

test: lint
	$(TESTS) -m "not gpu and not soak and not timing"
# Tests with bounds in seconds wait for most of their time, so that two run at once. The bounds hold
# on a quiet machine: what fails (status 1) is tried once more, one at a time, and must pass then.
	$(TESTS) --dist loadfile -m "timing and not soak" || \
	  { test $$? -eq 1 && $(VENV)/bin/python -m pytest -m "timing and not soak" --last-failed; }

audit:
	$(PYTHON) .ci/audit.py

lock:
	uv pip compile --universal --generate-hashes --python-version 3.11 --no-annotate --no-header \
	  --quiet --no-emit-package llamagen-serve requirements.txt -o requirements.lock

clean:
	rm -rf $(VENV) .audit build *.egg-info demo.png sample_c2i*.png
