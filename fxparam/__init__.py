"""Parametrized tensors for PyTorch, evaluated once."""

from fxparam.compiling.backend import Backend, backend
from fxparam.compiling.entry import compile
from fxparam.eager.adopt import adopt
from fxparam.eager.init import init_
from fxparam.eager.parametrization_list import ParametrizationList
from fxparam.eager.register import (
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
    transfer_parametrizations_and_params,
    type_before_parametrizations,
)
from fxparam.eager.state_dicts import load_plain_state_dict, plain_state_dict
from fxparam.explaining.explain import explain
from fxparam.explaining.explanation import Explanation
from fxparam.exporting.export import export
from fxparam.exporting.fold import fold
from fxparam.graph import HoistResult, Report, Rule
from fxparam.scopes.disabled import disabled
from fxparam.scopes.frozen import frozen, invalidate
from fxparam.scopes.region import cached
from fxparam.scopes.step import accumulate
from fxparam.tracing.hoist import hoist
from fxparam.tracing.split import split
from fxparam.tracing.trace import symbolic_trace
from fxparam.tracing.tracer import Tracer

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Explanation",
    "HoistResult",
    "ParametrizationList",
    "Report",
    "Rule",
    "Tracer",
    "accumulate",
    "adopt",
    "backend",
    "cached",
    "compile",
    "disabled",
    "explain",
    "export",
    "fold",
    "frozen",
    "hoist",
    "init_",
    "invalidate",
    "is_parametrized",
    "load_plain_state_dict",
    "plain_state_dict",
    "register_parametrization",
    "remove_parametrizations",
    "split",
    "symbolic_trace",
    "transfer_parametrizations_and_params",
    "type_before_parametrizations",
]
