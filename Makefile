# The two commands of the README are `make demo` and `make test`; both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo serve test lint typecheck proto check-proto bench clean

demo: $(STAMP)
	$(BIN)/colm demo

serve: $(STAMP)
	$(BIN)/colm serve cluster_configs/local.yaml

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/mypy -p colm_serve
	$(BIN)/mypy benchmarks tests

PROTOS := $(sort $(wildcard proto/colm/v1/*.proto))
GENERATE = $(BIN)/python -m grpc_tools.protoc -Icolm_serve/proto=proto

proto: $(STAMP)
	$(GENERATE) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS:proto/%=colm_serve/proto/%)

# A test compares the committed stubs with freshly generated ones: tests/test_generated_code.py.
test: lint typecheck
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --no-loadscope-reorder

bench: $(STAMP)
	$(BIN)/python benchmarks/prefill_throughput.py
	$(BIN)/python benchmarks/prefill_against_transformers.py
	$(BIN)/python benchmarks/prefill_memory.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/speculation.py
	$(BIN)/python benchmarks/sparse_prefill.py
	$(BIN)/python benchmarks/kv_codecs.py
	$(BIN)/python benchmarks/kv_transfer.py
	$(BIN)/python benchmarks/ttft.py
	$(BIN)/python benchmarks/router.py
	$(BIN)/python benchmarks/neighbours.py
	$(BIN)/python benchmarks/simulator.py
	$(BIN)/python benchmarks/goodput.py
	$(BIN)/python benchmarks/chain_linear.py
	$(BIN)/python benchmarks/chain_settings.py
	$(BIN)/python benchmarks/chain_growth.py
	$(BIN)/python benchmarks/update_readme.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache runs
