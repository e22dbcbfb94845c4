"""Inductor cannot compile ``scan`` and ``map`` that Dynamo captured without ``fullgraph=True``.

::

    torch.compile(lambda h, xs: scan(step, h, xs))(h, xs)     # DataDependentOutputException

Inductor lowers these loops to code that reads numbers from tensors. Dynamo allows that in graphs
captured with ``fullgraph=True`` or ``torch._dynamo.config.capture_scalar_outputs``, and forbids it
in others, even if it captured all of the program in one graph.

Seen on 2.11.0, 2.13.0 and 2.15.0. The upstream issue is open:
https://github.com/pytorch/pytorch/issues/153437.
``tests/graph/torch_bugs/test_scalar_outputs.py`` shows it.

What we do: a captured graph that has bodies is allowed to read numbers.
"""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule

from fxparam.graph.analysis.nodes import value_of

__all__ = ["allow_scalar_outputs"]


def allow_scalar_outputs(gm: GraphModule) -> None:
    """Let compiled code of a graph, captured by Dynamo, read numbers from tensors."""
    for placeholder in gm.graph.find_nodes(op="placeholder"):
        fake_mode = getattr(value_of(placeholder), "fake_mode", None)
        shape_env = getattr(fake_mode, "shape_env", None)
        if shape_env is not None and not shape_env.settings.allow_scalar_outputs:
            shape_env.settings = dataclasses.replace(shape_env.settings, allow_scalar_outputs=True)
