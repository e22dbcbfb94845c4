# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each builds its own virtual environment when that is missing or older than what it is made from.

PYTHON ?= python3.11
TORCH ?=
VENV := .venv$(if $(TORCH),-torch$(TORCH))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
N ?= 1000
# Processes that run the tests. A test keeps one core busy: torch's threads only get in each other's way.
WORKERS ?= 2

.PHONY: demo test test-newest lint distributed triton bench fuzz interop docs page pages clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,dev,triton,viz]'
else
	$(BIN)/python -m pip install -q torch==$(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e '.[demo,dev,viz]'
endif
	touch $@

demo: $(STAMP)
	$(BIN)/python -m fxparam demo $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

test-newest:
	$(MAKE) test TORCH=$(shell sed -n 's/^torch==//p' constraints-newest.txt)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

distributed: $(STAMP)
	FXPARAM_RANKS=4 $(BIN)/python -m pytest -q tests/distributed $(ARGS)

triton: $(STAMP)
	FXPARAM_TRITON=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/triton $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz -n $(N) $(ARGS)

# ExecuTorch and packages of models are large, hence have an environment of their own, with the same
# torch.
.venv-interop/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install -q -c constraints.txt -e '.[dev]' \
		executorch==1.5.1 transformers==5.24.0 orthogonium==0.0.4
	touch $@

interop: .venv-interop/.installed
	.venv-interop/bin/python -m pytest -q tests/interop $(ARGS)

# The site is made from the sources alone. What makes it is what the extra `docs` names, without the
# package, which would bring torch.
.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

# Every warning is an error (mkdocs.yml). To read it: python3 -m http.server -d site
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)

# The recorded pages of docs/explain.md.
pages: $(STAMP)
	for name in vocoder transformer rnn; do \
		$(BIN)/python -W ignore -m fxparam explain docs.tools.models:$$name --html docs/pages/$$name.html || exit 1; \
	done

# The layout library of the pages that `explain` writes, from the npm registry to the sources.
PAGE := fxparam/explaining/web
page:
	cd $(PAGE) && npm install --no-package-lock --no-audit --no-fund
	sed '/sourceMappingURL/d' $(PAGE)/node_modules/@dagrejs/dagre/dist/dagre.min.js > $(PAGE)/dagre.min.js
	cp $(PAGE)/node_modules/@dagrejs/dagre/dist/dagre.min.js.LEGAL.txt $(PAGE)/dagre.LICENSE.txt
	rm -r $(PAGE)/node_modules

clean:
	rm -rf .venv .venv-torch* .venv-interop .venv-docs site .pytest_cache .mypy_cache .ruff_cache
