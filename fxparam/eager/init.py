"""Initialize a parametrized tensor by a function that writes in place.

nn.init.orthogonal_(layer.weight)               writes to a value that is computed anew
fxparam.init_(layer, "weight", nn.init.orthogonal_)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn import Module

from fxparam.eager.checks import check_modules
from fxparam.eager.classes import chain_of

__all__ = ["init_"]

M = TypeVar("M", bound=Module)


def init_(
    module: M, tensor_name: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> M:
    """Initialize ``module.<tensor_name>`` by a function that writes to a tensor in place.

    A parametrized tensor is assigned the result, through its right inverses. A plain one is written
    to.

    Args:
        module: the module.
        tensor_name: a tensor of ``module``, parametrized or not.
        function: such as ``torch.nn.init.orthogonal_``; called with a tensor of the shape, dtype
            and device of the value, then with ``args`` and ``kwargs``.

    Returns:
        ``module``.

    Raises:
        RuntimeError: if a parametrization has no ``right_inverse``. Nothing is changed then.

    Source: :mod:`torch.nn.init`, which writes in place.

    Example:
        >>> import torch
        >>> import fxparam
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))
        >>> _ = fxparam.adopt(layer)
        >>> _ = fxparam.init_(layer, "weight", torch.nn.init.eye_)
        >>> layer.weight.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    check_modules(module=module)
    if chain_of(module, tensor_name) is None:
        function(getattr(module, tensor_name), *args, **kwargs)
        return module
    with torch.no_grad():
        value = getattr(module, tensor_name).clone()
        function(value, *args, **kwargs)
        setattr(module, tensor_name, value)
    return module
