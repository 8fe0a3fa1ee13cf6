# make demo     draw eight pictures with the model that ships with the repository
# make check    ruff, mypy and the tests that start nothing, in a minute or two
# make test     ruff, mypy and the test suite
# make install  create .venv from requirements.lock
# make audit    look up known vulnerabilities of the locked packages
# make lock     write requirements.lock anew after a change of requirements.txt
# The first three create .venv from requirements.lock first, once.

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.requirements-installed

.PHONY: help install demo lint check test audit lock clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is another: try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "installing into $(VENV): a few minutes and 5 GB, once"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

demo: $(READY)
	$(VENV)/bin/python autoregressive/serve/sample_c2i.py --gpt-model GPT-demo --captions --output demo.png

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

check: lint
	$(VENV)/bin/python -m pytest -q -m "not gpu and not soak and not timing and not slow" -n 2 --dist worksteal

test: lint
	$(VENV)/bin/python -m pytest -m "not gpu and not soak and not timing" -n 2 --dist worksteal
# Bounds in seconds hold on a quiet machine: what fails (status 1) is tried once more, and must pass then.
	$(VENV)/bin/python -m pytest -m "timing and not soak" || \
	  { test $$? -eq 1 && $(VENV)/bin/python -m pytest -m "timing and not soak" --last-failed; }

audit:
	$(PYTHON) .ci/audit.py

lock:
	uv pip compile --universal --generate-hashes --python-version 3.11 --no-annotate --no-header --quiet \
	  --no-emit-package llamagen-serve requirements.txt -o requirements.lock

clean:
	rm -rf $(VENV) .audit build *.egg-info demo.png sample_c2i*.png
