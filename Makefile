# `make demo` and `make test` create the environment and the data that they need. If Python already has torch (such as
# a CUDA build), that torch is used; otherwise the pinned version is installed.
PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
export TOKENIZERS_PARALLELISM := false

.PHONY: setup pins demo test test-all lint bench data

setup: $(VENV)/.ready

# `--no-deps`: the list has all packages except torch, and azula, which the tests compare with, works without torchvision.
$(VENV)/.ready: pyproject.toml constraints.txt
	if $(PYTHON) -c "import torch" 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV); \
	fi
	grep -v "^torch==" constraints.txt > $(VENV)/constraints.txt
	$(PIP) --require-hashes --no-deps -r $(VENV)/constraints.txt
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

# Writes constraints.txt again with hashes of all files of its versions.
pins:
	set -e; new=$$(mktemp -d); sed -n '/^#/p; /^torch==/p' constraints.txt > $$new/head; \
	sed -n '/^torch==/d; s/^\([A-Za-z].*==[^ ]*\).*/\1/p' constraints.txt > $$new/pins.in; \
	uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate $$new/pins.in > $$new/pins; \
	cat $$new/head $$new/pins > constraints.txt; rm -r $$new

data: data/scenes/.ready data/digits/.ready

data/digits/.ready: | setup
	$(BIN)/python -m data_prep.digits --out data/digits
	$(BIN)/python -m data_prep.tokenizer --out data/digits/tokenizer.json "data/digits/train-{000000..000001}.tar"
	touch $@

data/scenes/.ready: | setup
	$(BIN)/python -m data_prep.scenes --out data/scenes
	$(BIN)/python -m data_prep.tokenizer --out data/scenes/tokenizer.json data/scenes/train-000000.tar
	touch $@

demo: setup data
	$(BIN)/mmgen train --config configs/scenes.yaml
	$(BIN)/mmgen eval --config configs/scenes.yaml
	BIN=$(BIN) bash launch/show.sh configs/scenes.yaml "a red 7 top left and a blue 3 bottom right"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --durations=10

test-all: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup data
	$(BIN)/mmgen bench step --config configs/scenes.yaml
