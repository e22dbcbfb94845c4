"""Value numbering along one straight-line graph: repeated evaluations become one.

    w0 = f(p); h = g(w0, h)              w0 = f(p); h = g(w0, h)
    w1 = f(p); h = g(w1, h)      ->                 h = g(w0, h)

A node is numbered by its op, its literals and the numbers of its inputs. Two nodes of one number
compute the same function of the same tensors (rule 1); whether the later one may use the earlier
one's value is asked of ``legality``, node by node, so that a chain which may not be shared as a
whole still shares its pure prefix. The graph is a straight line, hence the earlier node always
runs when the later one does.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Hashable, Iterable
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from fxparam._torch.fx import is_erased
from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.nesting import Level
from fxparam.graph.analysis.nodes import has_new_sizes
from fxparam.graph.analysis.numbering import key_of
from fxparam.graph.analysis.precision import narrowed
from fxparam.graph.rules import (
    Rule,
    do_readers_sum_in_reduced_precision,
    has_effects,
    refusal,
)

__all__ = ["Sharing", "erase_unused", "share"]


@dataclass
class Sharing:
    """Attributes:
    number: for each node, the node whose value it has.
    firsts: for each key, the nodes with a value of their own.
    merged: nodes that were replaced.
    refusals: nodes that were kept, and why.
    """

    number: dict[Node, Node] = field(default_factory=dict)
    firsts: dict[Hashable, list[Node]] = field(default_factory=dict)
    merged: set[Node] = field(default_factory=set)
    refusals: dict[Node, Rule] = field(default_factory=dict)


def share(level: Level, max_bytes: float = float("inf")) -> Sharing:
    """Let repeated nodes of a graph use the first one's value, and erase them."""
    result = _decide(level, max_bytes)
    _keep_what_readers_need(level, result)
    for node in result.merged:
        node.replace_all_uses_with(result.number[node])
    erase_unused(level.gm, level.tables[0], result.merged)
    return result


def _decide(level: Level, max_bytes: float) -> Sharing:
    """Number the nodes of a graph, and say which may use the value of an earlier one."""
    result = Sharing()
    candidates = level.derived.candidates
    for node in level.gm.graph.nodes:
        key = key_of(level.gm, node, result.number)
        result.number[node] = node
        impure = _first_refusal(has_effects(table, node) for table in level.tables)
        if impure is not None and node in candidates:
            result.refusals[node] = impure
        if key is None or impure is not None:
            continue
        refused: Rule | None = None
        for first in result.firsts.setdefault(key, []):
            refused = _first_refusal(refusal(t, first, node, max_bytes) for t in level.tables)
            if refused is None:
                result.number[node] = first
                if node in candidates:
                    result.merged.add(node)
                break
        if result.number[node] is node:
            result.firsts[key].append(node)
            if refused is not None and node in candidates:
                result.refusals[node] = refused
    return result


def _keep_what_readers_need(level: Level, result: Sharing) -> None:
    """Keep nodes that may be merged only together with those that read them.

    torch remembers, on a mask, the size of what it selects: one mask gives one size. Two selections
    that are not merged therefore have a mask each.
    """
    narrow = narrowed(level.gm)
    selections = {node for node in level.gm.graph.nodes if has_new_sizes(node)}
    read = Counter(result.number[n] for node in selections for n in node.all_input_nodes)
    for node in reversed(level.gm.graph.nodes):
        if node not in result.merged:
            if node in selections:
                masks = (n for n in node.all_input_nodes if read[result.number[n]] > 1)
                result.merged.difference_update(masks)
            continue
        apart = any(user not in result.merged for user in node.users)
        if do_readers_sum_in_reduced_precision(narrow=node in narrow, apart=apart):
            result.merged.discard(node)
            result.refusals[node] = Rule.REDUCED


def _first_refusal(refusals: Iterable[Rule | None]) -> Rule | None:
    return next((rule for rule in refusals if rule is not None), None)


def erase_unused(
    gm: GraphModule, table: EffectTable, nodes: Iterable[Node], moved: Container[Node] = ()
) -> None:
    """Erase nodes that nothing uses, then what they alone used; with effects only if ``moved``.

    Not ``Graph.eliminate_dead_code``: it takes ``add_`` and ``out=`` for pure.
    """
    work = deque(sorted(nodes, key=table.position.__getitem__, reverse=True))
    while work:
        node = work.popleft()
        if node.users or is_erased(node) or node.op == "placeholder":
            continue
        if node.op != "get_attr" and not table.of[node].pure and node not in moved:
            continue
        inputs = node.all_input_nodes
        gm.graph.erase_node(node)
        work.extend(inputs)
