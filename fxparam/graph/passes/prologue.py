"""The prologue: what a graph computes from parameters, buffers and constants alone, put in front.

    h = g(x)                              w = f(p)
    w = f(p)                      ->      h = g(x)
    y = k(h, w)                           y = k(h, w)

A node may come to the front if it has no effects, runs under the modes that the graph is entered
with, and reads nothing that is written before it. To be run *once for many runs* of the rest
(``split``), what it reads must not be written at all, and nobody, the caller included, may write to
its value.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fxparam._torch.fx import copy_nodes
from fxparam.graph.analysis.derived import derive, is_parameter
from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.nodes import ancestors
from fxparam.graph.rules import has_effects

__all__ = ["lift", "prologue_of", "subgraph"]


def prologue_of(gm: GraphModule, *, lasting: bool = False, returned: bool = False) -> list[Node]:
    """Return the calls that can come first, in order.

    Args:
        gm: a graph; nodes whose effects are not known stay where they are.
        lasting: only those whose values serve every later run of the rest, while no parameter or
            buffer is written between two runs.
        returned: of the lasting ones, also those that the graph returns.
    """
    table = analyze(gm)
    inputs = [n for n in gm.graph.find_nodes(op="placeholder") if is_parameter(n)]
    derived = derive(gm, inputs)
    entry = table.of[next(iter(gm.graph.nodes))].modes
    found: dict[Node, None] = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if node not in derived.nodes and node not in derived.constants:
            continue
        if not all(n in found for n in node.all_input_nodes if n.op.startswith("call")):
            continue
        if table.of[node].modes == entry and (
            _may_serve_later_runs(table, node, returned)
            if lasting
            else _may_come_first(table, node)
        ):
            found[node] = None
    # Of the constants, those that such a value is computed from.
    needed = ancestors((n for n in found if n in derived.nodes), found.__contains__)
    return [node for node in found if node in needed]


def _may_come_first(table: EffectTable, node: Node) -> bool:
    reads = table.of[node].reads
    return has_effects(table, node) is None and not table.written(
        reads, before=table.position[node]
    )


def _may_serve_later_runs(table: EffectTable, node: Node, returned: bool) -> bool:
    effects = table.of[node]
    if has_effects(table, node) is not None or table.written(effects.reads | effects.storages):
        return False
    return returned or not effects.storages & table.escaping


def lift(gm: GraphModule) -> list[Node]:
    """Move the prologue in front of the body.

    Returns:
        The nodes of the prologue, the attributes they read among them, in order.
    """
    calls = prologue_of(gm)
    read = {n: None for call in calls for n in call.all_input_nodes if n.op == "get_attr"}
    members = {*read, *calls}
    order = [node for node in gm.graph.nodes if node in members]
    start = next(n for n in gm.graph.nodes if n.op != "placeholder" and n not in members)
    for node in order:
        start.prepend(node)
    gm.recompile()
    return order


def subgraph(graph: Graph, values: list[Node]) -> tuple[Graph, list[Node]]:
    """Return a graph that computes some nodes' values alone, and the placeholders it reads."""
    needed = ancestors(values)
    new = Graph()
    copies: dict[Node, Node] = {}
    copy_nodes((node for node in graph.nodes if node in needed), new, copies)
    new.output(tuple(copies[node] for node in values))
    return new, [node for node in copies if node.op == "placeholder"]
