"""A model and its example inputs, by the name of a function that makes them."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxparam._torch.names import tree_flatten
from fxparam.eager.describe import spelled

__all__ = ["Example", "ExampleError", "example_from", "factory_at", "run"]


class ExampleError(ValueError):
    """No model and inputs are to be had; the message is one line for a command's user."""


@dataclass(frozen=True)
class Example:
    """A model, and what it is called with.

    Attributes:
        model: a module or function.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def factory_at(target: str) -> Callable[[], Example]:
    """Return the function ``package.module:function`` as one that makes examples.

    Args:
        target: the function returns a model and its inputs: ``(model, x)``, ``(model, (x, y))``,
            ``(model, {"x": x})`` or ``(model, (x,), {"mask": mask})``.

    Raises:
        ExampleError: there is no such function.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise ExampleError(f"{target!r} is not package.module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ExampleError(f"cannot import {module_name!r}: {_line(error)}") from error
    factory: Any = module
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        found = "nothing" if factory is None else spelled(factory)
        raise ExampleError(f"{module_name!r} has no function {name!r}: found {found}")

    def make() -> Example:
        try:
            made = factory()
        except (Exception, SystemExit) as error:
            raise ExampleError(f"{target} failed: {_line(error)}") from error
        return example_from(made, target)

    return make


def example_from(made: Any, source: str) -> Example:
    """Return what a factory has made as an example.

    Args:
        made: a model and its inputs, as :func:`factory_at` says.
        source: what the factory is called in an error.

    Raises:
        ExampleError: it is something else.
    """
    match made:
        case (model, tuple(args), Mapping() as kwargs) if callable(model) and _are_names(kwargs):
            return Example(model, args, dict(kwargs))
        case (model, Mapping() as kwargs) if callable(model) and _are_names(kwargs):
            return Example(model, (), dict(kwargs))
        case (model, tuple(args)) if callable(model):
            return Example(model, args)
        case (model, args) if callable(model):
            return Example(model, (args,))
    found = f"a tuple of {len(made)}" if isinstance(made, tuple) else spelled(made)
    raise ExampleError(f"{source} must return a model and its inputs, (model, x): found {found}")


def run(
    example: Example, compiled: Callable[..., Any], trained: Sequence[torch.Tensor] = ()
) -> None:
    """Call a compiled model with an example's inputs, and go backward if it has gradients.

    Args:
        example: the inputs.
        compiled: the model.
        trained: tensors whose gradients are computed and dropped. Without any, gradients are added
            to those of all tensors that ask for them.
    """
    output = compiled(*example.args, **example.kwargs)
    leaves = [x for x in tree_flatten(output)[0] if isinstance(x, torch.Tensor)]
    losses = [x.abs().sum() for x in leaves if x.requires_grad]
    if losses and trained:
        torch.autograd.grad(losses, trained, allow_unused=True)
    elif losses:
        torch.autograd.backward(losses)


def _are_names(kwargs: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) for name in kwargs)


def _line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0]
