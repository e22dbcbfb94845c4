"""Parametrized tensors for PyTorch, evaluated once."""

from fxparam.backend import Backend, backend
from fxparam.compile import compile
from fxparam.graph import HoistResult, Report, Rule, hoist
from fxparam.parametrize import (
    ParametrizationList,
    adopt,
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
    transfer_parametrizations_and_params,
    type_before_parametrizations,
)
from fxparam.scopes import cached

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "HoistResult",
    "ParametrizationList",
    "Report",
    "Rule",
    "adopt",
    "backend",
    "cached",
    "compile",
    "hoist",
    "is_parametrized",
    "register_parametrization",
    "remove_parametrizations",
    "transfer_parametrizations_and_params",
    "type_before_parametrizations",
]
