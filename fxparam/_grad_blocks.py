"""Evaluations in the grad mode blocks of an exported program, moved in front of the blocks.

    y = block(False, body, x, p)              w = f(p)
      body(x, p): w = f(p); ...       ->      y = block(False, body, x, w)
                                                body(x, w): ...

The grad mode changes no value, and a value that is folded passes no gradient on. What stays in a
block, and what came out of it, still asks for none.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxparam._parts import parts_of
from fxparam.graph import hoist
from fxparam.graph.bodies import Call, call_of
from fxparam.graph.derived import PARAMETER, derive, is_parameter
from fxparam.graph.evaluations import modules_around
from fxparam.graph.nodes import ancestors, attribute_of
from fxparam.graph.prologue import prologue_of

__all__ = ["pull_evaluations", "readers"]

_BLOCK = "wrap_with_set_grad_enabled"


def readers(gm: GraphModule, node: Node) -> Iterator[tuple[GraphModule, Node]]:
    """The nodes that read a node, those in grad mode blocks among them, with their graphs."""
    for user in node.users:
        call = call_of(gm, user)
        if call is None or call.op != _BLOCK:
            yield gm, user
            continue
        for placeholder, operand in zip(call.bodies[0].placeholders, call.operands, strict=True):
            if operand is node:
                yield from readers(call.bodies[0].module, placeholder)


def pull_evaluations(gm: GraphModule) -> None:
    """Move what evaluates out of the grad mode blocks of a graph, and of those in them.

    What has effects, or depends on what has, stays inside.
    """
    for node in list(gm.graph.nodes):
        call = call_of(gm, node)
        if call is None or call.op != _BLOCK:
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
        if values:
            copies = _copy_before(gm, call, values)
            _return_no_more(gm, call, copies)
            _enter(gm, call, values, copies)


def _copy_before(gm: GraphModule, call: Call, values: list[Node]) -> dict[Node, Any]:
    """Evaluate nodes of a block in front of it."""
    body = call.bodies[0]
    copies: dict[Node, Any] = dict(zip(body.placeholders, call.operands, strict=True))
    needed = ancestors(values)
    with gm.graph.inserting_before(call.node):
        for node in body.module.graph.nodes:
            if node in needed and node not in copies:
                copies[node] = gm.graph.node_copy(node, copies.__getitem__)
                if node.op == "get_attr":
                    _hold(gm, copies[node], attribute_of(body.module, node))
    return copies


def _hold(gm: GraphModule, node: Node, value: Any) -> None:
    """Let a graph module hold what a node, copied from a body, reads there."""
    node.target = f"_pulled_{node.name}"
    if isinstance(value, torch.Tensor):
        gm.register_buffer(node.target, value, persistent=False)
    else:
        gm.add_submodule(node.target, value)


def _return_no_more(gm: GraphModule, call: Call, copies: dict[Node, Any]) -> None:
    """Read what a block returns of its values from their copies in front of it."""
    output = call.bodies[0].module.graph.output_node()
    returned: Any = output.args[0]
    kept = [i for i, node in enumerate(returned) if node not in copies or node.op == "placeholder"]
    for user in list(call.node.users):
        index: Any = user.args[1]
        if index in kept:
            user.args = (call.node, kept.index(index))
            continue
        with gm.graph.inserting_before(call.node):
            copy = copies[returned[index]]
            read = gm.graph.call_function(torch.ops.aten.detach.default, (copy,))
        read.meta = {**user.meta, "nn_module_stack": modules_around(user)}
        user.replace_all_uses_with(read)
        gm.graph.erase_node(user)
    output.args = (tuple(returned[i] for i in kept),)
    call.node.meta["val"] = tuple(call.node.meta["val"][i] for i in kept)


def _enter(gm: GraphModule, call: Call, values: list[Node], copies: dict[Node, Any]) -> None:
    """Read values in a block as operands, and drop what nothing reads any more."""
    graph = call.bodies[0].module.graph
    placeholders = call.bodies[0].placeholders
    for node in values:
        after = placeholders[-1:]
        with graph.inserting_after(after[0]) if after else graph.inserting_before():
            placeholders.append(graph.placeholder(node.name))
        placeholders[-1].target = placeholders[-1].name  # an argument's name, which is its own
        placeholders[-1].meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(placeholders[-1])
    for node in reversed(copies):
        if node.op != "placeholder" and not node.users:
            graph.erase_node(node)
    operands = (*call.operands, *(copies[node] for node in values))
    kept = [(v, p) for v, p in zip(operands, placeholders, strict=True) if p.users]
    call.set_operands([operand for operand, _ in kept])
    for placeholder in placeholders:
        if not placeholder.users:
            graph.erase_node(placeholder)
    call.bodies[0].module.recompile()
    _place(gm, call)


def _place(gm: GraphModule, call: Call) -> None:
    """Put a block in the module that all nodes in it are in; drop a block without any."""
    module: Any = call.node.args[1]
    call.node.prepend(module)  # together, or unflattening would take them for two calls
    inside = [n for n in call.bodies[0].module.graph.nodes if n.op == "call_function"]
    if not inside and not call.node.users:
        gm.graph.erase_node(call.node)
        gm.graph.erase_node(module)
        return
    stacks = (n.meta.get("nn_module_stack", {}).items() for n in inside)
    shared = takewhile(lambda modules: len(set(modules)) == 1, zip(*stacks, strict=False))
    module.meta["nn_module_stack"] = dict(modules[0] for modules in shared)
    call.node.meta["nn_module_stack"] = dict(module.meta["nn_module_stack"])
