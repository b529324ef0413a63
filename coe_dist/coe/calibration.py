"""Calibration error: how far the probabilities a system states are from how often it is right.

Top-label calibration as in Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017:
images are put into bins by the probability of the class that was answered, and in each bin accuracy is held against
the mean of those probabilities.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coe_dist.coe.early_exit import columns

BINS = 15  # Guo et al. 2017


def ece(confidence_N: npt.ArrayLike, correct_N: npt.ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error, 0 to 1: the mean over images of |accuracy - mean confidence| of the image's bin.

    confidence_N: probability of the class answered, 0 to 1; correct_N: whether it is the true one. Bins have equal
    width: (0, 1/bins], (1/bins, 2/bins], ...; a confidence of 0 is in the first. Raises ValueError for no images,
    unequal lengths, confidences that are not numbers, and bins below 1.
    """
    if bins < 1:
        raise ValueError(f"bins: {bins} is not allowed; give a whole number of at least 1")
    confidences, correct = columns(confidence_N, correct_N, "correct_N")
    bin_N = np.clip(np.ceil(confidences * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(bin_N, weights=correct - confidences, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))
