"""The orthogonal recurrent network in JAX, in a Python loop and in ``lax.scan``.

Written against torch's parameters under torch's names, so that outputs and gradients can be
compared: ``orthogonal`` keeps a base that it multiplies by the exponential of a skew matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["loop", "scan"]

_CELL = "cell.parametrizations.weight"


def _weight(parameters: dict[str, Any]) -> Any:
    import jax.numpy as jnp
    from jax.scipy.linalg import expm

    a = jnp.tril(parameters[f"{_CELL}.original"])
    return parameters[f"{_CELL}.0.base"] @ expm(a - a.T)


def _parts(parameters: dict[str, Any], inputs: Sequence[Any], by_hand: bool) -> tuple[Any, ...]:
    import jax.numpy as jnp

    rows = inputs[0] @ parameters["read.weight"].T + parameters["read.bias"]
    once = _weight(parameters) if by_hand else None

    def cell(h: Any, row: Any) -> Any:
        weight = _weight(parameters) if once is None else once
        return jnp.tanh(row + h @ weight.T)

    return rows, jnp.zeros_like(inputs[0][0]), cell


def loop(parameters: dict[str, Any], inputs: Sequence[Any], by_hand: bool) -> Any:
    """The last state."""
    rows, h, cell = _parts(parameters, inputs, by_hand)
    for row in rows:
        h = cell(h, row)
    return h


def scan(parameters: dict[str, Any], inputs: Sequence[Any], by_hand: bool) -> Any:
    """The states of all steps."""
    import jax

    def body(h: Any, row: Any) -> tuple[Any, Any]:
        h = cell(h, row)
        return h, h

    rows, h, cell = _parts(parameters, inputs, by_hand)
    return jax.lax.scan(body, h, rows)[1]
