"""Intervals for what a report says."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def paired_bootstrap_ci95(
    before: Float[np.ndarray, " N"],
    after: Float[np.ndarray, " N"],
    seed: int,
    resamples: int = 10_000,
) -> tuple[float, float]:
    """95% percentile interval of mean(after - before), resampling the N pairs (scipy's bootstrap).

    Not its BCa intervals: those have no value where all pairs differ by the same amount.

    Args:
      before, after: scores of the same N >= 2 items, in the same order.
      seed: of the resampling; the same seed gives the same interval.

    Raises:
      ValueError: other shapes, or scores that are not finite.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.ndim != 1 or before.shape != after.shape or len(before) < 2:
        raise ValueError(
            f"before has shape {before.shape} and after {after.shape}; both must be [N], N >= 2"
        )
    difference = after - before
    if not np.isfinite(difference).all():
        raise ValueError("before or after has scores that are not finite; leave those pairs out")
    from scipy.stats import bootstrap  # half a second that only reports pay

    found = bootstrap(
        (difference,), np.mean, n_resamples=resamples, method="percentile",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
