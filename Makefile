# make demo   sets this machine up, then trains the demonstration (about ten minutes on two cores)
# make test   sets this machine up, then runs the tests
COE = .venv/bin/coe-dist
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest

.PHONY: demo test test-full lint setup setup-dev

demo: setup
	$(COE) demo configs/fashion_mnist.yaml

test: setup-dev lint
	$(PYTEST)

test-full: setup-dev
	$(PYTEST) --full

lint: setup-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

setup:
	@cluster/setup.sh

setup-dev:
	@cluster/setup.sh dev
