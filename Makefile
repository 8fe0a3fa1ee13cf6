# make demo   draw eight pictures with the model that ships with the repository
# make test   ruff, mypy and the test suite
# Both create .venv and install requirements.txt first, once.

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.requirements-installed

.PHONY: help install demo test clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(READY)

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is another: try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(READY)

demo: $(READY)
	$(VENV)/bin/python autoregressive/serve/sample_c2i.py --gpt-model GPT-demo --captions --output demo.png

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -m "not gpu and not soak and not timing" -n 2 --dist worksteal
	$(VENV)/bin/python -m pytest -m "timing and not soak"

clean:
	rm -rf $(VENV) build *.egg-info demo.png sample_c2i*.png
