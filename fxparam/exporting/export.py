"""Export with parametrizations inlined, evaluated once, and on request evaluated away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule
from torch.nn import Module
from torch.nn.utils.parametrize import ParametrizationList

from fxparam.eager.adopt import adopt_classes
from fxparam.eager.describe import first_names
from fxparam.exporting.attributes import Attributes
from fxparam.exporting.evaluations import mark_evaluations
from fxparam.exporting.fold import fold
from fxparam.exporting.module_stacks import call_from_root
from fxparam.exporting.old_style import refuse_model
from fxparam.exporting.subclasses import subclass_values, with_plain_values
from fxparam.graph import analyze, hoist
from fxparam.graph.analysis.derived import PARAMETER
from fxparam.graph.analysis.nodes import owner
from fxparam.graph.passes.drop_identities import drop_identities
from fxparam.graph.passes.naming import label
from fxparam.graph.passes.prologue import lift
from fxparam.graph.rules import has_effects
from fxparam.graph.torch_bugs.export_hooks import buffer_hooks_kept
from fxparam.scopes.region import cached
from fxparam.scopes.store import outside_regions

__all__ = ["export", "fold"]


def export(
    model: Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    strict: bool = False,
    fold: bool = False,
) -> ExportedProgram:
    """Export a model with one evaluation of each parametrized tensor, where that is right.

    The program computes what ``torch.export.export``'s computes, with the same signature, buffer
    mutations and dynamic shapes. Evaluations are shared by the rules of sharing, moved out of the
    bodies of loops and put in front. With ``strict=False`` they are traced once where that can be
    shown to be right, so that the time to capture does not grow with the number of accesses.

    Args:
        model: the model, whose parametrizations were registered by fxparam or by torch; not
            changed.
        args: positional arguments of an example call.
        kwargs: keyword arguments of it.
        dynamic_shapes: as in :func:`torch.export.export`.
        strict: capture by Dynamo, as in :func:`torch.export.export`.
        fold: evaluate the parametrizations now: the program holds their values under the names of
            the parametrized tensors, and neither the originals nor the operations. For inference.

    Raises:
        ValueError: with ``fold``, a parametrization has effects or depends on the inputs, or an
            old-style hook computes a tensor; the message names the tensor. Without ``fold``, what
            torch cannot export has parametrizations that return tensor subclasses.
        Exception: what :func:`torch.export.export` raises.

    Source: :func:`torch.export.export`.

    Example:
        >>> import torch
        >>> import fxparam
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3))
        >>> program = fxparam.export(layer, (torch.ones(1, 2),))
        >>> list(program.state_dict)
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
        >>> sorted(fxparam.export(layer, (torch.ones(1, 2),), fold=True).state_dict)
        ['bias', 'weight']
    """
    if fold:
        refuse_model(model)
    options = {"dynamic_shapes": dynamic_shapes, "strict": strict}
    try:
        program = _captured(model, args, kwargs, **options)
    except Exception as error:
        plain = _with_plain_values(model, args, kwargs, fold=fold, error=error)
        program = _captured(plain, args, kwargs, **options)
    _share(program)
    return _fold(program) if fold else program


# The keyword of ``export`` has the function's name.
_fold = fold


def _captured(model: Any, args: Any, kwargs: Any, *, strict: bool, **options: Any) -> Any:
    def capture() -> ExportedProgram:
        with buffer_hooks_kept():
            return torch.export.export(model, args, kwargs, strict=strict, **options)

    with outside_regions():
        if not strict and _has_parametrizations(model):
            with _adopted(model), cached(), Attributes(model) as attributes:
                try:
                    program = capture()
                except Exception:  # not because of sharing, or it is raised again below
                    program = None
            if program is not None and not attributes.changed and _was_right(program.graph_module):
                return program
        try:
            return capture()
        except Exception as error:
            error.add_note(
                "fxparam.export hands model, args, kwargs and dynamic_shapes to torch.export.export"
                " as they are: what it says holds without fxparam too."
            )
            raise


def _with_plain_values(model: Any, args: Any, kwargs: Any, *, fold: bool, error: Exception) -> Any:
    """Return a copy of a model that could not be traced, without values that are subclasses.

    Raises:
        Exception: ``error``, if there are none.
        ValueError: if they are not to be folded, or cannot be.
    """
    values = {}
    if _has_parametrizations(model):
        with outside_regions():
            values = subclass_values(model)
    if not values:
        raise error
    if fold:
        with outside_regions():
            return with_plain_values(model, values, args, kwargs)
    kinds = [f"{name} ({value.kind})" for name, value in values.items()]
    raise ValueError(
        "torch.export.export fails on a model whose parametrizations return tensor subclasses.\n"
        f"required: plain tensors\nfound: {first_names(kinds)}\n"
        "Export with fold=True, which evaluates them beforehand, or let the parametrizations "
        "return plain tensors. What torch said is the cause of this error."
    ) from error


def _has_parametrizations(model: object) -> bool:
    if not isinstance(model, Module):
        return False
    return any(isinstance(module, ParametrizationList) for module in model.modules())


@contextmanager
def _adopted(model: Module) -> Iterator[None]:
    """Let ``cached()`` serve parametrizations that were registered through torch as well."""
    classes = [(module, type(module)) for module in model.modules()]
    adopt_classes(model)
    try:
        yield
    finally:
        for module, cls in classes:
            if type(module) is not cls:
                object.__setattr__(module, "__class__", cls)


def _was_right(gm: GraphModule) -> bool:
    """Check whether each evaluation of a graph traced in ``cached()`` may serve all its accesses.

    ``cached()`` has seen that nothing was written in between and that the modes were the same
    (rules 1, 2 and 4); that evaluations have no effects and that nobody writes to their values is
    seen in the graph (rules 3 and 5).
    """
    for body in gm.modules():
        if not isinstance(body, GraphModule):
            continue
        table = analyze(body)
        for node in body.graph.nodes:
            if owner(node) is None or node.op in ("placeholder", "get_attr"):
                continue
            values = table.of[node].storages - table.of[node].reads
            if has_effects(table, node) or table.written(values) or values & table.escaping:
                return False
    return True


def _share(program: ExportedProgram) -> None:
    """Hoist the graph of a program in place, and name its values."""
    mark_parameters(program, program.graph_module)
    mark_evaluations(program.graph_module)
    drop_identities(program.graph_module)
    hoist(program.graph_module)
    for old, new in label(program.graph_module).items():
        program.graph_signature.replace_all_uses(old, new)
    lifted = lift(program.graph_module)
    call_from_root(program.graph_module, lifted)


def mark_parameters(program: ExportedProgram, gm: GraphModule) -> None:
    """Tell the passes which inputs the signature says are parameters, buffers and constants."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    inputs = gm.graph.find_nodes(op="placeholder")
    for node, spec in zip(inputs, program.graph_signature.input_specs, strict=True):
        if spec.kind in kinds:
            node.meta[PARAMETER] = spec.target
