# make demo       sets this machine up, then trains the demonstration (about five minutes on two cores)
# make rehearsal  the same set-up, then rehearses the training of the large ImageNet configuration on made images
# make test       sets this machine up, then runs the tests
# make coverage   which lines of the method and of its distribution the tests of these two run, at least 90%
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
COE = .venv/bin/coe-dist
PYTEST = .venv/bin/python -m pytest

TWO_FILES = -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo rehearsal test test-full coverage docs-check test-gpu test-multi-gpu lint setup setup-dev

demo: setup
	$(COE) demo configs/fashion_mnist.yaml

rehearsal: setup
	$(COE) rehearsal configs/imagenet_coe_large.yaml

test: setup-dev lint
	$(PYTEST) $(TWO_FILES)

test-full: setup-dev
	$(PYTEST) $(TWO_FILES) --full

# also in the processes that the tests start
coverage: setup-dev
	$(PYTEST) $(TWO_FILES) tests/coe tests/parallel --cov

# the commands of README.md and docs/
docs-check: setup-dev
	$(PYTEST) --docs tests/docs

# one GPU; needs only a python with torch, numpy and numba
test-gpu:
	$(PYTHON) tests/gpu/check.py

# one rank per GPU on NCCL; not yet run by anybody
test-multi-gpu:
	$(PYTHON) tests/gpu/check.py --multi

lint: setup-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

setup:
	@cluster/setup.sh

setup-dev:
	@cluster/setup.sh dev
