"""Parametrized tensors: ``module.<name>`` computed from original tensors at each access.

The names and contracts are those of :mod:`torch.nn.utils.parametrize`, and modules parametrized
here and there go through each other's functions. Beyond it: a refused call changes nothing, modules
pickle, equal modules share one class, and :func:`cached` never returns a stale value.
"""

from fxparam.eager.adopt import adopt
from fxparam.eager.parametrization_list import ParametrizationList
from fxparam.eager.register import (
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
    transfer_parametrizations_and_params,
    type_before_parametrizations,
)
from fxparam.scopes.region import cached

__all__ = [
    "ParametrizationList",
    "adopt",
    "cached",
    "is_parametrized",
    "register_parametrization",
    "remove_parametrizations",
    "transfer_parametrizations_and_params",
    "type_before_parametrizations",
]
