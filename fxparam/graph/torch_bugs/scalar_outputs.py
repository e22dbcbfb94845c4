"""Inductor cannot compile ``scan`` and ``map`` that Dynamo captured without ``fullgraph=True``.

Inductor lowers these loops to code that reads numbers from tensors. Dynamo allows that only with
``fullgraph=True`` or ``capture_scalar_outputs``, and without them a graph that was captured whole
raises ``DataDependentOutputException`` in the lowering. Here the graph is allowed to.
"""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule

from fxparam.graph.analysis.nodes import value_of

__all__ = ["allow_scalar_outputs"]


def allow_scalar_outputs(gm: GraphModule) -> None:
    """Let what compiles a graph of Dynamo's read numbers from its tensors."""
    for placeholder in gm.graph.find_nodes(op="placeholder"):
        fake_mode = getattr(value_of(placeholder), "fake_mode", None)
        shape_env = getattr(fake_mode, "shape_env", None)
        if shape_env is not None and not shape_env.settings.allow_scalar_outputs:
            shape_env.settings = dataclasses.replace(shape_env.settings, allow_scalar_outputs=True)
