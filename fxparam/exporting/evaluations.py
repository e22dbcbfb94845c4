"""Which nodes of an exported program evaluate parametrizations, and whether that can be done now.

Export says so by module stacks. In programs that :func:`fxparam.export` captures, nodes are marked
by them at once, since passes change the stacks of what they move. No stack have the nodes that
non-strict export traces in the bodies of loops and branches: what came out of one, and whatever the
stacks of a program from elsewhere do not say, is known by the originals that it is computed from.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping

from torch.fx import GraphModule, Node

from fxparam.graph.analysis.derived import PARAMETER
from fxparam.graph.analysis.effect_table import EffectTable
from fxparam.graph.analysis.effects import analyze
from fxparam.graph.analysis.nodes import body_of, is_view, owner, value_of
from fxparam.graph.analysis.schemas import writes_nothing
from fxparam.graph.passes.prologue import prologue_of
from fxparam.graph.rules import Rule, has_effects

__all__ = [
    "EVALUATES",
    "IN_A_BODY",
    "UNDER_AUTOCAST",
    "cannot_fold",
    "evaluated_tensor",
    "mark_evaluations",
    "parts_of",
    "values_of",
]

#: Key of a node's metadata: the name of the tensor that it evaluates a part of; None for no tensor.
EVALUATES = "fxparam.evaluates"

IN_A_BODY = "the body of a loop or branch evaluates it, or reads an original of it"
UNDER_AUTOCAST = "it is evaluated under autocast around a loop or branch"

# ``cell.parametrizations.weight.original0``, or a buffer of a parametrization.
_ORIGINAL = re.compile(r"(.+\.)??parametrizations\.([^.]+)\..+")


def evaluated_tensor(original: object) -> str | None:
    """Return the tensor of which an original, or a parametrization's own tensor, is a part."""
    match = _ORIGINAL.fullmatch(str(original))
    return None if match is None else (match[1] or "") + match[2]


def mark_evaluations(gm: GraphModule) -> None:
    """Let the nodes of a graph, and of its bodies, say which tensor they evaluate a part of.

    Args:
        gm: a graph as it was captured, before a pass moves nodes or changes their module stacks.
            Nodes that have none, in bodies, stay unmarked. So do blocks and what they give: export
            places those, which may be in another module than what is evaluated in them.
    """
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            if node.meta.get("nn_module_stack") and not _runs_a_body(module, _operation(node)):
                node.meta[EVALUATES] = evaluated_in(node)


def evaluated_in(node: Node) -> str | None:
    """Return the tensor that a node evaluates a part of, by its mark or else its module stack."""
    if EVALUATES in node.meta:
        name: str | None = node.meta[EVALUATES]
        return name
    site = owner(node)
    return None if site is None else site[1]


def parts_of(gm: GraphModule, first: set[Node]) -> dict[Node, str]:
    """Return the nodes of evaluations, with the names of the parametrized tensors.

    Args:
        gm: the graph.
        first: its prologue, in which nodes without a mark and a module stack are looked for.
    """
    parts: dict[Node, str] = {}
    sources = _originals(gm)
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = evaluated_in(node)
        if name is not None:
            parts[node] = name
        elif node.target is operator.getitem and node.args[0] in parts:
            # Of what a block gives; export places it outside.
            parts[node] = parts[node.args[0]]
            sources |= {node: parts[node]} if node.args[0] in sources else {}
        elif node in first and EVALUATES not in node.meta:
            guess = _guess(node, sources)
            if guess is not None:
                sources[node] = parts[node] = guess
    _correct_guesses(gm, first, parts)
    return parts


def _originals(gm: GraphModule) -> dict[Node, str]:
    """Return the placeholders of originals, with the names of the parametrized tensors."""
    inputs = {
        n: evaluated_tensor(n.meta.get(PARAMETER)) for n in gm.graph.find_nodes(op="placeholder")
    }
    return {node: name for node, name in inputs.items() if name is not None}


def _guess(node: Node, sources: dict[Node, str]) -> str | None:
    """Return the tensor that a node evaluates a part of, by the originals it is computed from."""
    read = {n: sources[n] for n in node.all_input_nodes if n in sources}
    # Tied originals may have the name that they have in another tensor's list.
    tied = bool(read) and all(n.op == "placeholder" for n in read)
    return min(read.values()) if tied or len(set(read.values())) == 1 else None


def _correct_guesses(gm: GraphModule, first: set[Node], parts: dict[Node, str]) -> None:
    """Look at the readers of nodes that do not say themselves what they evaluate."""
    for node in reversed(gm.graph.nodes):
        if owner(node) is not None or EVALUATES in node.meta or node not in first:
            continue
        readers = {parts.get(user) for user in node.users}
        if len(readers) == 1 and None not in readers:
            parts[node] = readers.pop() or ""  # only an evaluation reads it: a constant, say
        elif node in parts and is_view(_operation(node)) and None in readers:
            del parts[node]  # a transpose, say, is how the value is used


def _operation(node: Node) -> Node:
    """Return what gives a node's value, perhaps among others."""
    source = node.args[0] if node.target is operator.getitem else node
    return source if isinstance(source, Node) else node


def _runs_a_body(gm: GraphModule, node: Node) -> bool:
    return any(body_of(gm, argument) is not None for argument in node.all_input_nodes)


def values_of(
    gm: GraphModule, mutations: Mapping[str, str]
) -> tuple[dict[Node, str], dict[Node, str], list[Node]]:
    """Return the nodes that have to be evaluated now.

    Args:
        gm: the graph of the program.
        mutations: of a decomposed program, the nodes whose values parameters and buffers become,
            and the names of those.

    Returns:
        The nodes whose values the rest of the graph reads, with the tensors' names; all nodes of
        evaluations; and those values that the program may return the memory of.

    Raises:
        ValueError: one of them cannot be evaluated beforehand.
    """
    table = analyze(gm)
    first = set(prologue_of(gm, lasting=True, returned=True))
    parts = parts_of(gm, first)
    stale = _computed_from(table, gm, set(mutations.values()))
    effects = dict(_effects(table))
    for node, name in parts.items():
        if node.name in mutations:
            raise cannot_fold(name, Rule.WRITES.value)
    for node, name in parts.items():
        if node in stale:
            raise cannot_fold(name, effects.get(name, Rule.ORIGINAL_WRITTEN).value)
        if node not in first and not _says_nothing(node):
            raise cannot_fold(name, effects[name].value if name in effects else _why(table, node))
    # What an evaluation of another tensor reads, a mask that both use say, is no value.
    found = {n: name for n, name in parts.items() if any(user not in parts for user in n.users)}
    for node in _calls_of_bodies(gm):
        tensor = evaluated_in(node)
        if tensor is not None and tensor not in found.values():
            why = effects[tensor].value if tensor in effects else IN_A_BODY
            raise cannot_fold(tensor, why)
    returned = [node for node in found if table.of[node].storages & table.escaping]
    return found, parts, returned


def _computed_from(table: EffectTable, gm: GraphModule, names: set[str]) -> set[Node]:
    """Return the nodes computed from parameters and buffers that the program changes."""
    inputs = [n for n in gm.graph.find_nodes(op="placeholder") if n.meta.get(PARAMETER) in names]
    changed = frozenset().union(*(table.of[node].storages for node in inputs))
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if table.of[node].reads & changed or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _calls_of_bodies(gm: GraphModule) -> Iterator[Node]:
    for body in gm.modules():
        if isinstance(body, GraphModule) and body is not gm:
            yield from (node for node in body.graph.nodes if node.op.startswith("call"))


def _effects(table: EffectTable) -> Iterator[tuple[str, Rule]]:
    """Yield the tensors whose evaluations have effects, in a graph or in its bodies."""
    for node in table.of:
        tensor, rule = evaluated_in(node), has_effects(table, node)
        if tensor is not None and rule is not None:
            yield tensor, rule
    for _, tables in table.calls.values():
        for inner in tables:
            yield from _effects(inner)


def _says_nothing(node: Node) -> bool:
    """Check whether a node is a constant that nobody reads, or an assertion."""
    return not node.users and (value_of(node) is not None or writes_nothing(node))


def _why(table: EffectTable, node: Node) -> str:
    effects = table.of[node]
    if table.written(effects.reads):
        return str(Rule.ORIGINAL_WRITTEN.value)
    if table.written(effects.storages):
        return str(Rule.VALUE_WRITTEN.value)
    if effects.modes != table.of[next(iter(table.of))].modes:
        return UNDER_AUTOCAST
    return "the evaluation depends on the inputs of the program"


def cannot_fold(name: str, why: str) -> ValueError:
    """Return the error that says which tensor cannot be folded, and why."""
    way_out = (
        "Export the model in eval() mode"
        if why not in (IN_A_BODY, UNDER_AUTOCAST)
        else "Read it in front of that"
    )
    return ValueError(
        f"fold evaluates {name} once and for all, which would change the program.\n"
        "required: parametrizations that write nothing, draw no random numbers and depend on "
        f"parameters and buffers alone\nfound: {name}: {why}\n"
        f"{way_out}, or export without fold."
    )
