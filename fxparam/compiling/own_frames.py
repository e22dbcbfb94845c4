"""Leave this package's own frames to eager code, as Dynamo leaves torch's.

After a graph break Dynamo compiles the functions that eager code calls, one by one. Those by which
a parametrized tensor is read and assigned serve every module and every name: compiled by
themselves they would break the graph again, be compiled anew for each module, and run into
``recompile_limit``. Where they are called in traced code, Dynamo inlines them as before.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import Any

from fxparam import _torch, eager, scopes
from fxparam._torch.dynamo import skip_frames_of

__all__ = ["leave_own_frames_to_eager_code", "own_codes"]


def leave_own_frames_to_eager_code() -> None:
    """Let Dynamo compile no function by itself that reads or assigns parametrized tensors."""
    for code in own_codes():
        skip_frames_of(code)


def own_codes() -> Iterator[CodeType]:
    """Yield the code of each function in the packages that run where a model's own code does."""
    for package in (_torch, eager, scopes):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = import_module(found.name)
            for function in _functions(vars(module).values(), module):
                yield from _nested(function.__code__)


def _functions(values: Iterable[Any], module: ModuleType) -> Iterator[FunctionType]:
    """Yield the functions among values, and those of classes among them, that a module defines."""
    for value in values:
        if isinstance(value, type):
            if value.__module__.startswith("fxparam."):
                yield from _functions(vars(value).values(), module)
            continue
        accessors: tuple[Any, ...] = (value,)
        if isinstance(value, property):
            accessors = value.fget, value.fset
        for accessor in accessors:
            function = inspect.unwrap(getattr(accessor, "__func__", accessor))
            own = isinstance(function, FunctionType)
            if own and function.__code__.co_filename == module.__file__:
                yield function


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of the functions made in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
