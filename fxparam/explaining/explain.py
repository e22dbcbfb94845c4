"""``fxparam.explain``: run a model's capture and the passes, and say what happened."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fxparam._torch.dynamo import breaks_counted
from fxparam._torch.inductor import generated_code
from fxparam._torch.names import tree_flatten
from fxparam.compiling.entry import compile as compile_in_scope
from fxparam.compiling.scoped import SCOPES
from fxparam.eager.rollback import unchanged
from fxparam.explaining.example import Example, run
from fxparam.explaining.explanation import Explanation
from fxparam.explaining.generated import extern_calls
from fxparam.explaining.recorder import Recorder
from fxparam.scopes.models import adopt_models

__all__ = ["explain"]


def explain(
    model: Callable[..., Any],
    *args: Any,
    scope: str = "graph",
    inductor: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Say what ``torch.compile(model, backend="fxparam")`` does to a model.

    The model is captured and called once. Parameters, buffers and the random state are as before
    afterwards, of a module, and of modules that a function holds or is given. All compiled code
    is forgotten, as by ``torch._dynamo.explain``, and is compiled anew when it is called next.

    Args:
        model: a module or function.
        *args: what it is called with.
        scope: ``"graph"``, ``"call"`` or ``"frozen"``, as for :func:`fxparam.compile`.
        inductor: let Inductor compile it, forward and backward, to know which ops it calls and does
            not generate. It takes as long as the first call of the compiled model.
        **kwargs: what it is called with. To give the model a keyword ``scope`` or ``inductor``,
            explain a ``functools.partial`` of it.

    Returns:
        What was captured, shared and refused, and what to change.

    Raises:
        ValueError: there is no such scope.
        TypeError: ``model`` is not callable, or a function without modules that is given a longer
            scope.

    >>> import torch
    >>> from torch.nn.utils.parametrizations import weight_norm
    >>> layer = weight_norm(torch.nn.Linear(2, 2))
    >>> explanation = explain(lambda x: layer(layer(x)), torch.ones(1, 2))
    >>> [(each.name, each.runs_before, each.runs) for each in explanation.tensors]
    [('layer.weight', 2, 1)]
    """
    generated: list[str] = []
    leaves = tree_flatten((args, kwargs))[0]
    inputs = [x for x in leaves if isinstance(x, Tensor)]
    roots = (*_modules_of(model), *(x for x in leaves if isinstance(x, nn.Module)))
    if scope in SCOPES:
        adopt_models(roots)  # for good, hence not undone below
    with ExitStack() as stack:
        if inductor:
            generated = stack.enter_context(generated_code())
        stack.enter_context(_as_before(roots, inputs))
        before = breaks_counted()
        recorder = Recorder("inductor" if inductor else "eager")
        models = () if isinstance(model, nn.Module) or scope not in SCOPES else roots
        compiled = compile_in_scope(model, scope=scope, models=models, backend=recorder)
        if inductor:
            trained = {id(x): x for x in (*_parameters(roots), *inputs) if x.requires_grad}
            run(Example(model, args, kwargs), compiled, list(trained.values()))
        else:
            compiled(*args, **kwargs)
        breaks = [reason for reason, n in breaks_counted().items() if n > before.get(reason, 0)]
    calls = extern_calls(generated) if inductor else None
    return recorder.explanation(scope, roots, isinstance(model, nn.Module), breaks, calls)


def _modules_of(model: Any) -> Iterator[nn.Module]:
    """Yield the modules that a model is, is bound to, or holds as a function does."""
    held: list[Any] = []
    if isinstance(model, nn.Module):
        held = [model]
    elif isinstance(model, partial):
        for each in (model.func, *model.args, *model.keywords.values()):
            yield from _modules_of(each)
    elif isinstance(model, FunctionType):
        around = inspect.getclosurevars(model)
        held = [*around.nonlocals.values(), *around.globals.values()]
    else:
        owner = model.__self__ if isinstance(model, MethodType) else model
        held = [owner, *getattr(owner, "__dict__", {}).values()]
    yield from (each for each in held if isinstance(each, nn.Module))


def _parameters(roots: Sequence[nn.Module]) -> Iterator[Tensor]:
    for root in roots:
        yield from root.parameters()


@contextmanager
def _as_before(roots: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Iterator[None]:
    """Run a block that calls a model, and leave no trace of it."""
    torch.compiler.reset()
    gradients = [(x, x.grad) for x in (*_parameters(roots), *inputs) if x.is_leaf]
    try:
        with torch.random.fork_rng(), unchanged(*roots):
            yield
    finally:
        for tensor, gradient in gradients:
            tensor.grad = gradient
        torch.compiler.reset()
