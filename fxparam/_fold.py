"""Evaluate the parametrizations of an exported program away.

p_cell_parametrizations_weight_original        p_cell_weight
w = f(p_cell_parametrizations_weight_...)  ->  y = linear(x, p_cell_weight)
y = linear(x, w)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from fxparam.graph import hoist
from fxparam.graph.bodies import call_of
from fxparam.graph.derived import PARAMETER
from fxparam.graph.effects import EffectTable, analyze
from fxparam.graph.evaluations import owner
from fxparam.graph.identities import drop_identities
from fxparam.graph.legality import Rule, has_effects
from fxparam.graph.nodes import body_of, is_view, value_of
from fxparam.graph.prologue import prologue_of, subgraph
from fxparam.graph.schemas import writes_nothing

__all__ = ["fold"]

# ``cell.parametrizations.weight.original0``, or a buffer of a parametrization.
_ORIGINAL = re.compile(r"(.+\.)??parametrizations\.([^.]+)\..+")
_IN_A_BODY = "the body of a loop or branch evaluates it, or reads an original of it"
_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def fold(program: ExportedProgram) -> ExportedProgram:
    """Evaluate the parametrizations of an exported program, now and for good.

    The new program holds the values as plain tensors under the names of the parametrized tensors
    (``cell.weight``), and no trace of how they were computed. It gives the same outputs; training
    it does not train the originals.

    Args:
        program: from :func:`torch.export.export` or :func:`fxparam.export`, decomposed or not;
            not changed. Its nodes must carry ``nn_module_stack``, as export leaves it.

    Returns:
        A new program, with the state dict's other tensors shared.

    Raises:
        ValueError: a parametrization draws random numbers, writes (spectral norm in training
            does), depends on the program's inputs, or stays in a body that may not run, or that
            reads an original of it; the message names the tensor. Decomposed solvers
            (``orthogonal`` by Cayley's map) check for singular matrices, which counts as an
            effect: fold before decomposing.

    Example:
        >>> import torch
        >>> import fxparam
        >>> layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 3))
        >>> program = fxparam.fold(torch.export.export(layer, (torch.ones(1, 3),)))
        >>> sorted(program.state_dict)
        ['bias', 'weight']
        >>> [node.name for node in program.graph.nodes]
        ['p_bias', 'p_weight', 'input', 'linear', 'output']
    """
    gm: GraphModule = copy.deepcopy(program.graph_module)
    signature = program.graph_signature
    for old, new in zip(program.graph.nodes, gm.graph.nodes, strict=True):
        if new.name != old.name:
            new.name = old.name  # a copy renames `input`, which is a built-in name
    _inline_grad_mode_blocks(gm)
    specs = dict(zip(gm.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True))
    for node, spec in specs.items():
        if spec.kind in _HELD:
            node.meta[PARAMETER] = spec.target
    drop_identities(gm)
    hoist(gm)
    values, parts = _values(gm, signature.buffers_to_mutate)
    held: dict[str, Any] = {**program.state_dict, **program.constants}
    state = dict(program.state_dict)
    for node, tensor in _evaluate(gm, list(values), specs, held).items():
        _put_in_place(gm, specs, state, node, values[node], tensor)
    gone = _drop_originals(gm, specs, parts)
    _refuse_originals_of_bodies(gm, specs)
    inputs = [specs[node] for node in gm.graph.find_nodes(op="placeholder")]
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=ExportGraphSignature(inputs, _outputs(gm, signature)),
        state_dict={k: v for k, v in state.items() if k not in gone},
        range_constraints=program.range_constraints,
        module_call_graph=_without(program.module_call_graph, set(values.values()), inputs),
        example_inputs=program.example_inputs,
        constants={k: v for k, v in program.constants.items() if k not in gone},
        verifiers=program.verifiers,
    )


def _outputs(gm: GraphModule, signature: ExportGraphSignature) -> list[OutputSpec]:
    """The outputs under the names they have now: a value that is returned became an input."""
    returned = next(reversed(gm.graph.nodes)).args[0]
    return [
        replace(spec, arg=TensorArgument(value.name))
        if isinstance(spec.arg, TensorArgument)
        else spec
        for value, spec in zip(returned, signature.output_specs, strict=True)
    ]


def _without(
    entries: list[ModuleCallEntry], names: set[str], inputs: list[InputSpec]
) -> list[ModuleCallEntry]:
    """The entries of modules, but for those of the parametrizations that are gone."""
    lists = tuple(_around(name).rpartition("parametrizations.")[0] for name in names)
    prefixes = tuple(f"{path}parametrizations." for path in lists)
    held = [spec.target for spec in inputs if spec.target is not None]
    return [
        entry
        for entry in entries
        if not f"{entry.fqn}.".startswith(prefixes)
        or any(target.startswith(f"{entry.fqn}.") for target in held)
    ]


def _inline_grad_mode_blocks(gm: GraphModule) -> None:
    """Put the bodies of ``no_grad`` blocks that read parametrized tensors into the graph.

    The program is for inference, in which the grad mode changes no value.
    """
    for node in list(gm.graph.nodes):
        if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled":
            continue
        body = body_of(gm, node.args[1])
        assert body is not None
        copies: dict[Node, Any] = dict(
            zip(body.graph.find_nodes(op="placeholder"), node.args[2:], strict=True)
        )
        with gm.graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "get_attr":  # a body in the body
                    name = f"{node.args[1].target}_{inner.target}"
                    gm.add_submodule(name, body.get_submodule(str(inner.target)))
                    copies[inner] = gm.graph.get_attr(name)
                elif inner.op == "call_function":
                    copies[inner] = gm.graph.node_copy(inner, copies.__getitem__)
        returned = next(reversed(body.graph.nodes)).args[0]
        for user in list(node.users):
            user.replace_all_uses_with(copies[returned[user.args[1]]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def _refuse_originals_of_bodies(gm: GraphModule, specs: dict[Node, InputSpec]) -> None:
    """Raise if a body still reads an original: non-strict export says of no node in it whether it
    evaluates."""
    for node, spec in specs.items():
        original = _ORIGINAL.fullmatch(str(spec.target))
        if original is not None and any(call_of(gm, user) for user in node.users):
            raise _refusal((original[1] or "") + original[2], _IN_A_BODY)


def _values(gm: GraphModule, written: Mapping[str, str]) -> tuple[dict[Node, str], dict[Node, str]]:
    """The nodes whose values the rest of the graph reads, with the tensors' names; and all nodes
    of evaluations.

    Raises:
        ValueError: one of them cannot be evaluated beforehand.
    """
    table = analyze(gm)
    first = set(prologue_of(gm, lasting=True, returned=True))
    parts = _parts(gm, first)
    effects = {parts.get(n): rule for n in gm.graph.nodes if (rule := has_effects(table, n))}
    for node, name in parts.items():
        if node.name in written:  # decomposed: what a buffer becomes is an output
            raise _refusal(name, Rule.WRITES.value)
        if node not in first and not _says_nothing(node):
            raise _refusal(name, effects[name].value if name in effects else _why(table, node))
    found = {
        node: name
        for node, name in parts.items()
        if any(parts.get(user) != name for user in node.users)
    }
    for body in gm.modules():
        if isinstance(body, GraphModule) and body is not gm:
            for node in body.graph.nodes:
                site = owner(node)
                if site is not None and site[1] not in found.values():
                    raise _refusal(site[1], _IN_A_BODY)
    return found, parts


def _parts(gm: GraphModule, first: set[Node]) -> dict[Node, str]:
    """The nodes of evaluations, with the names of the parametrized tensors.

    What was moved out of a loop's body has lost its module stack (non-strict export keeps none in
    bodies). It is known by the originals that it is computed from.
    """
    parts: dict[Node, str] = {}
    sources: dict[Node, str] = {}
    for node in gm.graph.nodes:
        site = owner(node)
        if node.op == "placeholder":
            original = _ORIGINAL.fullmatch(str(node.meta.get(PARAMETER)))
            if original is not None:
                sources[node] = (original[1] or "") + original[2]
        elif node.op in ("call_function", "call_method"):
            if site is not None:
                parts[node] = site[1]
            elif node in first:
                names = {sources[n] for n in node.all_input_nodes if n in sources}
                if len(names) == 1:
                    sources[node] = parts[node] = names.pop()
    for node in reversed(list(parts)):
        # A transpose, say, is how the value is used.
        if owner(node) is None and is_view(node) and any(u not in parts for u in node.users):
            del parts[node]
    return parts


def _says_nothing(node: Node) -> bool:
    """A constant that nobody reads, or an assertion on the way to a value."""
    return not node.users and (value_of(node) is not None or writes_nothing(node))


def _why(table: EffectTable, node: Node) -> str:
    effects = table.of[node]
    if table.written(effects.reads):
        return Rule.ORIGINAL_WRITTEN.value
    if table.written(effects.storages):
        return Rule.VALUE_WRITTEN.value
    return "the evaluation depends on the inputs of the program"


def _refusal(name: str, why: str) -> ValueError:
    way_out = "Export the model in eval() mode" if why != _IN_A_BODY else "Read it in front of that"
    return ValueError(
        f"fold evaluates {name} once and for all, which would change the program.\n"
        "required: parametrizations that write nothing, draw no random numbers and depend on "
        f"parameters and buffers alone\nfound: {name}: {why}\n"
        f"{way_out}, or export without fold."
    )


def _evaluate(
    gm: GraphModule, values: list[Node], specs: dict[Node, InputSpec], held: dict[str, Any]
) -> dict[Node, torch.Tensor]:
    graph, read = subgraph(gm.graph, values)
    with torch.no_grad():
        tensors = GraphModule(gm, graph)(*(held[str(specs[node].target)] for node in read))
    # Copies: a value may be a view of an original, or two values of one storage.
    return {node: tensor.detach().clone() for node, tensor in zip(values, tensors, strict=True)}


def _put_in_place(
    gm: GraphModule,
    specs: dict[Node, InputSpec],
    state: dict[str, Any],
    node: Node,
    name: str,
    tensor: torch.Tensor,
) -> None:
    """Read ``tensor`` as an input of the program where ``node`` was read."""
    _, read = subgraph(gm.graph, [node])
    kinds = [specs[n].kind for n in read]
    kind = InputKind.PARAMETER if InputKind.PARAMETER in kinds else InputKind.BUFFER
    target, number = name, 0
    while target in state:
        if _is_same(state[target], tensor):
            twin = next(n for n, spec in specs.items() if spec.target == target)
            node.replace_all_uses_with(twin)
            return
        number += 1
        target = f"{name}_{number}"
    anchor = next((n for n in read if specs[n].kind is kind), next(iter(gm.graph.nodes)))
    with gm.graph.inserting_before(anchor):
        prefix = "p" if kind is InputKind.PARAMETER else "b"
        placed = gm.graph.placeholder(f"{prefix}_{target.replace('.', '_')}")
    value = node.meta["val"]
    placed.meta = {"val": value.fake_mode.from_tensor(tensor, static_shapes=True)}
    node.replace_all_uses_with(placed)
    persistent = True if kind is InputKind.BUFFER else None
    specs[placed] = InputSpec(kind, TensorArgument(placed.name), target, persistent)
    trains = tensor.is_floating_point() or tensor.is_complex()
    state[target] = Parameter(tensor, trains) if kind is InputKind.PARAMETER else tensor


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and torch.equal(one, other)
    )


def _around(name: str) -> str:
    """Prefix of the names of what a tensor is computed from and by."""
    path, _, tensor = name.rpartition(".")
    return f"{path}.parametrizations.{tensor}." if path else f"parametrizations.{tensor}."


def _drop_originals(
    gm: GraphModule, specs: dict[Node, InputSpec], parts: dict[Node, str]
) -> set[str]:
    """Erase the evaluations and the inputs that they alone read; the names of those inputs."""
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and (node.op == "get_attr" or node in parts):
            gm.graph.erase_node(node)
    names = set(parts.values())
    gone: set[str] = set()
    for node in list(specs):
        target = specs[node].target
        if target is None or node.users or not any(map(target.startswith, map(_around, names))):
            continue
        gone.add(target)
        gm.graph.erase_node(node)
        del specs[node]
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    for name, _ in list(gm.named_children()):
        if name not in read:
            delattr(gm, name)
    gm.graph.lint()
    gm.recompile()
    return gone
