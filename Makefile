# Everything runs in .venv, which deploy/setup_venv.sh makes and keeps in step with pyproject.toml and constraints.txt.

PORT ?= 8000
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run test lint bench gpu-check loadtest clean run-venv test-venv

help:
	@echo 'make run       optimize two real models and serve them on port $(PORT) (another one: make run PORT=8001)'
	@echo 'make test      make lint, then the whole test suite (some of it: make test TESTS=tests/server)'
	@echo 'make lint      ruff, mypy --strict and the layers'
	@echo 'make bench     raw onnxruntime, this server and a plain FastAPI handler in one interleaved run (options: BENCH=)'
	@echo 'make gpu-check check and measure the GPU of this machine (options: GPU=; without one: GPU=--rehearse)'
	@echo 'make loadtest  Locust against a server that it starts; results in loadtests/results (options: LOADTEST=)'
	@echo 'make clean     remove .venv, caches, models and results'

run: run-venv
	@$(BIN)/python -m deploy.quickstart --port $(PORT)

test: lint
	@$(BIN)/python -m pytest $(TESTS)

lint: test-venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: test-venv
	@$(BIN)/python -m deploy.quickstart --no-serve
	@$(BIN)/python -m benchmarks $(BENCH)

gpu-check:
	@$(or $(wildcard $(BIN)/python),python3) -m benchmarks.gpu $(GPU)

loadtest: test-venv
	@$(BIN)/python -m deploy.quickstart --no-serve
	@$(BIN)/python -m loadtests.run $(LOADTEST)

clean:
	rm -rf .venv .cache models loadtests/results benchmarks/results
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info

run-venv:
	@deploy/setup_venv.sh run

test-venv:
	@deploy/setup_venv.sh test
