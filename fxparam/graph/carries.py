"""What a body returns must not be the memory it was given.

Inductor runs the bodies of loops and branches on the memory of their operands, which it uses for
other values once the operands have no more readers. Where a body returns an operand as it is, that
memory is the result's, and the result is overwritten. Programs may not have such bodies, but torch
makes them: in the backward of ``scan``, an operand without a gradient has a carry of zeros that is
passed on from step to step, and the gradient that is summed after the loop is wrong.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from fxparam.graph.bodies import is_run_by_itself
from fxparam.graph.nodes import body_of, meta_with, value_of

__all__ = ["copy_what_bodies_pass_on"]


def copy_what_bodies_pass_on(graph: Graph) -> None:
    """Let each body return copies of those of its operands that it returns.

    Args:
        graph: an ATen graph as AOTAutograd hands it to the partitioner.
    """
    gm = graph.owning_module
    assert gm is not None
    for node in filter(is_run_by_itself, graph.nodes):
        for argument in node.all_input_nodes:
            body = body_of(gm, argument)
            if body is not None:
                _copy_returned_operands(body)
                copy_what_bodies_pass_on(body.graph)


def _copy_returned_operands(body: GraphModule) -> None:
    output = body.graph.output_node()
    passed_on = [n for n in output.all_input_nodes if n.op == "placeholder"]
    copies: dict[Node, Node] = {}
    with body.graph.inserting_before(output):
        for operand in passed_on:
            if isinstance(value_of(operand), torch.Tensor):
                copies[operand] = body.graph.call_function(torch.ops.aten.clone.default, (operand,))
                copies[operand].meta = meta_with(operand, value_of(operand).clone())
    if copies:
        output.args = torch.fx.map_arg(output.args, lambda node: copies.get(node, node))
        body.recompile()
