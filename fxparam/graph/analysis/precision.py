"""Which values have less precision than the originals they are computed from.

    w = f(p).half();  y = g(w) + h(w)         the gradients of g and h are summed in float16
    w = f(p); y = g(w.half()) + h(w.half())   they are cast to float32, then summed

The gradient of a value is the sum of its readers' gradients, in the dtype of the value. Where each
access has an evaluation of its own, the sum is made at the original, in the original's dtype. In
float16 the sum may be infinite where each term is not, and in bfloat16 it stops growing.

    w = f(p).half().float();  y = g(w) + h(w)    the sum is made in float32, and cast to float16

A value in full precision that comes from one of the small range of float16 passes the whole sum on
to it, which may be infinite as well. Through bfloat16, of the range of float32, it is rounded once.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fxparam.graph.analysis.nodes import tensors_in, value_of

__all__ = ["narrowed"]

_FULL = 32  # bits, of which a sum loses the last ones alone
_WIDE = 1e30  # a dtype that holds such numbers has the range of float32, as bfloat16 has


def narrowed(gm: GraphModule) -> frozenset[Node]:
    """Return the nodes whose gradients are summed in fewer bits than those of their sources.

    They ask for a gradient, and have fewer bits than a tensor that they depend on, or come from a
    value with fewer bits and a smaller range.
    """
    of_sources: dict[Node, int] = {}
    found, of_small_range = set(), set()
    for node in gm.graph.nodes:
        own = _bits(node)
        inputs = [of_sources[n] for n in node.all_input_nodes]
        of_sources[node] = max(inputs, default=own)
        if 0 < own < min(_FULL, of_sources[node]):
            found.add(node)
            if _has_small_range(node):
                of_small_range.add(node)
        elif own and not of_small_range.isdisjoint(node.all_input_nodes):
            of_small_range.add(node)
    return frozenset(found | of_small_range)


def _has_small_range(node: Node) -> bool:
    """Check whether a number of a node's value cannot be as large as one in float32."""
    dtypes = {t.dtype for t in tensors_in(value_of(node)) if t.requires_grad}
    return any(torch.finfo(dtype).max < _WIDE for dtype in dtypes if _bits_of(dtype))


def _bits(node: Node) -> int:
    """Return the bits of a number in a node's value that asks for a gradient; 0 for no such."""
    tensors = (t for t in tensors_in(value_of(node)) if t.requires_grad)
    return max((_bits_of(t.dtype) for t in tensors), default=0)


def _bits_of(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits if dtype.is_floating_point or dtype.is_complex else 0
