"""Symbolic tracing in which parametrizations are ordinary, named operations, evaluated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn import Module

from fxparam._torch.fx import unpickle_with
from fxparam.eager.describe import check_kind
from fxparam.eager.rollback import attributes_kept
from fxparam.graph import hoist
from fxparam.graph.passes.naming import label
from fxparam.graph.passes.prologue import lift
from fxparam.tracing.capture import capture
from fxparam.tracing.propagation import attribute
from fxparam.tracing.retrace import Retracer
from fxparam.tracing.traced_module import Blocks, TracedModule, skeleton
from fxparam.tracing.tracer import Tracer

__all__ = ["Tracer", "symbolic_trace"]


def symbolic_trace(
    root: Module | Callable[..., Any],
    concrete_args: dict[str, Any] | None = None,
    *,
    share: bool = True,
    example_inputs: Sequence[Any] | None = None,
) -> GraphModule:
    """Trace a model into a graph whose parametrizations are ordinary operations, in a prologue.

    The graph module has the model's own parameters and buffers, under the model's names: training
    one trains the other, and their state dicts have the same keys. Nodes of a parametrization
    carry ``meta["fxparam"]`` (which tensor, which step of its chain) and ``nn_module_stack``; the
    value is named after the tensor, ``cell_weight_hh``.

    Args:
        root: a module or function.
        concrete_args: as in :func:`torch.fx.symbolic_trace`.
        share: one evaluation of each parametrized tensor where that is right, by the same rules as
            in compiled code; False gives one for each access, as eager code has. Without example
            inputs it is shared only where what the operations in between do is known by their
            declarations.
        example_inputs: positional arguments of a call. With them the model is captured by Dynamo,
            which follows branches on ranks, dtypes and shapes; ranks and dtypes are then fixed, and
            sizes where the model looks at them.

    Raises:
        torch.fx.proxy.TraceError: the model cannot be traced without example inputs; the message
            names the module. Or it binds to a buffer what a graph cannot write to it.
        TypeError: ``root`` is neither a module nor a function, or ``example_inputs`` is no tuple or
            list.
        ValueError: both ``concrete_args`` and ``example_inputs`` are given.

    Source: :func:`torch.fx.symbolic_trace`.

    Example:
        >>> import torch
        >>> import fxparam
        >>> class Twice(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         linear = torch.nn.Linear(2, 2, bias=False)
        ...         self.cell = torch.nn.utils.parametrizations.weight_norm(linear)
        ...     def forward(self, x):
        ...         return torch.tanh(self.cell(torch.tanh(self.cell(x))))
        >>> [node.name for node in fxparam.symbolic_trace(Twice()).graph.nodes][3:]
        ['cell_weight', 'linear', 'tanh', 'linear_1', 'tanh_1', 'output']
    """
    if not callable(root):  # torch would name it by its repr, which of a model is long
        raise TypeError(
            "Modules and functions can be traced.\n"
            f"required: a torch.nn.Module or a function\nfound: {type(root).__name__}"
        )
    if example_inputs is not None and concrete_args is not None:
        raise ValueError(
            "concrete_args are for tracing without example inputs.\n"
            "required: one of concrete_args and example_inputs\nfound: both"
        )
    if example_inputs is not None:
        way_out = "Put the arguments of one call in a tuple: example_inputs=(x,)."
        check_kind("example_inputs", example_inputs, Sequence, way_out)
    gm = _traced(root, concrete_args) if example_inputs is None else _captured(root, example_inputs)
    if share:
        hoist(gm)
    label(gm)
    if share:
        prologue = lift(gm)
        if prologue:
            gm.graph.on_generate_code(lambda _: Blocks([node.name for node in prologue]))
    gm.graph.lint()
    gm.recompile()
    return gm


def _traced(root: Any, concrete_args: dict[str, Any] | None) -> GraphModule:
    """Return the graph of a model that is traced symbolically; the model is unchanged."""
    tracer = Tracer()
    if not isinstance(root, Module):
        graph = tracer.trace(root, concrete_args)
        return TracedModule(tracer.root, graph, _name(root))
    with attributes_kept(root):
        before = set(vars(root))
        graph = tracer.trace(root, concrete_args)
        constants = {name: value for name, value in vars(root).items() if name not in before}
    leaves = [str(node.target) for node in graph.find_nodes(op="call_module")]
    held = skeleton(root, leaves)
    for name, value in constants.items():
        _hold(held, name, value)
    for node in graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        module = held.get_submodule(path)
        if not hasattr(module, name):  # a plain attribute: a tensor, or an opaque object
            _hold(module, name, attribute(root, str(node.target)))
    return TracedModule(held, graph, _name(root))


def _hold(module: Module, name: str, value: Any) -> None:
    """Let a module hold a tensor as a buffer that is no part of its state, or another object."""
    if isinstance(value, torch.Tensor):
        module.register_buffer(name, value, persistent=False)
    else:
        setattr(module, name, value)


def _captured(root: Any, example_inputs: Sequence[Any]) -> GraphModule:
    """Return the graph of a model that is captured by Dynamo; the model is unchanged."""
    gm = capture(root, example_inputs, Tracer)
    held = skeleton(root) if isinstance(root, Module) else Module()
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = getattr(gm, name, None)  # what is not the model's: constants and bodies
        if value is None or name in held._parameters or name in held._buffers:
            continue
        _hold(held, name, value)
        for body in value.modules() if isinstance(value, Module) else ():
            if isinstance(body, GraphModule):
                unpickle_with(body, Retracer)
    return TracedModule(held, gm.graph, _name(root))


def _name(root: Any) -> str:
    return type(root).__name__ if isinstance(root, Module) else str(root.__name__)
