# Everything installs what it needs into .venv first, from the lock file, and does nothing when nothing changed.

PYTHON ?= python3
BIN := .venv/bin
UV := 0.13.8
ARGS ?=

.PHONY: up test check static bench lock clean

# The whole platform in the foreground; ARGS="--data DIR" for your own months, ARGS=--once to stop after the main job.
up: .venv/installed
	@$(BIN)/streamflow up $(ARGS)

test: .venv/installed
	@$(BIN)/pytest $(ARGS)

check: static test

static: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/dagster definitions validate -w workspace.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	$(BIN)/hadolint docker/Dockerfile

# All figures as one JSON, in 40 minutes; ARGS="serving soak" for some, ARGS=--help for their names.
bench: .venv/installed
	@$(BIN)/python -m benchmarks $(ARGS)

# After a change of the dependencies in pyproject.toml.
lock: .venv/installed
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --custom-compile-command "make lock" \
		--output-file requirements.lock pyproject.toml

# uv installs in seconds what pip installs in minutes; where it cannot (a mirror that only pip is told of), pip does.
.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] < (3, 14) or sys.exit("StreamFlow needs Python 3.11 to 3.13, not " + sys.version.split()[0] + "; name one: make PYTHON=python3.12")'
	@echo "installing into .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -m compileall -q streamflow streamflow_dagster serving feature_repo
	@touch $@

# Removes what was installed and cached. The platform's state in var/ stays; delete that folder for a full reset.
clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './var/*' -prune -exec rm -rf {} +
