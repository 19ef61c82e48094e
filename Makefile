# The two commands a newcomer needs are `make demo` and `make test`; the rest is for developers.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help install demo test test-slow test-oldest lint format docs bench wheels gpu-check clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(READY)  ## virtual environment with the project and its tested versions

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev,docs,timm,export,cluster,pictures,tracks]' -c constraints.txt
	-$(PY) -m pip install --quiet --disable-pip-version-check --no-deps trackers -c constraints.txt
	@touch $@

demo: $(READY) data/shapes/annotations/instances_val.json  ## train, evaluate and draw on generated shapes
	$(PY) train.py
	$(PY) predict.py checkpoint=runs/quickstart/best.pt 'images=data/shapes/val/0000[0-7]*' output=runs/quickstart/predictions

data/shapes/annotations/instances_val.json: detector/commands/make_shapes.py | $(READY)
	$(PY) -m detector shapes --out data/shapes

# What only tests need, so that `make demo` stays quick: trackers and searches, whose tests are skipped where this fails.
$(VENV)/.tracking: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[mlflow,optuna,wandb]' -c constraints.txt && touch $@ || true

# One thread for each of two processes: small tensors gain nothing from more, and processes run truly side by side.
test: $(READY) $(VENV)/.tracking  ## the test suite without its slow tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: $(READY) $(VENV)/.tracking  ## the slow tests: runs killed and resumed, several hosts, exports, installed packages
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m slow

test-oldest: $(OLDEST)/.ready  ## the test suite on the oldest supported PyTorch
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile

$(OLDEST)/.ready: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(torch|torchvision)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs,timm,export,cluster,pictures]' \
		-c $(OLDEST)/constraints.txt -c constraints-oldest.txt
	@touch $@

lint: $(READY)  ## style, correctness, types and spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/codespell $$(git ls-files)

format: $(READY)  ## apply the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(READY)  ## the documentation's site, into site/
	$(PY) -m mkdocs build --strict

bench: $(READY)  ## every benchmark that fits in ten minutes on this machine
	$(PY) benchmarks/roi_ops.py --methods align deformable --rois 1000 --repeats 3 --json benchmarks/results/roi_ops_cpu.json
	$(PY) benchmarks/train_step.py --repeats 3 --json benchmarks/results/train_step_cpu.json
	$(PY) benchmarks/inference.py --repeats 3 --json benchmarks/results/inference_cpu.json
	$(PY) benchmarks/evaluation.py --repeats 3 --json benchmarks/results/evaluation_cpu.json

# A machine with a GPU and PyTorch but no package index gets what is missing there as wheels.
MISSING := hydra-core omegaconf pycocotools albumentations albucore hotcoco msgspec stringzilla simsimd pydantic pydantic_core \
	annotated-types typing-inspection typing_extensions
wheels: constraints.txt  ## the packages that a bare PyTorch installation lacks, into wheels/
	rm -rf wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 -d wheels \
		$(foreach name,$(MISSING),$(shell grep -iE '^$(name)==' constraints.txt))
	$(PYTHON) -m pip wheel --quiet --no-deps -w wheels $$(grep '^antlr4' constraints.txt)

gpu-check:  ## tests and measurements that need a GPU, under ten minutes; python needs torch with CUDA
	$(PYTHON) benchmarks/gpu_check.py --wheels wheels $(if $(OUT),--output $(OUT))

clean:  ## remove the environment, generated data and runs
	rm -rf $(VENV) data/shapes runs multirun
