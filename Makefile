# What a person types here. Everything installs into .venv; delete that folder to start over.
#
#   TORCH_INDEX=URL   another wheel index, for torch only (a CUDA or CPU build)
#   PYTHON=...        the interpreter that makes .venv; by default the newest found from 3.11 up

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := PYTHONSAFEPATH=1 $(BIN)/python -m pytest -q
PROMPT := a red circle moving right on a navy background
PEERS := sageattention==1.0.6 fastvae==0.1.0 diffusers==0.42.1
TORCH_INDEX ?=
PYTHON ?=

.PHONY: help demo test test-slow lint format bench engines gpu peers wheel clean

help:            ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed                  ## one prompt becomes ./demo.mp4, with the embedded model
	$(BIN)/wanrt generate "$(PROMPT)" -o demo.mp4 -y

test: $(VENV)/.installed-dev              ## the tests, a few minutes on two cores
	$(PYTEST) -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/.installed-dev         ## the heavy proofs: true-shaped checkpoints
	$(PYTEST) -m slow

lint: $(VENV)/.installed-dev              ## ruff, check and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev            ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev             ## the VAE's decoder beside that of diffusers
	$(BIN)/wanrt bench vae --device cpu --peer diffusers

engines: $(VENV)/.installed-dev           ## TensorRT-RTX engines, built without a GPU: dist/engines/
	$(BIN)/wanrt bench engines --out dist/engines

gpu: $(VENV)/.installed-dev               ## compile, test and time the kernels on this GPU
	PYTHONPATH=.peers $(BIN)/wanrt bench gpu

peers: $(VENV)/.installed-dev             ## what `make gpu` measures beside, into .peers/
	$(PIP) install --no-deps --upgrade --target .peers $(PEERS)

wheel: $(VENV)/.installed                 ## dist/wanrt-*.whl
	rm -rf build
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:           ## what the targets above made, but .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo.mp4
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e ".[test,lint]"
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml setup.py constraints.txt
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.made:
	@for python in $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3); do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV) && touch $@; exit; \
	  fi; \
	done; \
	echo "wanrt needs Python 3.11 or newer with its venv module. Install it with:" >&2; \
	if command -v apt-get >/dev/null; then \
	  if python3 -c 'import sys; sys.exit(sys.version_info >= (3, 11))' 2>/dev/null; \
	  then echo "  sudo apt install python3.11-venv"; else echo "  sudo apt install python3-venv"; fi; \
	elif command -v dnf >/dev/null; then echo "  sudo dnf install python3.12"; \
	elif command -v brew >/dev/null; then echo "  brew install python"; \
	else echo "  your system's package manager, or python.org"; fi >&2; \
	exit 1
