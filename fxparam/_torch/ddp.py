"""The place where Dynamo splits the graph of a model in ``DistributedDataParallel``.

``DDPOptimizer`` splits a graph by DDP's buckets, so that gradients are reduced while others are
still computed, and gives a backend one part after the other. Sharing needs the whole graph. There
is no public place before the split: a backend is called behind it. The method that splits is
therefore put in a function of ours, once.
"""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.nn import Module
from torch.nn.modules.module import register_module_module_registration_hook

from fxparam._torch.names import lookup

__all__ = [
    "SeesWholeGraphs",
    "backend_behind",
    "is_reducing",
    "outside_split",
    "see_whole_graphs",
    "warn_of_parts",
]

Split = Callable[..., Callable[..., Any]]


class SeesWholeGraphs(Protocol):
    """A backend that is given a graph before it is split."""

    def compile_whole(
        self,
        gm: torch.fx.GraphModule,
        inputs: Sequence[Any],
        split: Split,
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile a graph with ``split``, which calls this backend with its parts."""


def backend_behind(backend: object) -> object:
    """Return the backend that a user has given, without torch's wrappers around it."""
    return _behind(backend)[0]


def _behind(backend: object) -> tuple[object, dict[str, Any]]:
    """Return it, and the ``mode`` and ``options`` that were given to ``torch.compile``."""
    seen: list[object] = []
    given: dict[str, Any] = {}
    while backend is not None and backend not in seen:
        seen.append(backend)
        splitter = getattr(backend, "__self__", None)
        inner = getattr(backend, "_torchdynamo_orig_backend", None)
        if inner is None and hasattr(backend, "compiler_fn"):
            inner, given = backend.compiler_fn, getattr(backend, "kwargs", {})
        inner = inner or getattr(splitter, "backend_compile_fn", None)
        backend = inner or backend
    return seen[-1] if seen else None, given


def is_reducing(module: Module) -> bool:
    """Check whether a module is in one that was given to ``DistributedDataParallel``."""
    return any(module is each for model in _models for each in model.module.modules())


def _note(module: Module, name: str, child: Module | None) -> None:
    """Called for each module that becomes another's: note those that reduce gradients."""
    parallel = sys.modules.get("torch.nn.parallel.distributed")
    if name == "module" and parallel and isinstance(module, parallel.DistributedDataParallel):
        _models.add(module)


_models: WeakSet[Any] = WeakSet()
register_module_module_registration_hook(_note)


def see_whole_graphs(kind: type[SeesWholeGraphs]) -> None:
    """Let backends of a kind have graphs before ``DDPOptimizer`` splits them."""
    splitter = _splitter()
    split = getattr(splitter, "compile_fn", None)
    if split is None or hasattr(split, "of_fxparam"):
        return

    @functools.wraps(split)
    def compile_fn(self: Any, gm: Any, example_inputs: Any, **settings: Any) -> Any:
        backend, given = _behind(self.backend_compile_fn)
        parts = functools.partial(split, self, **settings)
        if isinstance(backend, kind):
            return backend.compile_whole(gm, example_inputs, parts, **given)
        return parts(gm, example_inputs)

    compile_fn.of_fxparam = True  # type: ignore[attr-defined]
    splitter.compile_fn = compile_fn


@functools.cache
def warn_of_parts() -> None:
    """Warn, once, if ranks are at work and this torch has no such place before the split."""
    if not hasattr(getattr(_splitter(), "compile_fn", None), "of_fxparam"):
        warnings.warn(
            "fxparam does not know where this torch splits the graphs of DistributedDataParallel, "
            "and shares evaluations in each part alone.\n"
            "Set torch._dynamo.config.optimize_ddp = False to have whole graphs.",
            stacklevel=2,
        )


def outside_split(compile: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backend for graphs that are no parts of the one that Dynamo is compiling.

    AOTAutograd counts the parts of a graph that was split, forward and backward, and would count
    these as well.
    """

    @functools.wraps(compile)
    def outside(gm: Any, inputs: Any) -> Any:
        context = copy.copy(lookup("torch._guards", "TracingContext").get())
        context.ddp_optimizer_ctx = None
        with lookup("torch._guards", "tracing")(context):
            return compile(gm, inputs)

    return outside


def _splitter() -> Any:
    """Return the class that splits graphs; None for a torch without one, or without distributed."""
    try:
        return lookup("torch._dynamo.backends.distributed", "DDPOptimizer")
    except ImportError:
        return None
