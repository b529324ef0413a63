"""Compiles what runs in compiled loops before it is needed."""

from __future__ import annotations

import numpy as np
import torch

from coe_dist.coe.pwlu import PWLU, realign
from coe_dist.coe.transport import balanced_assignment, balanced_assignment_sparse


def warm_up() -> None:
    """Compiles everything of the transportation solver, or loads it from numba's cache on disk (our own rule).

    The first call on a machine compiles for several seconds, in which a process answers nobody. Small problems that
    together take every path (large enough for a start from a quarter of the rows, with ties, and far from balanced) in
    all kinds of arguments that the training modules use: dense and sparse, float32 and float64.
    """
    samples, experts = 1024, 4
    ids_N = np.arange(samples)
    scores_NE = np.random.default_rng(0).integers(0, 3, (samples, experts)) + 2.0 * (np.arange(experts) == 0)
    edges_Nk = np.stack([ids_N % experts, (ids_N + 1) % experts], axis=1)
    for dtype in (np.float32, np.float64):
        balanced_assignment(scores_NE.astype(dtype), ids_N)
        scores_Nk = np.take_along_axis(scores_NE, edges_Nk, axis=1).astype(dtype)
        balanced_assignment_sparse(scores_Nk, edges_Nk, experts, ids_N, feasible_N=edges_Nk[:, 0])


def warm_up_pwlu() -> None:
    """Likewise for piecewise linear units that are learned on the CPU: an input for one thread, and one for two."""
    unit = PWLU(2)
    realign(unit)
    threads = torch.get_num_threads()
    try:
        for count, side in ((1, 1), (2, 512)):
            torch.set_num_threads(count)
            unit(torch.zeros(2, 2, side, side, requires_grad=True)).sum().backward()
    finally:
        torch.set_num_threads(threads)
