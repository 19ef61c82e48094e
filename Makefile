# The two commands a newcomer needs are `make demo` and `make test`; the rest is for developers.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help install demo test lint format bench clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(READY)  ## virtual environment with the project and its tested versions

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev,timm]' -c constraints.txt
	@touch $@

demo: $(READY) data/shapes/annotations/instances_val.json  ## train, evaluate and draw on generated shapes
	$(PY) train.py
	$(PY) predict.py checkpoint=runs/quickstart/best.pt 'images=data/shapes/val/0000[0-7]*' output=runs/quickstart/predictions

data/shapes/annotations/instances_val.json: data/make_shapes.py | $(READY)
	$(PY) data/make_shapes.py --out data/shapes

test: $(READY)  ## the whole test suite
	$(PY) -m pytest

lint: $(READY)  ## style and correctness checks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)  ## apply the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(READY)  ## every benchmark that fits in ten minutes on this machine
	$(PY) benchmarks/roi_ops.py

clean:  ## remove the environment, generated data and runs
	rm -rf $(VENV) data/shapes runs multirun
