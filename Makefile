# One command each: `make demo` shows Folkmoot at work, `make test` runs every test. Both install what is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRA ?= cpu
# Quick tests wait more than they compute. The slow ones start clusters, and have the cores for themselves.
WORKERS ?= 3
UV_VERSION := 0.13.9
STAMP := $(VENV)/.installed-$(EXTRA)

# A CPU build of torch is taken from PIP_FIND_LINKS where that is set, else from PyTorch's own index.
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
else ifeq ($(EXTRA),cpu)
export UV_TORCH_BACKEND := cpu
endif

.PHONY: help install demo test quick-test check format bench proto constraints clean

help:            ## show these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## make .venv with everything (EXTRA=cpu or gpu)

$(STAMP): pyproject.toml constraints.txt folkmoot/experts/hop.c folkmoot/experts/keeper.c $(wildcard folkmoot/experts/quantised*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt -e '.[$(EXTRA),dev]'
	@touch $@

demo: install    ## ask a real model three questions, kill one of its expert actors, see the same answer
	$(BIN)/folkmoot demo

test: install    ## every test; half an hour on two cores, more on slow ones
	$(BIN)/python -m pytest -m 'not slow' -n $(WORKERS)
	$(BIN)/python -m pytest -m slow

quick-test: install  ## the tests that do not load a model
	$(BIN)/python -m pytest -m 'not slow' -n $(WORKERS)

check: install   ## lint, format, types, import walls
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install   ## every benchmark, one after the other, figures into bench/
	mkdir -p bench
	for name in exactness throughput hop gateway failover chaos batch lanes autoscale nodes fuzz observe cost balance speed idle; do \
	  $(BIN)/python -m benchmarks.$$name --json bench/$$name.json || exit 1; done

proto: install   ## regenerate the protobuf code
	$(BIN)/python -m folkmoot.gateway.generate

constraints: install  ## write down the versions that are installed now
	(head -1 constraints.txt; $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable \
	  | sed 's/+cpu//' | grep -v -e '^uv==' -e '^folkmoot') > constraints.new && mv constraints.new constraints.txt

clean:           ## remove what was made here
	rm -rf $(VENV) build bench *.egg-info folkmoot/experts/*.so
