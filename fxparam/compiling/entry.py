"""``fxparam.compile``: ``torch.compile`` with this package's backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from fxparam.compiling.backend import Backend, default
from fxparam.compiling.scoped import SCOPES, in_scope
from fxparam.eager.describe import spelled

__all__ = ["compile"]


def compile(
    model: Callable[..., Any] | None = None,
    *,
    scope: str = "graph",
    models: Iterable[Module] = (),
    backend: Backend = default,
    **kwargs: Any,
) -> Any:
    """``torch.compile(model, backend="fxparam", **kwargs)``, also as a decorator.

    ``scope`` says how long one evaluation of a parametrized tensor is shared:

    - ``"graph"``: by the accesses in one captured graph.
    - ``"call"``: by those in one call, across graph breaks and in the eager code between, as in a
      :func:`fxparam.cached` block around each call. Effects occur once a call.
    - ``"frozen"``: by all calls until an original changes, as in a :func:`fxparam.frozen` block
      around them. What cannot be frozen is shared by one call: where gradients are recorded, and
      where evaluations have effects. A warning says so once. All threads share the values.

    Args:
        model: a module or function; None to get a decorator.
        scope: ``"graph"``, ``"call"`` or ``"frozen"``.
        models: for a scope longer than a graph, the modules whose parametrizations are meant, if
            ``model`` is neither a module nor a method of one. Those that were registered through
            torch are made ours for good, as :func:`fxparam.adopt` does.
        backend: one of :func:`fxparam.backend`'s.
        **kwargs: ``torch.compile``'s own, ``mode=``, ``options=``, ``dynamic=``, ``fullgraph=``
            among them.

    Raises:
        TypeError: ``model`` is not callable, or ``backend`` none of ours; a function is given a
            longer scope without ``models``, or one of these is not a module.
        ValueError: there is no such scope.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.compile.html

    >>> import torch
    >>> model = torch.nn.Linear(2, 2)
    >>> compiled = compile(model, scope="call")  # compiled when first called
    >>> isinstance(compiled, torch.nn.Module)
    True
    """
    if not isinstance(backend, Backend):
        raise TypeError(
            f"fxparam.compile has a backend of its own: got backend={spelled(backend)}.\n"
            "required: none, or one that fxparam.backend(inner=...) has made"
        )
    if scope != "graph" and scope not in list(SCOPES):
        known = ", ".join(map(repr, ("graph", *SCOPES)))
        raise ValueError(f"scope must be one of {known}: got {spelled(scope)}")
    if model is None:
        return partial(compile, scope=scope, models=models, backend=backend, **kwargs)
    if not callable(model):
        raise TypeError(f"model must be a module or a function: got {type(model).__name__}")
    # The name stands for the default in Dynamo's messages and caches.
    chosen = "fxparam" if backend is default else backend
    compiled: Any = torch.compile(model, backend=chosen, **kwargs)
    return compiled if scope == "graph" else in_scope(compiled, scope, _meant(model, models, scope))


def _meant(model: Callable[..., Any], models: Iterable[Module], scope: str) -> tuple[Module, ...]:
    """Return the modules whose parametrizations a scope is about."""
    if inspect.isgeneratorfunction(model):
        raise TypeError(f"a generator cannot have scope={scope!r}: its call ends before it runs")
    owner = model if isinstance(model, Module) else getattr(model, "__self__", None)
    given = (models,) if isinstance(models, Module) else tuple(models)
    meant = (*([owner] if isinstance(owner, Module) else []), *given)
    if not meant:
        raise TypeError(
            f"a function cannot have scope={scope!r} by itself.\n"
            "required: models=, the modules that it reads\n"
            f"found: none, for {spelled(model)}"
        )
    return meant
