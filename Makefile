# The virtual environment is made by the first target that needs it, and brought up to
# date when pyproject.toml has changed.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint typecheck pytest ends venv clean

help:
	@echo "make demo       quantize a small model that sees, hears and reads"
	@echo "make test       linters, type checker and all tests"
	@echo "make lint       ruff"
	@echo "make typecheck  mypy"
	@echo "make pytest     the tests alone"
	@echo "make ends       the tests with the oldest and the newest declared releases"
	@echo "make venv       only make .venv ready"
	@echo "make clean      remove .venv and all that was built"
	@echo ""
	@echo "ARGS are handed on:           make demo ARGS='--variant plain'"
	@echo "                              make pytest ARGS='-k routing'"
	@echo "PYTHON makes .venv:           make venv PYTHON=python3.12"
	@echo "TORCH_INDEX_URL serves torch: make venv TORCH_INDEX_URL=https://..."

demo: venv
	@$(BIN)/python -m torchao_masquant demo $(ARGS)

# Every step runs: one run tells all that is wrong, and pytest's closing line is last.
test: venv
	@status=0; \
	for step in lint typecheck pytest; do \
	    $(MAKE) --no-print-directory $$step || status=1; \
	    if [ $$status = 1 ] && [ $$step = typecheck ]; then \
	        echo "'make lint' or 'make typecheck' failed, see above. The tests run all the same."; \
	    fi; \
	done; \
	exit $$status

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

typecheck: venv
	.ci/typecheck.sh

# One thread a worker: threads of workers on the same cores wait for each other.
# Not more than four workers: each loads torch. Work stealing: a few tests are long.
pytest: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# Environments of their own, in build/ends.
ends:
	PYTHON=$(PYTHON) .ci/ends.sh $(ARGS)

venv:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "There is no $(PYTHON) here: install Python 3.10 or newer, or name one," \
	        "as in 'make PYTHON=python3.12 demo'." >&2; \
	    exit 1; \
	}
	@$(PYTHON) .ci/setup_env.py

clean:
	rm -rf .venv build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
