"""Parametrized tensors for PyTorch, evaluated once."""

from fxparam.backend import Backend, backend
from fxparam.compile import compile
from fxparam.export import export, fold
from fxparam.graph import HoistResult, Report, Rule
from fxparam.hoisting import hoist
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
from fxparam.splitting import split
from fxparam.tracing import Tracer, symbolic_trace

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "HoistResult",
    "ParametrizationList",
    "Report",
    "Rule",
    "Tracer",
    "adopt",
    "backend",
    "cached",
    "compile",
    "export",
    "fold",
    "hoist",
    "is_parametrized",
    "register_parametrization",
    "remove_parametrizations",
    "split",
    "symbolic_trace",
    "transfer_parametrizations_and_params",
    "type_before_parametrizations",
]
