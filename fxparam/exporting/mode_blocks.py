"""Evaluations in the blocks of an exported program that switch modes, moved in front of the blocks.

    y = no_grad_block(body, x, p)             w = f(p)
      body(x, p): w = f(p); ...       ->      y = no_grad_block(body, x, w)
                                                body(x, w): ...

The grad mode changes no value, and a value that is folded passes no gradient on. What stays in such
a block, and what came out of it, still asks for none. Autocast changes values: what it evaluates is
moved into blocks in front, one for each tensor, that evaluate and do nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator
from itertools import takewhile
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fxparam._torch.fx import copy_nodes, hold
from fxparam.exporting.evaluations import EVALUATES, parts_of
from fxparam.graph import hoist
from fxparam.graph.analysis.bodies import Call, call_of
from fxparam.graph.analysis.derived import PARAMETER, derive, is_parameter
from fxparam.graph.analysis.nodes import ancestors, modules_around, value_of
from fxparam.graph.analysis.schemas import writes_nothing
from fxparam.graph.passes.operands import Operand, add_operands, drop_operands, used_operands
from fxparam.graph.passes.prologue import prologue_of

__all__ = ["drop_unread_bodies", "erase_dead", "pull_evaluations", "readers"]

_AUTOCAST = "wrap_with_autocast"
_BLOCKS = ("wrap_with_set_grad_enabled", _AUTOCAST)

_Copies = dict[Node, Any]


def _block_of(gm: GraphModule, node: Node) -> Call | None:
    call = call_of(gm, node)
    return call if call is not None and call.op in _BLOCKS else None


def readers(gm: GraphModule, node: Node) -> Iterator[tuple[GraphModule, Node]]:
    """Yield the nodes that read a node, those in blocks among them, with their graphs."""
    for user in node.users:
        call = _block_of(gm, user)
        if call is None:
            yield gm, user
            continue
        for placeholder, operand in zip(call.bodies[0].placeholders, call.operands, strict=True):
            if operand is node:
                yield from readers(call.bodies[0].module, placeholder)


def pull_evaluations(gm: GraphModule) -> None:
    """Move what evaluates out of the blocks of a graph, and of those in them.

    What has effects, or depends on what has, stays inside.
    """
    for node in list(gm.graph.nodes):
        call = _block_of(gm, node)
        if call is None:
            continue
        body = call.bodies[0]
        derived = derive(gm, filter(is_parameter, gm.graph.find_nodes(op="placeholder"))).nodes
        for placeholder, operand in zip(body.placeholders, call.operands, strict=True):
            if operand in derived:
                placeholder.meta[PARAMETER] = operand.meta.get(PARAMETER)
        pull_evaluations(body.module)
        hoist(body.module)
        first = set(prologue_of(body.module, lasting=True, returned=True))
        parts = parts_of(body.module, first)
        values = [n for n in parts if n in first and any(u not in parts for u in n.users)]
        asserts = {n for n in parts if value_of(n) is None and writes_nothing(n)}
        if values or asserts:
            copy_before = _cast_before if call.op == _AUTOCAST else _copy_before
            copies = copy_before(gm, call, values, parts)
            _return_no_more(gm, call, copies)
            _read_operands(call, {value: copies[value] for value in values})
            erase_dead(body.module, first | asserts)
            drop_unread_bodies(body.module)
            _drop_unread_operands(gm, call)
        _place(gm, call)


def _copy_before(gm: GraphModule, call: Call, values: list[Node], _: dict[Node, str]) -> _Copies:
    """Evaluate nodes of a block in front of it."""
    body = call.bodies[0]
    copies: _Copies = dict(zip(body.placeholders, call.operands, strict=True))
    with gm.graph.inserting_before(call.node):
        _copy(body.module, ancestors(values), gm, copies)
    return copies


def _cast_before(
    gm: GraphModule, call: Call, values: list[Node], parts: dict[Node, str]
) -> _Copies:
    """Evaluate nodes of an autocast block in blocks in front of it."""
    body = call.bodies[0]
    copies: _Copies = dict(zip(body.placeholders, call.operands, strict=True))
    for name in dict.fromkeys(parts[value] for value in values):
        own = [value for value in values if parts[value] == name]
        needed = ancestors(own)
        module, inside = GraphModule(torch.nn.Module(), Graph()), _Copies()
        _copy(body.module, needed, module, inside)
        module.graph.output(tuple(inside[value] for value in own))
        module.recompile()
        operands = [copies[p] for p in body.placeholders if p in needed]
        with gm.graph.inserting_before(call.node):
            held = gm.graph.get_attr(hold(gm, "autocast", module))
            run = gm.graph.call_function(call.node.target, (*call.node.args[:4], held, *operands))  # type: ignore[arg-type]
            for i, value in enumerate(own):
                copies[value] = gm.graph.call_function(operator.getitem, (run, i))
                copies[value].meta = dict(value.meta)
        for node in (held, run):
            node.meta["nn_module_stack"] = own[0].meta.get("nn_module_stack", {})
        run.meta["val"] = tuple(value.meta["val"] for value in own)
    return copies


def _copy(source: GraphModule, needed: set[Node], gm: GraphModule, copies: _Copies) -> None:
    """Copy nodes into the graph of another module, but for those that are copied already."""
    nodes = (node for node in source.graph.nodes if node in needed)
    copy_nodes(nodes, gm.graph, copies, modules=(source, gm))


def _return_no_more(gm: GraphModule, call: Call, copies: _Copies) -> None:
    """Read what a block returns of its values from their copies in front of it."""
    output = call.bodies[0].module.graph.output_node()
    returned: Any = output.args[0]
    kept = [i for i, node in enumerate(returned) if node not in copies or node.op == "placeholder"]
    for user in list(call.node.users):
        index: Any = user.args[1]
        if index in kept:
            user.args = (call.node, kept.index(index))
            continue
        read = copies[returned[index]]
        if call.op != _AUTOCAST:
            with gm.graph.inserting_before(call.node):
                read = gm.graph.call_function(torch.ops.aten.detach.default, (read,))
            read.meta = {**user.meta, "nn_module_stack": modules_around(user)}
            if EVALUATES in user.meta:
                read.meta[EVALUATES] = None
        user.replace_all_uses_with(read)
        gm.graph.erase_node(user)
    output.args = (tuple(returned[i] for i in kept),)
    call.node.meta["val"] = tuple(call.node.meta["val"][i] for i in kept)


def _read_operands(call: Call, copies: _Copies) -> None:
    """Read copies of values in a block as operands."""
    added = [Operand([copy], n.name, {"val": n.meta["val"]}) for n, copy in copies.items()]
    entered = add_operands([call], added)
    for node, (placeholder,) in zip(copies, entered, strict=True):
        node.replace_all_uses_with(placeholder)


def _drop_unread_operands(gm: GraphModule, call: Call) -> None:
    now = _block_of(gm, call.node)
    assert now is not None
    drop_operands([now], set(range(len(now.operands))) - used_operands(now))
    now.bodies[0].module.recompile()


def erase_dead(gm: GraphModule, droppable: Container[Node]) -> None:
    """Erase the nodes that nothing reads any more, if they are droppable or attributes."""
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and (node in droppable or node.op == "get_attr"):
            gm.graph.erase_node(node)


def drop_unread_bodies(gm: GraphModule) -> None:
    """Let go of the bodies that a graph no longer runs."""
    reads = (n for n in gm.graph.nodes if n.op in ("get_attr", "call_module"))
    read = {str(node.target).partition(".")[0] for node in reads}
    for name, _ in list(gm.named_children()):
        if name not in read:
            delattr(gm, name)


def _place(gm: GraphModule, call: Call) -> None:
    """Put a block in the module that all nodes in it are in; drop a block without any.

    Export puts it where the mode was switched before, which may be inside an evaluation.
    """
    module = call.node.all_input_nodes[0]
    call.node.prepend(module)  # together, or unflattening would take them for two calls
    inside = [n for n in call.bodies[0].module.graph.nodes if n.op == "call_function"]
    if not inside and not call.node.users:
        gm.graph.erase_node(call.node)
        gm.graph.erase_node(module)
        return
    stacks = [n.meta.get("nn_module_stack", {}).items() for n in inside]
    if not any(stacks):
        return
    shared = takewhile(lambda modules: len(set(modules)) == 1, zip(*stacks, strict=False))
    module.meta["nn_module_stack"] = dict(modules[0] for modules in shared)
    call.node.meta["nn_module_stack"] = dict(module.meta["nn_module_stack"])
