# `make demo` and `make test` create the environment and the data that they need. If Python already has torch (such as
# a CUDA build), that torch is used; otherwise the pinned version is installed.
PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
SHELL := bash
export TOKENIZERS_PARALLELISM := false

.PHONY: setup pins demo test test-all lint bench data

setup: $(VENV)/.ready

# $(call install,NAME,TOTAL,ARGUMENTS): run pip and print, at least every ten seconds, packages and minutes to go.
# The minutes of the download follow from the packages so far; pip reports nothing while it installs.
define install
set -o pipefail; $(BIN)/pip install --disable-pip-version-check --progress-bar off $(3) | { \
n=0; total=$(2); last=-9; phase=downloading; \
while read -r -t 9 line || [ $$? -gt 128 ]; do \
  case $$line in Collecting*|Processing*) n=$$((n + 1));; Installing*) phase=installing; last=-9;; esac; \
  [ $$((SECONDS - last)) -ge 9 ] && [ $$n -gt 0 ] || continue; \
  last=$$SECONDS; left=; \
  if [ $$phase = installing ]; then left=", 1 to 2 min to go"; \
  elif [ -n "$$total" ]; then left=", $$((SECONDS * (total - n) / n / 60 + 1)) min to go"; fi; \
  echo "setup: $$phase $(1), $$n$${total:+ of $$total} files$$left"; \
done; }
endef

# `--no-deps`: the list has all packages except torch, and azula, which the tests compare with, works without torchvision.
$(VENV)/.ready: pyproject.toml constraints.txt
	if $(PYTHON) -c "import torch" 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  $(PYTHON) -m venv $(VENV); \
	fi
	grep -v "^torch==" constraints.txt > $(VENV)/constraints.txt
	@$(call install,packages,$$(grep -c == $(VENV)/constraints.txt),--require-hashes --no-deps -r $(VENV)/constraints.txt)
	@$(BIN)/python -c "import torch" 2>/dev/null || { $(call install,torch,,"$$(grep '^torch==' constraints.txt)"); }
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

# Writes constraints.txt again with hashes of all files of its versions.
pins:
	set -e; new=$$(mktemp -d); sed -n '/^#/p; /^torch==/p' constraints.txt > $$new/head; \
	sed -n '/^torch==/d; s/^\([A-Za-z].*==[^ ]*\).*/\1/p' constraints.txt > $$new/pins.in; \
	uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate $$new/pins.in > $$new/pins; \
	cat $$new/head $$new/pins > constraints.txt; rm -r $$new

data: data/scenes/.ready data/digits/.ready

data/digits/.ready: data_prep/digits.py | setup
	$(BIN)/python -m data_prep.digits --out data/digits
	$(BIN)/python -m data_prep.tokenizer --out data/digits/tokenizer.json "data/digits/train-{000000..000001}.tar"
	touch $@

data/scenes/.ready: data_prep/scenes.py data_prep/digits.py | setup
	$(BIN)/python -m data_prep.scenes --out data/scenes
	$(BIN)/python -m data_prep.tokenizer --out data/scenes/tokenizer.json data/scenes/train-000000.tar
	touch $@

# Every step prints its phase, a count and the minutes to go. The times are for two cores and nothing else running.
demo:
	@echo "[1/6] setup: install the packages into $(VENV), once, about 3 minutes"
	@$(MAKE) --no-print-directory setup
	@echo "[2/6] data: make shards of handwritten digits and a tokenizer, less than a minute"
	@$(MAKE) --no-print-directory data/digits/.ready
	@echo "[3/6] data: make shards of coloured scenes and a tokenizer, less than a minute"
	@$(MAKE) --no-print-directory data/scenes/.ready
	@echo "[4/6] train: one transformer on captions and scenes, about 8 minutes; Ctrl-C saves, and make demo continues"
	$(BIN)/mmgen train --config configs/scenes.yaml
	@echo "[5/6] eval: draw and caption held-out scenes and score them, about 2 minutes"
	$(BIN)/mmgen eval --config configs/scenes.yaml
	@echo "[6/6] demo: draw one caption and caption the picture, less than a minute"
	$(BIN)/mmgen demo --config configs/scenes.yaml

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
