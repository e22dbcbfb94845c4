"""Compiled models whose calls are in a scope: ``fxparam.compile(model, scope=...)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from fxparam.scopes import store
from fxparam.scopes.frozen import FrozenValues, region_of_call
from fxparam.scopes.models import adopt_models
from fxparam.scopes.region import cached

__all__ = ["SCOPES", "in_scope"]


class _Call:
    """Each call is a region."""

    def __call__(self) -> store.Entered:
        return store.begin()


class _Frozen:
    """Values outlive the calls."""

    def __init__(self) -> None:
        self._values = FrozenValues()

    def __call__(self) -> store.Entered:
        return store.begin_in(region_of_call(self._values))


#: For each scope longer than a graph, what makes it: begins the region of one call.
SCOPES: dict[str, Callable[[], Callable[[], store.Entered]]] = {
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
    begin = SCOPES[scope]()
    if isinstance(compiled, Module):
        model: Any = compiled._orig_mod
        return type(compiled)(model, _InScope(compiled.dynamo_ctx, begin))
    return _calls_in(begin, compiled)


class _InScope:
    """Compiles the ``__call__`` of a module, for calls in a scope.

    torch keeps it with the compiled module, and makes copies of the module with copies of it.
    """

    def __init__(self, compiler: Any, begin: Callable[[], store.Entered]) -> None:
        self._compiler, self._begin = compiler, begin

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _calls_in(self._begin, self._compiler(function))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_compiler":  # copies ask before there is one
            raise AttributeError(name)
        return getattr(self._compiler, name)


def _calls_in(
    begin: Callable[[], store.Entered], function: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # in the graph of a model around
            with cached():
                return function(*args, **kwargs)
        # No context manager of Python's: it would cost as much as to find the values of a call.
        begun = begin()
        try:
            return function(*args, **kwargs)
        finally:
            store.end(begun)

    return call
