"""Evaluate the parametrizations of an exported program away.

p_cell_parametrizations_weight_original        p_cell_weight
w = f(p_cell_parametrizations_weight_...)  ->  y = linear(x, p_cell_weight)
y = linear(x, w)
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from fxparam._torch.fx import rename
from fxparam.eager.describe import check_kind
from fxparam.exporting.evaluations import (
    IN_A_BODY,
    UNDER_AUTOCAST,
    cannot_fold,
    evaluated_tensor,
    values_of,
)
from fxparam.exporting.mode_blocks import (
    drop_unread_bodies,
    erase_dead,
    pull_evaluations,
    readers,
)
from fxparam.exporting.module_stacks import place_before_users
from fxparam.exporting.old_style import refuse_program
from fxparam.graph import analyze, hoist
from fxparam.graph.analysis.bodies import call_of
from fxparam.graph.analysis.derived import PARAMETER
from fxparam.graph.analysis.nodes import ancestors, modules_around
from fxparam.graph.passes.drop_identities import drop_identities
from fxparam.graph.passes.prologue import subgraph

__all__ = ["fold"]

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


def fold(program: ExportedProgram) -> ExportedProgram:
    """Evaluate the parametrizations of an exported program, now and for good.

    The new program holds the values as plain tensors under the names of the parametrized tensors
    (``cell.weight``), and no trace of how they were computed. It gives the same outputs; values ask
    for a gradient where an original does, but training them does not train the originals.

    Args:
        program: from :func:`torch.export.export` or :func:`fxparam.export`, decomposed or not;
            not changed. Its nodes must carry ``nn_module_stack``, as export leaves it.

    Returns:
        A new program, with the state dict's other tensors shared.

    Raises:
        TypeError: ``program`` is no exported program.
        ValueError: a parametrization draws random numbers, writes (spectral norm in training
            does), depends on the program's inputs or on what the program writes, or stays in a
            body that may not run, or that reads an original of it; or it is no parametrization that
            computes a tensor, but old-style weight norm or spectral norm. The message names the
            tensor.
            Decomposed solvers (``orthogonal`` by Cayley's map) check for singular matrices, which
            counts as an effect, and what was a ``no_grad`` block before decomposing does not say
            what evaluates in it: fold first.

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
    check_kind("program", program, ExportedProgram, "fxparam.export makes one of a model.")
    refuse_program(program)
    signature = program.graph_signature
    gm = _copy_of(program.graph_module)
    specs = dict(zip(gm.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True))
    for node, spec in specs.items():
        if spec.kind in _HELD:
            node.meta[PARAMETER] = spec.target
    pull_evaluations(gm)
    drop_identities(gm)
    hoist(gm)
    outputs = signature.output_specs
    mutations = {s.arg.name: str(s.target) for s in outputs if s.kind in _MUTATIONS}
    values, parts, returned = values_of(gm, mutations)
    held: dict[str, Any] = {**program.state_dict, **program.constants}
    state = dict(program.state_dict)
    computed = ancestors(values) | set(parts)
    for node in returned:
        _copy_for_readers(gm, node, parts)
    for node, tensor in _evaluate(gm, list(values), specs, held).items():
        _put_in_place(gm, specs, state, node, values[node], tensor)
    _name_unchanged(gm, specs, state)
    _drop_originals(gm, specs, computed, set(mutations.values()))
    _refuse_originals_of_bodies(gm, specs)
    place_before_users(gm)
    inputs = [specs[node] for node in gm.graph.find_nodes(op="placeholder")]
    read = {spec.target for spec in inputs}
    gone = {name for name in held if evaluated_tensor(name) is not None and name not in read}
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=ExportGraphSignature(inputs, _outputs(gm, signature)),
        state_dict={k: v for k, v in state.items() if k not in gone},
        range_constraints=program.range_constraints,
        module_call_graph=_without(program.module_call_graph, gone, inputs),
        example_inputs=program.example_inputs,
        constants={k: v for k, v in program.constants.items() if k not in gone},
        verifiers=program.verifiers,
    )


def _copy_of(module: GraphModule) -> GraphModule:
    """Return a copy whose nodes have the same names."""
    gm: GraphModule = copy.deepcopy(module)
    for old, new in zip(module.graph.nodes, gm.graph.nodes, strict=True):
        if new.name != old.name:
            new.name = old.name  # a copy renames `input`, which is a built-in name
    return gm


def _outputs(gm: GraphModule, signature: ExportGraphSignature) -> list[OutputSpec]:
    """The outputs under the names they have now: a value that is returned became an input."""
    returned: Any = gm.graph.output_node().args[0]
    return [
        replace(spec, arg=TensorArgument(value.name))
        if isinstance(spec.arg, TensorArgument)
        else spec
        for value, spec in zip(returned, signature.output_specs, strict=True)
    ]


def _without(
    entries: list[ModuleCallEntry], gone: set[str], inputs: list[InputSpec]
) -> list[ModuleCallEntry]:
    """Return the entries of modules, but for those of the parametrizations that are gone."""
    prefixes = tuple(
        {re.sub(r"(?<![^.])parametrizations\..*", r"parametrizations.", n) for n in gone}
    )
    held = [spec.target for spec in inputs if spec.target is not None]
    return [
        entry
        for entry in entries
        if not f"{entry.fqn}.".startswith(prefixes)
        or any(target.startswith(f"{entry.fqn}.") for target in held)
    ]


def _refuse_originals_of_bodies(gm: GraphModule, specs: dict[Node, InputSpec]) -> None:
    """Raise if the body of a loop or branch still reads an original, or what came out of one does:
    non-strict export says of no node in it whether it evaluates. Export leaves the switches of an
    autocast that has a body in it, between which nothing is evaluated beforehand."""
    table = analyze(gm)
    entry = table.of[next(iter(gm.graph.nodes))].modes
    for node, spec in specs.items():
        tensor = evaluated_tensor(spec.target)
        if tensor is None:
            continue
        for where, reader in readers(gm, node):
            if call_of(where, reader):
                raise cannot_fold(tensor, IN_A_BODY)
            if where is gm and table.of[reader].modes != entry:
                raise cannot_fold(tensor, UNDER_AUTOCAST)


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
    inputs = {spec.target: n for n, spec in specs.items()}
    target, number = name, 0
    while target in state:
        if target in inputs and _is_same(state[target], tensor):
            node.replace_all_uses_with(inputs[target])
            return
        number += 1
        target = f"{name}_{number}"
    anchor = next((n for n in read if specs[n].kind is kind), next(iter(gm.graph.nodes)))
    with gm.graph.inserting_before(anchor):
        placed = gm.graph.placeholder(_input_name(kind, target))
    value = node.meta["val"]
    placed.meta = {"val": value.fake_mode.from_tensor(tensor, static_shapes=True)}
    node.replace_all_uses_with(placed)
    trains = any(getattr(state.get(str(specs[n].target)), "requires_grad", False) for n in read)
    persistent = True if kind is InputKind.BUFFER else None
    specs[placed] = InputSpec(kind, TensorArgument(placed.name), target, persistent)
    state[target] = Parameter(tensor, trains) if kind is InputKind.PARAMETER else tensor


def _input_name(kind: InputKind, target: str) -> str:
    return f"{'p' if kind is InputKind.PARAMETER else 'b'}_{target.replace('.', '_')}"


def _copy_for_readers(gm: GraphModule, node: Node, parts: dict[Node, str]) -> None:
    """Let what reads a value read a copy of it: the caller may write to what is returned."""
    with gm.graph.inserting_after(node):
        copied = gm.graph.call_function(torch.ops.aten.clone.default, (node,))
    copied.meta = {"val": node.meta["val"]}
    if modules := modules_around(node):
        copied.meta["nn_module_stack"] = modules
    node.replace_all_uses_with(copied, lambda user: user is not copied and user not in parts)


def _name_unchanged(gm: GraphModule, specs: dict[Node, InputSpec], state: dict[str, Any]) -> None:
    """Give an original that is the value itself, as nothing is computed from it, its tensor's name.

    Identities and dropout in ``eval()`` leave no node. That the module of the tensor reads the
    original says that it is the value.
    """
    for node, spec in specs.items():
        name = evaluated_tensor(spec.target)
        if name is None or name in state or spec.target not in state:
            continue
        module = name.rpartition(".")[0]
        alone = str(spec.target).endswith(".original")
        if alone and any(_innermost_module(user) == module for _, user in readers(gm, node)):
            rename(node, _input_name(spec.kind, name))
            node.target = node.name
            specs[node] = replace(spec, arg=TensorArgument(node.name), target=name)
            state[name] = state.pop(str(spec.target))


def _innermost_module(node: Node) -> str | None:
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else None


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and torch.equal(one, other)
    )


def _drop_originals(
    gm: GraphModule, specs: dict[Node, InputSpec], computed: set[Node], changed: set[str]
) -> None:
    """Erase the evaluations, and the originals that nothing reads."""
    erase_dead(gm, computed - specs.keys())
    for node in list(specs):
        target = specs[node].target
        original = evaluated_tensor(target) is not None and target not in changed
        if original and not node.users and specs[node].kind in _HELD:
            gm.graph.erase_node(node)
            del specs[node]
    for module in list(gm.modules()):
        if isinstance(module, GraphModule):
            drop_unread_bodies(module)
    gm.graph.lint()
    gm.recompile()
