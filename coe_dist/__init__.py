"""Distributed training of a Collaboration of Experts."""

import os

# numba reads this once, at its import; with its default layer two data loaders at once abort the process.
os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
