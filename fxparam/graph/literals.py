"""Literals as keys: equal only when they are the same literal, type and sign included.

``1 == 1.0 == True`` and ``0.0 == -0.0`` in Python, and torch's own CSE passes merge them. A
graph that divides by ``0.0`` is not one that divides by ``-0.0``.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch

_PLAIN = (bool, int, str, bytes, type(None), type(...))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def literal_key(value: Any) -> Hashable:
    """A key for one literal; an object that is no literal is equal to itself alone."""
    if isinstance(value, float):
        return (float, value.hex())
    if isinstance(value, complex):
        return (complex, value.real.hex(), value.imag.hex())
    if isinstance(value, (*_PLAIN, *_TORCH)):
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(map(literal_key, value)))
    if isinstance(value, functools.partial):  # Dynamo makes a new one each time it meets it
        bound = tuple((k, literal_key(v)) for k, v in sorted(value.keywords.items()))
        return (functools.partial, literal_key(value.func), literal_key(value.args), bound)
    return ("object", id(value))
