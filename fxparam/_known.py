"""Proxies of tensors whose metadata are known, because they depend on parameters alone.

While a graph is traced without example inputs, nothing is known of the inputs. A parametrization
depends on parameters and buffers, whose shapes and dtypes are there: each operation on those is run
on fake tensors beside the tracing, so that a parametrization may ask for shapes and branch on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node, Proxy

from fxparam._private import FakeTensorMode, tree_flatten
from fxparam.graph.ops import call

__all__ = ["Known", "Propagation", "is_constant"]

_PLAIN = (bool, int, float, complex, str)
_DESCRIBED = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def is_constant(value: object) -> bool:
    """Whether a value is made of numbers, names and descriptions of tensors."""
    leaves = tree_flatten(value)[0]
    return bool(leaves) and all(isinstance(leaf, (*_PLAIN, *_DESCRIBED)) for leaf in leaves)


class Propagation:
    """Runs operations on fake tensors, one per node of the graph that is being traced."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.running = False

    def attribute(self, tensor: torch.Tensor) -> Any:
        """The fake of a parameter or buffer; None for one that has none, as some subclasses."""
        return self._safely(lambda: self._mode.from_tensor(tensor))

    def result(self, node: Node) -> Any:
        """The fake value of a call on fakes; None where an argument or the result is not known."""
        if any("val" not in argument.meta for argument in node.all_input_nodes):
            return None
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])

        def run() -> Any:
            with self._mode:
                return call(node, args, kwargs)

        return self._safely(run)

    def _safely(self, function: Callable[[], Any]) -> Any:
        self.running = True
        try:
            return function()
        except Exception:  # depends on data, or cannot be run on fakes
            return None
        finally:
            self.running = False


class Known(Proxy):
    """A proxy that answers what depends on the metadata of its tensor alone."""

    @property
    def _value(self) -> Any:
        return self.node.meta["val"]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            found = getattr(self._value, name, None)
            if isinstance(found, torch.Size) or (not callable(found) and is_constant(found)):
                return found
        return super().__getattr__(name)

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        item: Callable[[int], Any] = self.__getitem__
        return iter([item(i) for i in range(len(self._value))])
