"""The fastest of many runs on one thread, for single ops."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.benchmark import Timer

__all__ = ["fastest"]


def fastest(run: Callable[[], object], seconds: float = 0.3) -> float:
    """Return the milliseconds of one run."""
    timer = Timer("run()", globals={"run": run})  # one thread is torch's default there
    return 1e3 * min(timer.blocked_autorange(min_run_time=seconds).times)
