"""Medians and quartiles, of figures and of their ratios within one round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["ratios", "spread"]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and quartiles; None of nothing."""
    if not values:
        return None
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratios(values: Sequence[float], limits: Sequence[float]) -> dict[str, float] | None:
    """Of each round's figure to the one of the program by hand in that round."""
    if len(values) != len(limits):
        return None
    return spread([v / limit for v, limit in zip(values, limits, strict=True)])
