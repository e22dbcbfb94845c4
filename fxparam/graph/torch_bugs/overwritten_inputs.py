"""What backward may not recompute: values read from an input that the graph overwrites.

A training graph updates a buffer by a ``copy_`` at its end. The partitioner which decides what
forward saves for backward may instead have backward recompute a value from its inputs. Where such
an input is that buffer, backward reads what was written since, and the gradient is wrong: spectral
norm of a layer with few inputs trains wrongly that way (its power iteration reads the vector which
it replaces). Saving every value read from an overwritten input leaves nothing to recompute from it.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from fxparam.graph.analysis.nodes import is_view

__all__ = ["save_reads_of_overwritten_inputs"]


def save_reads_of_overwritten_inputs(graph: Graph) -> None:
    """Tag, in a joint forward and backward graph, what must be saved in forward.

    Args:
        graph: an ATen graph as AOTAutograd hands it to the partitioner; only metadata change.
    """
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    overwritten = {node.args[0] for node in copies}
    for node in overwritten:
        if isinstance(node, Node) and node.op == "placeholder":
            _save_reads(node)


def _save_reads(source: Node) -> None:
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
