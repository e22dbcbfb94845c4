"""Run the operations on parameters alone on fake tensors, while a graph is traced.

While a graph is traced without example inputs, nothing is known of the inputs. A parametrization
depends on parameters and buffers, whose shapes and dtypes are there: each operation on those is run
on fake tensors beside the tracing, so that a parametrization may ask for shapes and branch on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.nn import Module

from fxparam._torch.fx import is_torch
from fxparam._torch.names import FakeTensorMode, tree_flatten
from fxparam.graph.analysis.op_effects import call

__all__ = ["Propagation", "attribute", "is_constant"]

_PLAIN = (bool, int, float, complex, str)
_DESCRIBED = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def is_constant(value: object) -> bool:
    """Check whether a value is made of numbers, names and descriptions of tensors."""
    leaves = tree_flatten(value)[0]
    return bool(leaves) and all(isinstance(leaf, (*_PLAIN, *_DESCRIBED)) for leaf in leaves)


def attribute(root: Module, name: str) -> Any:
    """Return the attribute of a module under a qualified name; None if there is none.

    Not by ``getattr``, for which a tracer gives proxies.
    """
    path, _, last = name.rpartition(".")
    for part in path.split(".") if path else ():
        held = root._modules.get(part)
        if held is None:
            return None
        root = held
    for held_by in (root._parameters, root._buffers, vars(root)):
        if last in held_by:
            return held_by[last]
    return None


class Propagation:
    """Runs operations on fake tensors, one per node of the graph that is being traced.

    Args:
        tensors: the model's tensors by their names, which its modules may have bound anew.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self._tensors = tensors or {}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.running = False

    def describe(self, node: Node, root: Module) -> None:
        """Give a node of a graph over ``root`` its metadata, where parameters alone decide them."""
        value = None
        if node.op == "get_attr":
            name = str(node.target)
            tensor = self._tensors.get(name)
            value = self._attribute(attribute(root, name) if tensor is None else tensor)
        elif node.op == "call_method" or is_torch(node):
            value = self._result(node)
        if value is not None:
            node.meta["val"] = value

    def _attribute(self, tensor: Any) -> Any:
        """Return the fake of a parameter or buffer; None where there is none, as of a subclass."""
        return self._safely(lambda: self._mode.from_tensor(tensor))

    def _result(self, node: Node) -> Any:
        """Return the result of a call on fakes; None if an argument or the result is not known."""
        if any("val" not in argument.meta for argument in node.all_input_nodes):
            return None
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])

        def run() -> Any:
            with self._mode:
                return call(node, args, kwargs)

        return self._safely(run)

    def _safely(self, function: Callable[[], Any]) -> Any:
        """Return the result of a function; None if it raises."""
        self.running = True
        try:
            return function()
        except Exception:  # depends on data, or cannot be run on fakes
            return None
        finally:
            self.running = False
