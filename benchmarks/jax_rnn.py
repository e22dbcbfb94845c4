"""The orthogonal recurrent network in JAX, as written and hoisted by hand; JAX is an extra.

The sizes are those of the case ``orthogonal-rnn``. JAX shares no process with torch's contestants:
the threads of the two get in each other's way.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.cases.case import Size
from benchmarks.process import call

__all__ = ["measure", "rows"]


def measure(by_hand: bool, scan: bool, rounds: int = 20) -> dict[str, Any]:
    """Return the median seconds of a step of training, those of the first one, and the loss."""
    import jax
    import jax.numpy as jnp
    from jax.scipy.linalg import expm

    size = Size()
    keys = iter(jax.random.split(jax.random.key(0), 9))
    square = (size.width, size.width)
    x = jax.random.normal(next(keys), (size.steps, size.batch, size.width))
    given = {
        "original": jax.random.normal(next(keys), square) * 0.1,
        "read": jax.random.normal(next(keys), square) * size.width**-0.5,
        "bias": jnp.zeros(size.width),
    }

    def weight(given: Any) -> Any:
        a = jnp.tril(given["original"], -1)
        return expm(a - a.T)

    def loss(given: Any, x: Any) -> Any:
        once = weight(given) if by_hand else None

        def body(h: Any, row: Any) -> Any:
            h = jnp.tanh(row + h @ (weight(given) if once is None else once).T)
            return h, h

        rows, h = x @ given["read"].T + given["bias"], jnp.zeros((size.batch, size.width))
        if scan:
            return (jax.lax.scan(body, h, rows)[1] ** 2).mean()
        for row in rows:
            h, _ = body(h, row)
        return (h**2).mean()

    step, seconds = jax.jit(jax.value_and_grad(loss)), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        value, _ = jax.block_until_ready(step(given, x))
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "step": statistics.median(seconds[1:]), "loss": float(value)}


def rows(limit: float) -> Iterator[dict[str, Any]]:
    """Yield nothing where JAX is not installed."""
    for scan in (False, True) if importlib.util.find_spec("jax") else ():
        for by_hand in (False, True):
            way = {"scan": scan, "by_hand": by_hand}
            yield way | call("benchmarks.jax_rnn:measure", limit, **way)
