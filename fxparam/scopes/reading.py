"""Read parametrized tensors in scopes: in eager code, and in code that Dynamo traces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from fxparam import marks
from fxparam._torch.dynamo import annotate
from fxparam.eager import reading
from fxparam.scopes import held_in_trace, store, under_dynamo

__all__ = ["ScopedReading", "training_modes"]


class ScopedReading(reading.Reading):
    """Reads the value that the region around the code has, and evaluates where there is none."""

    def value(self, chain: Module, name: str) -> Tensor:
        """Return the value of a parametrized tensor, for code that runs."""
        region = (store.step_of(chain) if _is_in_step(chain) else None) or store.current()
        return reading.evaluated(chain, name) if region is None else region.read(chain, name)

    def traced_value(self, chain: Module) -> Tensor:
        """Return the value of a parametrized tensor, for code that Dynamo traces.

        Here it is decided how the tensor is read: in a region that begins in the traced code, be it
        one of torch's, as an evaluation marked as part of it; outside every region, as a plain
        evaluation; in an eager region around, as the value that the graph is given, or else outside
        of the graph.
        """
        in_step = _is_in_step(chain) and not under_dynamo.is_in_transform()
        if under_dynamo.is_open() and not in_step:
            return _marked(chain)
        if not store.active and not in_step:
            return _outside(chain, under_dynamo.torch_region())
        around = _region_around(chain)
        return _given(chain, around) if around else store.read_untraced(chain)

    def found_in_trace(self, name: str) -> bool:
        """Bind the local ``value`` of a traced getter to a value of the region, if it is right."""
        return held_in_trace.lend(name)

    def forget(self, chain: Module) -> None:
        """Drop values of a parametrized tensor, whose originals are about to be assigned."""
        if store.active or _is_in_step(chain):
            store.forget(chain)

    def is_shared(self) -> bool:
        """Check whether other readers may hold the tensor that ``value`` returns."""
        return store.active


reading.use(ScopedReading())


def _is_in_step(chain: Module) -> bool:
    """Check whether an ``accumulate()`` block has the value of a list.

    A list that torch's functions made, on a module of ours, has no such attribute.
    """
    return getattr(chain, "in_step", False)


@store.untraced
def _has_effects_that_no_node_has() -> None:
    """Break the graph after an evaluation that changes Python attributes.

    No node shows that change, so that a shared evaluation in the graph would lose it.
    """


def training_modes(module: Module) -> str:
    """Spell the training modes of a module and its submodules.

    One letter each, ``t`` or ``e``. Not by ``Module.modules()``, which Dynamo does not trace on a
    module that was changed.
    """
    modes = "t" if module.training else "e"
    for child in module._modules.values():
        if child is not None:
            modes += training_modes(child)
    return modes


def _region_around(chain: Module) -> str:
    """Return the mark of the eager region that the graph will run in.

    Empty where the graph cannot be given the region's value.
    """
    # Before the identity is asked for, on which compiled code then depends.
    if under_dynamo.changes() or under_dynamo.is_shared():
        return ""
    return under_dynamo.region_around(id(chain))


def _outside(chain: Module, mark: str) -> Tensor:
    """Return an evaluation outside of our regions.

    Args:
        chain: a ``ParametrizationList``.
        mark: that of the block of torch's own ``cached()`` that the code has entered; or empty.
    """
    if not mark:
        return chain()  # type: ignore[no-any-return]
    if mark == under_dynamo.UNTRACEABLE:
        return store.read_untraced(chain)
    with annotate({marks.REGION: mark}):
        return _marked(chain)


def _given(chain: Module, around: str) -> Tensor:
    """Return an evaluation that the backend takes out of the graph, for the value of the region.

    Args:
        chain: a ``ParametrizationList``.
        around: the mark of the eager region.
    """
    with annotate({marks.REGION: around}):
        value = _marked(chain)
        if under_dynamo.changes():
            under_dynamo.retrace_without(id(chain))
        if value is chain._parameters.get("original"):
            return value
        with annotate({marks.VALUE: under_dynamo.mark_of(id(chain))}):
            return torch.ops.aten.alias.default(value)  # type: ignore[no-any-return]


def _marked(chain: Module) -> Tensor:
    """Return an evaluation whose nodes carry the mark of their own, if marks can tell it apart."""
    mark = under_dynamo.evaluation_of(id(chain), training_modes(chain))
    if not mark:
        return chain()  # type: ignore[no-any-return]
    if mark == under_dynamo.UNTRACEABLE:
        return store.read_untraced(chain)
    before = under_dynamo.assignments(id(chain))
    begun = held_in_trace.begin(id(chain))
    with annotate({marks.EVALUATION: mark}):
        value: Tensor = chain()
    held_in_trace.hold(id(chain), begun)
    if under_dynamo.assignments(id(chain)) != before:
        _has_effects_that_no_node_has()
    return value
