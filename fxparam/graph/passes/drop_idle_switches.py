"""Switches of the grad mode with nothing between them, left where evaluations were taken out.

set_grad_enabled(False)
set_grad_enabled(True)       ->      linear(x, w)
linear(x, w)
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fxparam._torch.fx import is_erased
from fxparam._torch.names import set_grad_enabled
from fxparam.graph.analysis.effect_table import EffectTable

__all__ = ["drop_idle_switches"]


def drop_idle_switches(gm: GraphModule, tables: list[EffectTable]) -> None:
    """Erase a switch that another follows at once, and both where that one puts back what was.

    Args:
        gm: a graph.
        tables: its effects, in each context.
    """
    for node in list(gm.graph.nodes):
        if is_erased(node) or not _switches_grad(node) or not _switches_grad(node.next):
            continue
        before, second = node.prev, node.next
        gm.graph.erase_node(node)
        if all(
            before in table.of and table.of[before].modes == table.of[second].modes
            for table in tables
        ):
            gm.graph.erase_node(second)


def _switches_grad(node: Node) -> bool:
    return node.op == "call_function" and node.target is set_grad_enabled and not node.users
