"""Inductor, configured as ``torch.compile`` configures it, with graph passes of ours."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from fxparam._torch.names import functorch_config, lookup

__all__ = ["generated_code", "inductor_with"]

_inductor_wrapper = lookup("torch", "_TorchCompileInductorWrapper")


@contextmanager
def generated_code() -> Iterator[list[str]]:
    """Collect the Python modules that Inductor generates in the block, one for each graph.

    Nothing is taken from Inductor's caches in the block: what comes from there is not generated.
    """
    graph = lookup("torch._inductor.graph", "GraphLowering")
    modules: list[str] = []
    with (
        mock.patch.object(graph, "save_output_code", modules.append),
        _inductor_config().patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch_config().patch(enable_autograd_cache=False),
    ):
        yield modules


def inductor_with(
    mode: str | None, options: dict[str, Any] | None, **passes: Callable[[Any], None]
) -> Any:
    """Return Inductor as a backend, configured as ``torch.compile(mode=, options=)`` does it.

    ``torch.compile`` hands ``mode`` and ``options`` to any other backend as they are. Only its
    wrapper of Inductor checks them and knows what they mean.

    Args:
        mode: as in ``torch.compile``.
        options: as in ``torch.compile``.
        passes: functions of a graph, each under the name of the Inductor option that takes such a
            pass (``joint_custom_pre_pass``). A pass that the user has set there runs before.
    """
    inductor = _inductor_wrapper(mode, options, None)
    for name, function in passes.items():
        users = inductor.config.get(name, getattr(_inductor_config(), name))
        # Inductor takes one pass, a list of them in newer versions.
        before = users if isinstance(users, (list, tuple)) else [users] if users else []
        inductor.config[name] = _graph_pass(tuple(before), function)
    return inductor


def _inductor_config() -> Any:
    return importlib.import_module("torch._inductor.config")


@functools.cache
def _graph_pass(before: tuple[Any, ...], function: Callable[[Any], None]) -> Any:
    """Return Inductor's graph pass that runs the passes ``before`` and then a function.

    Its class is made here and not at import, as its base class is slow to import.
    """
    base = lookup("torch._inductor.custom_graph_pass", "CustomGraphPass")
    hash_files = lookup("torch._inductor.custom_graph_pass", "get_hash_for_files")
    package = Path(__file__).parents[1]
    files = (file for folder in ("_torch", "graph") for file in (package / folder).rglob("*.py"))
    sources = tuple(map(str, sorted(files)))
    # Passes that are told whether the graph is one of inference: newer versions have them.
    told: Any = getattr(sys.modules[base.__module__], "CustomInferenceAwareGraphPass", ())

    def call(self: Any, graph: Any, **modes: Any) -> None:
        for each in before:
            each(graph, **(modes if isinstance(each, told) else {}))
        function(graph)

    def uuid(self: Any) -> Any:
        """Return the key under which Inductor caches what was compiled with this pass."""
        ids = [each.uuid() if isinstance(each, base) else None for each in before]
        return None if None in ids else (hash_files(sources), function.__qualname__, *ids)

    kind = told if any(isinstance(each, told) for each in before) else base
    return type("GraphPass", (kind,), {"__call__": call, "uuid": uuid})()
