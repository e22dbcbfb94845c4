"""``cached()``: one evaluation of a parametrized tensor for all reads in a block.

In eager code the block's values are held in the :mod:`~fxparam.scopes.store`. In code that is
compiled for this package's backend the block marks the nodes traced in it, and the backend shares
marked evaluations (:mod:`~fxparam.scopes.under_dynamo` says why).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import Module

from fxparam import marks
from fxparam._torch.dynamo import annotate
from fxparam.scopes import store, under_dynamo
from fxparam.scopes.models import adopt_models

__all__ = ["cached"]


@under_dynamo.constant
def _new_region() -> str:
    """Return the mark of a region that begins in traced code; empty where marks do not do."""
    return under_dynamo.region(inspect.unwrap(cached).__code__)


@store.untraced
def _out_of_order() -> None:
    """Break the graph where regions do not end in the order they began, as marks are a stack.

    ``test_what_marks_cannot_tell_is_left_to_eager_code`` has such regions.
    """


_adopt = store.untraced(adopt_models)  # which Dynamo cannot trace


@contextmanager
def cached(*models: Module) -> Iterator[None]:
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

    torch's own ``parametrize.cached()`` is such a region for what is registered with fxparam or
    adopted. The other way round, tensors that are registered with torch alone are evaluated at each
    access in this region, unless their model is given.

    Args:
        models: modules whose parametrizations, registered through torch, are made ours for good, as
            :func:`fxparam.adopt` does; old-style hooks are left alone. None is needed for what is
            ours already. In compiled code this leaves the graph.

    Raises:
        TypeError: if one of ``models`` is not a module.
        RuntimeError: on reading a parametrized tensor while ``torch.jit.trace`` runs inside the
            region.

    Source: :func:`torch.nn.utils.parametrize.cached`, whose values can be stale where these cannot.

    Note:
        Changes that torch does not count are not noticed: writes through ``tensor.data``, NumPy or
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
    if models:
        _adopt(models)
    # Constant while Dynamo traces, which follows one of the two.
    mark = _new_region() if torch.compiler.is_dynamo_compiling() else ""
    if mark and store.active:
        yield  # the region around the graph is the outermost
        return
    if mark:
        with annotate({marks.REGION: mark}):
            yield
            if not under_dynamo.is_innermost(mark):
                _out_of_order()
        return
    entered = store.enter()
    try:
        yield
    finally:
        store.leave(entered)
