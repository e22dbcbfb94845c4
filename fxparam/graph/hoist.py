"""Share repeated evaluations: value numbering over parameter-derived nodes, before autograd.

    w0 = f(p); h = g(w0, h)              w0 = f(p); h = g(w0, h)
    w1 = f(p); h = g(w1, h)      ->                 h = g(w0, h)

Run before autograd, one value means one backward: merged after it, as torch's own CSE passes do,
the N backwards of N cotangents stay.

A node is numbered by its op, its literals and the numbers of its inputs. Two nodes of one number
compute the same function of the same tensors (rule 1); whether the later one may use the earlier
one's value is asked of ``legality``, node by node, so that a chain which may not be shared as a
whole still shares its pure prefix. The graph is a straight line, hence the earlier node always
runs when the later one does; bodies of higher-order ops are not entered.

Candidates are nodes that depend on parameters, buffers and constants alone, and nodes of an
evaluation whatever they depend on (``functional_call`` may put any tensor in an original's
place). Other repeated code is the user's and stays as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam._private import is_parameter_or_buffer
from fxparam.graph.effects import EffectTable, analyze
from fxparam.graph.evaluations import evaluations, owner
from fxparam.graph.legality import Rule, has_effects, refusal
from fxparam.graph.literals import literal_key
from fxparam.graph.nodes import attribute_of, value_of
from fxparam.graph.report import Report, make_report

__all__ = ["HoistResult", "hoist"]


@dataclass(frozen=True)
class HoistResult:
    """What ``hoist`` returns: the same graph module, the report, and whether it changed."""

    graph_module: GraphModule
    report: Report
    modified: bool


def hoist(gm: GraphModule, *, grad_enabled: bool | None = None) -> HoistResult:
    """Make repeated evaluations of a graph one, where the rules of sharing allow it.

    Args:
        gm: a graph with fake tensors in its nodes' metadata, as Dynamo makes it; changed in
            place. A graph without that metadata is returned as it is.
        grad_enabled: the grad mode in which the graph is called, None if not known.

    Returns:
        The graph module, what was shared and kept, and whether anything changed.
    """
    candidates = _candidates(gm)
    if not _repeats(candidates):
        return HoistResult(gm, make_report(evaluations(gm.graph), set(), {}), False)
    found = evaluations(gm.graph)
    table = analyze(gm, grad_enabled=grad_enabled)
    merged, refusals = _share(gm, table, candidates)
    report = make_report(found, merged, refusals)
    if merged:
        _erase(gm, table, merged)
        gm.graph.lint()
        gm.recompile()
    return HoistResult(gm, report, bool(merged))


def _repeats(candidates: set[Node]) -> bool:
    """Whether sharing can be found at all: a cheap look before the analysis of effects."""
    calls = [(n.target, len(n.all_input_nodes)) for n in candidates]
    return len(set(calls)) < len(calls)


def _candidates(gm: GraphModule) -> set[Node]:
    constant: set[Node] = set()
    derived: set[Node] = set()
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr" or (node.op == "placeholder" and _is_parameter(node)):
            derived.add(node)
        elif node.op in ("call_function", "call_method"):
            inputs = node.all_input_nodes
            if all(n in constant for n in inputs):
                constant.add(node)
                if owner(node) is not None:
                    found.add(node)
            elif all(n in constant or n in derived for n in inputs):
                derived.add(node)
                found.add(node)
            elif owner(node) is not None:
                found.add(node)
    return found


def _is_parameter(node: Node) -> bool:
    return is_parameter_or_buffer(node.meta) or isinstance(value_of(node), torch.nn.Parameter)


def _share(
    gm: GraphModule, table: EffectTable, candidates: set[Node]
) -> tuple[set[Node], dict[Node, Rule]]:
    """Redirect users of repeated nodes to the first; the nodes left without users stay."""
    number: dict[Node, Node] = {}
    firsts: dict[Hashable, list[Node]] = {}
    merged: set[Node] = set()
    refusals: dict[Node, Rule] = {}
    for node in gm.graph.nodes:
        key = _key(gm, node, number)
        number[node] = node
        impure = has_effects(table, node)
        if impure is not None and node in candidates:
            refusals[node] = impure
        if key is None or impure is not None:
            continue
        refused: Rule | None = None
        for first in firsts.setdefault(key, []):
            refused = refusal(table, first, node)
            if refused is None:
                number[node] = first
                if node in candidates:
                    node.replace_all_uses_with(first)
                    merged.add(node)
                break
        if number[node] is node:
            firsts[key].append(node)
            if refused is not None and node in candidates:
                refusals[node] = refused
    return merged, refusals


def _key(gm: GraphModule, node: Node, number: dict[Node, Node]) -> Hashable | None:
    """The number of a node's value: what it computes, of what."""
    if node.op == "get_attr":
        return ("get_attr", id(attribute_of(gm, node)))
    if node.op not in ("call_function", "call_method"):
        return None
    return (node.op, node.target, _number(node.args, number), _number(node.kwargs, number))


def _number(value: Any, number: dict[Node, Node]) -> Hashable:
    if isinstance(value, Node):
        return ("node", number[value])
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_number(v, number) for v in value))
    if isinstance(value, dict):
        return ("dict", tuple((k, _number(v, number)) for k, v in value.items()))
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return ("slice", tuple(_number(v, number) for v in parts))
    return literal_key(value)


def _erase(gm: GraphModule, table: EffectTable, merged: Iterable[Node]) -> None:
    """Erase merged nodes, then what they alone used.

    Not ``Graph.eliminate_dead_code``: it takes ``add_`` and ``out=`` for pure.
    """
    work = sorted(merged, key=table.position.__getitem__, reverse=True)
    while work:
        node = work.pop(0)
        if node.users or node._erased or node.op == "placeholder":
            continue
        if node.op != "get_attr" and not table.of[node].pure:
            continue
        inputs = node.all_input_nodes
        gm.graph.erase_node(node)
        work.extend(inputs)
