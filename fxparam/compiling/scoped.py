"""Compiled models whose calls are in a scope: ``fxparam.compile(model, scope=...)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.nn import Module

from fxparam.scopes.frozen import FrozenValues, frozen_call
from fxparam.scopes.models import adopt_models
from fxparam.scopes.region import cached

__all__ = ["SCOPES", "in_scope"]


class _Call:
    """Each call is a region."""

    def __call__(self) -> AbstractContextManager[None]:
        return cached()


class _Frozen:
    """Values outlive the calls."""

    def __init__(self) -> None:
        self._values = FrozenValues()

    def __call__(self) -> AbstractContextManager[None]:
        return frozen_call(self._values)


#: For each scope longer than a graph, what makes it: returns the context of one call.
SCOPES: dict[str, Callable[[], Callable[[], AbstractContextManager[None]]]] = {
    "call": _Call,
    "frozen": _Frozen,
}


def in_scope(compiled: Any, scope: str, models: tuple[Module, ...]) -> Any:
    """Put the calls of what ``torch.compile`` has returned in a scope.

    Args:
        compiled: a compiled module or function.
        scope: a key of :data:`SCOPES`.
        models: modules whose parametrizations are made ours.
    """
    adopt_models(models)
    context = SCOPES[scope]()
    if isinstance(compiled, Module):
        model: Any = compiled._orig_mod
        return type(compiled)(model, _InScope(compiled.dynamo_ctx, context))
    return _calls_in(context, compiled)


class _InScope:
    """Compiles the ``__call__`` of a module, for calls in a scope.

    torch keeps it with the compiled module, and makes copies of the module with copies of it.
    """

    def __init__(self, compiler: Any, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._compiler, self._context = compiler, context

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _calls_in(self._context, self._compiler(function))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_compiler":  # copies ask before there is one
            raise AttributeError(name)
        return getattr(self._compiler, name)


def _calls_in(
    context: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return call
