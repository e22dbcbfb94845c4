"""What can be said of an op by its schemas, where its arguments' metadata are not known.

A graph of ``torch.fx.symbolic_trace`` tells nothing of its inputs, and an op on them cannot be
observed. What stands between two accesses of a parametrized tensor is then judged by declaration:
an op of which no overload declares a write, neither by its schema nor by its arguments' names,
writes nothing.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

from torch.fx import GraphModule, Node

from fxparam._torch.fx import is_torch
from fxparam._torch.names import (
    OpOverload,
    OpOverloadPacket,
    builtin_name,
    is_composite,
    qualified_name,
    schemas_of,
)
from fxparam.graph.analysis.nodes import attribute_of
from fxparam.graph.analysis.op_effects import POINT_TO_POINT, RETURNS_ITS_ARGUMENT

__all__ = ["is_confined", "may_alias", "writes_nothing"]

# Composed of other ops, of which the last allocates whatever the arguments are.
_ALLOCATES = {
    "aten::bilinear",
    "aten::conv1d",
    "aten::conv2d",
    "aten::conv3d",
    "aten::conv_transpose1d",
    "aten::conv_transpose2d",
    "aten::conv_transpose3d",
    "aten::gru_cell",
    "aten::linear",
    "aten::lstm_cell",
    "aten::matmul",
    "aten::rnn_relu_cell",
    "aten::rnn_tanh_cell",
}


def writes_nothing(node: Node) -> bool:
    """Check whether every overload the call may reach declares that it writes to no argument."""
    if "out" in node.kwargs:
        return False
    if node.target in (getattr, operator.getitem):
        return True
    return all(map(_is_pure, _schemas(node))) and bool(_schemas(node))


def may_alias(node: Node) -> bool:
    """Check whether the value may live in the memory of an argument.

    An op that is composed of others may return its argument and declare nothing of it, as dropout
    does.
    """
    if node.target in (getattr, operator.getitem):
        return True
    schemas = _schemas(node)
    views = any(r.alias_info is not None for s in schemas for r in s.returns)
    views = views or any(s.name in RETURNS_ITS_ARGUMENT for s in schemas)
    composite = any(s.name not in _ALLOCATES and is_composite(s) for s in schemas)
    return not schemas or views or composite


def is_confined(gm: GraphModule, node: Node) -> bool:
    """Check whether a call of a module can write to its arguments and its own tensors alone.

    So it is for torch's own modules, as long as nobody has hung a hook on them.
    """
    module: Any = attribute_of(gm, node)
    return all(
        type(part).__module__.startswith("torch.nn.modules.")
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks)
        for part in module.modules()
    )


def _schemas(node: Node) -> list[Any]:
    """Return the schemas of every overload that may run, ``out=`` ones left out."""
    if not is_torch(node):
        return []
    name = _name(node)
    if name is None:
        return []
    found = schemas_of(name)
    return [s for s in found if not any(a.is_out for a in s.arguments)]


def _name(node: Node) -> str | None:
    target: Any = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return qualified_name(target)
    if node.op == "call_method":
        return f"aten::{target}"
    spelled = getattr(target, "__name__", "")
    if inspect.isbuiltin(target) and getattr(operator, spelled, None) is target:
        return f"aten::{spelled.strip('_')}"
    return builtin_name(target)


def _is_pure(schema: Any) -> bool:
    namespace = schema.name.partition("::")[0]
    declared = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    running = any(a.name.startswith("running_") for a in schema.arguments)
    return not (declared or running or namespace == "c10d" or schema.name in POINT_TO_POINT)
