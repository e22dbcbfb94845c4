"""Backward reads from a buffer that forward has overwritten.

::

    y = torch.sin(weight * torch.cos(self.scale))     # backward needs the cosine again
    self.scale.mul_(2)                                # the last operation of the forward graph

The partitioner decides what forward saves for backward, and what backward computes again from the
inputs. It may choose to compute a value again from an input that the graph overwrites: then
backward reads the new contents, and the gradient is wrong, without an error. Spectral norm reads
and overwrites a vector of its power iteration. For a layer with 2, 3 or 4 inputs its gradient is
off by up to 0.3 % under Inductor.

Seen on 2.11.0, 2.13.0 and 2.15.0, with ``inductor`` and ``aot_eager``. An open pull request mends
it: https://github.com/pytorch/pytorch/pull/197039.
``tests/graph/torch_bugs/test_overwritten_inputs.py`` shows it.

What we do: every value that is read from such an input is saved. This is a pass of Inductor's, so
other inner backends still compute it again.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from fxparam.graph.analysis.nodes import is_view

__all__ = ["save_reads_of_overwritten_inputs"]


def save_reads_of_overwritten_inputs(graph: Graph) -> None:
    """Mark what forward must save, in a joint graph of forward and backward.

    Args:
        graph: an ATen graph as AOTAutograd hands it to the partitioner; only metadata change.
    """
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    overwritten = {node.args[0] for node in copies}
    for node in overwritten:
        if isinstance(node, Node) and node.op == "placeholder":
            _save_reads(node)


def _save_reads(source: Node) -> None:
    """Mark what reads an input, or a view of it."""
    work, seen = [source], {source}
    while work:
        for user in work.pop().users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            if is_view(user):
                work.append(user)  # saving a view would save the memory that is overwritten
            elif user.target is not torch.ops.aten.copy_.default:
                user.meta["recompute"] = CheckpointPolicy.MUST_SAVE
