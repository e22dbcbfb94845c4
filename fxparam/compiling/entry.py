"""``fxparam.compile``: ``torch.compile`` with this package's backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxparam.eager.describe import spelled

__all__ = ["compile"]


def compile(model: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """``torch.compile(model, backend="fxparam", **kwargs)``, also as a decorator.

    Args:
        model: a module or function; None to get a decorator.
        **kwargs: ``torch.compile``'s own, ``mode=``, ``options=``, ``dynamic=``, ``fullgraph=``
            among them.

    Raises:
        TypeError: ``model`` is not callable, or ``backend`` is given.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.compile.html

    >>> import torch
    >>> model = torch.nn.Linear(2, 2)
    >>> compiled = compile(model)  # compiled when first called
    >>> isinstance(compiled, torch.nn.Module)
    True
    """
    if "backend" in kwargs:
        raise TypeError(
            f"fxparam.compile sets backend itself, got backend={spelled(kwargs['backend'])}: use "
            "torch.compile(model, backend=fxparam.backend(inner=...)) to choose what runs inside"
        )
    if model is not None and not callable(model):
        raise TypeError(f"model must be a module or a function: got {type(model).__name__}")
    return torch.compile(model, backend="fxparam", **kwargs)
