"""How long one evaluation of a parametrized tensor is shared at run time.

:func:`cached` opens a region in which every parametrized tensor is evaluated once and then handed
out again, as long as that value is still the one a new evaluation would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Module

from fxparam import _context, _private, _static
from fxparam._ambient import ambient
from fxparam._stamp import Entry, Snapshot
from fxparam.graph.marks import EVALUATION, REGION, VALUE

__all__ = ["cached", "evaluate", "forget", "read", "training_modes"]

# Values kept of one tensor in one region: for other modes, and for other originals, which
# functional_call may put in place without end. The oldest goes first.
_KEPT = 8

F = TypeVar("F", bound=Callable[..., object])


def _untraced(function: F) -> F:
    """Let compiled code leave its graph for ``function``, which Dynamo cannot trace."""
    reason = "the values of a fxparam.cached() region are kept outside compiled graphs"
    return cast("F", torch.compiler.disable(function, reason=reason))  # type: ignore[no-untyped-call]


@_untraced
def _enter() -> tuple[_context.Region, object]:
    region = _context.current()
    token = None
    if region is None:
        region = _context.Region()
        token = _context.region_variable.set(region)
    region.enter()
    return region, token


@_untraced
def _leave(entered: tuple[_context.Region, object]) -> None:
    region, token = entered
    region.leave()
    if token is not None:
        # A generator may be closed in another context than it ran in. That context never saw this
        # region, and the region, left, is not usable any more.
        with suppress(ValueError):
            _context.region_variable.reset(token)  # type: ignore[arg-type]


@_untraced
def _out_of_order() -> None:
    """Regions that do not end in the order they began leave the graph: marks are a stack."""


@contextmanager
def cached() -> Iterator[None]:
    """Share the value of every parametrized tensor in a ``with`` block (or decorated function).

    The first access evaluates; later ones get the same tensor object. A value is handed out again
    only while a new evaluation would give the same: for the same original tensors (by identity),
    none of them and no tensor that the parametrizations hold written since, the value itself not
    written either, the parametrizations in the same training mode, and under the same grad,
    inference and autocast modes, default dtype and device. Otherwise the tensor is evaluated anew.
    Parametrizations with effects (a power iteration, a random mask) thus have them once a region.

    A region belongs to one thread of execution: other threads neither see its values nor clear
    them, and an asyncio task has the region of the code that started it. Regions nest: values live
    until the outermost ends, also by an exception. A checkpointed function called in a region
    evaluates at each access, unless a region is in it: it runs again in backward. Shapes and
    dtypes are those of ``module.<name>`` outside a region.

    Raises:
        RuntimeError: on reading a parametrized tensor while ``torch.jit.trace`` runs inside the
        region.

    Source: :func:`torch.nn.utils.parametrize.cached`, whose values can be stale where these cannot.

    Note:
        What torch keeps no count of is not noticed: writes through ``tensor.data``, NumPy or
        DLPack, by fused optimizers (``fused=True``), and by batch norm to its running statistics;
        nor are changes of a parametrization's Python attributes, hooks and ``forward``, and writes
        to tensors that it finds by a global name or in an object other than containers, modules and
        functions. (Code compiled by fxparam's backend does notice, in its graph, writes through
        ``tensor.data`` and whatever makes an evaluation another computation. There a
        parametrization that changes numbers or flags among its own attributes leaves the graph;
        what it appends to a list it appends at each access.)
        Inference tensors have no version counter: originals that are inference tensors are
        evaluated at each access, and a value read in inference mode must not be written in place.

    Example:
        >>> import torch
        >>> import fxparam
        >>> class Double(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> layer = fxparam.register_parametrization(torch.nn.Linear(2, 2), "weight", Double())
        >>> layer.weight is layer.weight
        False
        >>> with fxparam.cached():
        ...     print(layer.weight is layer.weight)
        True
    """
    # Constant while Dynamo traces, which follows one of the two.
    mark = _static.region() if torch.compiler.is_dynamo_compiling() else ""
    if mark and _context.active:
        yield  # the region around the graph is the outermost
        return
    if mark:
        with _private.annotate({REGION: mark}):
            yield
            if not _static.is_innermost(mark):
                _out_of_order()
        return
    entered = _enter()
    try:
        yield
    finally:
        _leave(entered)


def _key(snapshot: Snapshot, modes: tuple[object, ...]) -> tuple[object, ...]:
    """Under what a value is kept: originals and modes by identity, which its entry keeps alive."""
    return (ambient(), tuple(map(id, modes)), tuple(map(id, snapshot.objects)))


@_untraced
def read(chain: Module) -> Tensor:
    """The value of ``chain`` in the current region: one that is still right, or a new one.

    Args:
        chain: a ``ParametrizationList``.

    Raises:
        RuntimeError: while ``torch.jit.trace`` runs, whose graph would hold the value as a
        constant.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "Cannot trace a model while caching parametrizations: a traced graph would hold the "
            "cached value as a constant.\n"
            "required: torch.jit.trace outside of fxparam.cached()\n"
            "found: torch.jit.trace inside of it"
        )
    region = _context.current()
    if region is None:
        return chain()  # type: ignore[no-any-return]
    now, modes = Snapshot(chain), _private.active_modes()
    entries = region.entries.setdefault(_private.behind_proxy(chain), {})
    key = _key(now, modes)
    entry = entries.get(key)
    if entry is not None and entry.holds(now):
        return entry.value
    value: Tensor = chain()
    # Taken after the evaluation: what the chain writes itself (spectral norm's vectors) does not
    # make its value stale.
    now = Snapshot(chain)
    entry = Entry.of(value, now, modes)
    entries.pop(key, None)
    if entry is not None:
        entries[_key(now, modes)] = entry
        if len(entries) > _KEPT:
            del entries[next(iter(entries))]
    return value


@_untraced
def _has_effects_that_no_node_has() -> None:
    """An evaluation that changes Python attributes leaves the graph: each read does it there."""


def training_modes(module: Module) -> str:
    """The training modes of a module and its submodules.

    Not by ``Module.modules()``, which Dynamo does not trace on a module that was changed.
    """
    modes = "t" if module.training else "e"
    for child in module._modules.values():
        if child is not None:
            modes += training_modes(child)
    return modes


def evaluate(chain: Module) -> Tensor:
    """The value of ``chain`` while Dynamo traces: marked as one evaluation where a region is."""
    if _static.is_open():
        return _marked(chain)
    if not _context.active:
        return chain()  # type: ignore[no-any-return]
    # Before the identity is asked for, on which compiled code then depends.
    around = "" if _static.changes() or _static.is_shared() else _static.region_around(id(chain))
    if not around:
        return read(chain)
    with _private.annotate({REGION: around}):
        value = _marked(chain)
        if _static.changes():
            _static.retrace_without(id(chain))
        if value is chain._parameters.get("original"):
            return value
        with _private.annotate({VALUE: _static.mark_of(id(chain))}):
            return torch.ops.aten.alias.default(value)  # type: ignore[no-any-return]


def _marked(chain: Module) -> Tensor:
    mark = _static.evaluation_of(id(chain), training_modes(chain))
    if not mark:
        return chain()  # type: ignore[no-any-return]
    if mark == _static.UNTRACEABLE:
        return read(chain)
    before = _static.assignments(id(chain))
    with _private.annotate({EVALUATION: mark}):
        value: Tensor = chain()
    if _static.assignments(id(chain)) != before:
        _has_effects_that_no_node_has()
    return value


@_untraced
def forget(chain: Module) -> None:
    """Drop the current region's values of ``chain``, whose originals are about to be assigned."""
    region = _context.current()
    if region is not None:
        region.entries.pop(_private.behind_proxy(chain), None)
