# The same four words everywhere: make serve, make test, make check, make bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*/pyproject.toml)
DIST ?= dist

.PHONY: setup serve test check format bench fuzz fuzz-api soak docs dist clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt $(PLUGINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llorch needs Python 3.11 or newer, $$($(PYTHON) --version) is $(PYTHON): make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]' \
	  $(foreach plugin,$(PLUGINS),-e '$(dir $(plugin))[test]')
	touch $@

serve: setup  ## the demo model, or make serve MODEL=path/to/model.gguf [ARGS="--provider numpy-cpu --port 8080"]
	$(BIN)/llorch serve $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: setup  ## every installed provider; one of them: make test ARGS="--provider numpy-cpu -k matmul"
	$(BIN)/pytest --provider all $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## make bench MODEL=path/to/model.gguf [ARGS="--provider numpy-cpu -p 512 -n 128"]
	$(BIN)/llorch bench $(if $(MODEL),--model $(MODEL)) $(ARGS)

fuzz: setup  ## atheris over whatever a model file may hold, for a minute: make fuzz [ARGS="--seconds 600"]
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz.run $(ARGS)

soak: setup  ## ten minutes of mixed load; shorter: make soak SECONDS=60
	$(BIN)/python -m tests.server.soak --seconds $(or $(SECONDS),600)

fuzz-api: setup  ## 10,000 cases of every route's description in /docs/openapi.json; fewer: make fuzz-api CASES=500
	$(BIN)/python -m tests.server.fuzz_api --cases $(or $(CASES),10000)

docs: setup  ## the documentation, into .cache/site
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

dist: setup  ## wheels of llorch and of every plugin, into dist/; elsewhere: make dist DIST=folder
	rm -f $(DIST)/llorch*.whl
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(DIST) . $(dir $(PLUGINS))

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache $(DIST) build
