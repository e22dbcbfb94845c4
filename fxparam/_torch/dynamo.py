"""Dynamo: read the state of its present trace, find its backend, restart it, export with it."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
from torch.nn.utils import parametrize

from fxparam._torch.ddp import backend_behind
from fxparam._torch.names import lookup, tree_unflatten

__all__ = [
    "annotate",
    "assign_local_of_traced_code",
    "clear_trace_marks",
    "break_behind",
    "breaks_counted",
    "code_behind_a_break",
    "compilation",
    "dynamo_export",
    "ends_with_a_break",
    "is_in_traced_generator",
    "is_opaque_wrapper",
    "is_parameter_or_buffer",
    "is_restart",
    "keeps_artifacts",
    "latest_node",
    "local_module_of_traced_code",
    "local_of_traced_code",
    "lookup_backend",
    "nest_results",
    "restart_trace",
    "skip_frames_of",
    "trace_marks",
    "trace_memory",
    "trace_number",
    "traced_code",
    "traced_for",
    "traced_module",
    "traced_torch_region",
    "tracer_output",
    "traces_function_modes",
]

T = TypeVar("T")

# Marks the nodes traced in a block; Dynamo runs it while it traces, in the bodies of higher-order
# ops too.
annotate: Any = lookup("torch.fx.traceback", "annotate")


def clear_trace_marks(keys: Iterable[str]) -> None:
    """Remove marks that an earlier trace has left behind.

    A trace leaves its marks there when its blocks did not end in the order they began.

    Args:
        keys: the names of the marks.
    """
    for key in keys:
        trace_marks().pop(key, None)


def trace_marks() -> dict[str, Any]:
    """Return the marks that the nodes traced now get, by their names; changing it changes them."""
    # Looked up each time: torch binds the name to another dictionary.
    marks: dict[str, Any] = lookup("torch.fx.traceback", "current_meta").get("custom") or {}
    return marks


def trace_number() -> int:
    """Return the number of the present trace; 0 while Dynamo traces nothing.

    Each time that Dynamo traces a frame, the number is another one.
    """
    output = tracer_output()
    if output is None:
        return 0
    number: int = output.__dict__.setdefault("_fxparam_trace", next(_trace_numbers))
    return number


_trace_numbers = itertools.count(1)


def tracer_output() -> Any:
    """Return Dynamo's ``OutputGraph`` of the present trace; None while nothing is traced."""
    translator = lookup("torch._dynamo.symbolic_convert", "InstructionTranslator")
    try:
        return translator.current_tx().output
    except AttributeError:  # nothing is being traced
        return None


def traced_code() -> types.CodeType | None:
    """Return the code of the frame that Dynamo is tracing; None while it traces none."""
    output = tracer_output()
    return None if output is None else output.root_tx.f_code


def code_behind_a_break(code: types.CodeType | None) -> types.CodeType | None:
    """Return the function that code goes on with behind a graph break; None for other code."""
    made = lookup("torch._dynamo.resume_execution", "ContinueExecutionCache")
    known = made.generated_code_metadata
    return known[code].code if code is not None and code in known else None


def ends_with_a_break(gm: torch.fx.GraphModule) -> bool:
    """Check whether the code goes on behind a graph that Dynamo has captured."""
    return break_behind(gm) is not None


def break_behind(gm: torch.fx.GraphModule) -> tuple[str, tuple[tuple[str, int], ...]] | None:
    """Return why a graph that Dynamo has captured ends before the code does; None if it does not.

    Returns:
        The reason, and the lines that led there, outermost first, as ``(file, line)``.
    """
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if not getattr(reason, "graph_break", False):
        return None
    frames = tuple((frame.filename, frame.lineno or 0) for frame in reason.user_stack)
    return reason.reason, frames


def breaks_counted() -> dict[str, int]:
    """Return the reasons of graph breaks in this process, each with their number.

    Those of frames that Dynamo then left to eager mode are among them, of which there is no graph.
    """
    counters: Any = lookup("torch._dynamo.utils", "counters")
    counted = {**counters["graph_break"], **counters["unimplemented"]}
    # A break while a break is handled: the last is the one that left no graph.
    return {reason.rpartition("occurred: ***")[2]: number for reason, number in counted.items()}


def compilation() -> object:
    """Return an object that equals that of each other attempt to compile the present frame.

    None while Dynamo traces nothing.
    """
    output = tracer_output()
    return None if output is None else output.dynamo_compile_id


def traced_module(identity: int) -> torch.nn.Module | None:
    """Return a module that Dynamo has seen in the present trace; None if it has not.

    Args:
        identity: the ``id()`` of the module.
    """
    output = tracer_output()
    seen = {} if output is None else output.side_effects.id_to_variable
    module = getattr(seen.get(identity), "value", None)
    return module if isinstance(module, torch.nn.Module) else None


def trace_memory(make: Callable[[], T]) -> T:
    """Return an object that belongs to the present trace.

    Args:
        make: makes it where the trace has none yet.
    """
    memory: T = tracer_output().__dict__.setdefault("_fxparam_memory", make())
    return memory


def latest_node() -> torch.fx.Node | None:
    """Return the last node of the graph that is traced; None in the body of a higher-order op."""
    output = tracer_output()
    if output is None or output.current_tracer is not output.root_tracer:
        return None
    node: torch.fx.Node = output.graph._root.prev
    return node


def local_of_traced_code(name: str) -> Any:
    """Return Dynamo's variable for a local of the code that it is tracing."""
    variable = _translator().symbolic_locals[name]
    return variable.realize() if hasattr(variable, "realize") else variable


def assign_local_of_traced_code(name: str, variable: Any) -> None:
    """Bind a local of the code that Dynamo is tracing to another one of Dynamo's variables."""
    _translator().symbolic_locals[name] = variable


def local_module_of_traced_code(name: str) -> torch.nn.Module | None:
    """Return the module that a local of the code that Dynamo is tracing has; None for no module."""
    module = getattr(local_of_traced_code(name), "value", None)
    return module if isinstance(module, torch.nn.Module) else None


def _translator() -> Any:
    """Return Dynamo's interpreter of the innermost code that it is tracing."""
    return next(_translators(), None)


def traced_torch_region() -> object:
    """Return what stands for the block of torch's own ``cached()`` that traced code has entered.

    The same object in all of an outermost block, and another in the next as long as it is kept.
    None outside. torch binds a new dictionary for values at the end of such a block.
    """
    output = tracer_output()
    if output is None:
        return None
    effects = output.side_effects
    variable = effects.id_to_variable.get(id(parametrize))
    assigned = effects.store_attr_mutations.get(variable, {})
    blocks = assigned.get("_cache_enabled")
    if blocks is None or not blocks.as_python_constant():
        return None
    return assigned.get("_cache", parametrize)


def traces_function_modes() -> bool:
    """Check whether the code that is being traced runs under a ``TorchFunctionMode``."""
    translator = lookup("torch._dynamo.symbolic_convert", "InstructionTranslator")
    return bool(translator.current_tx().symbolic_torch_function_state.mode_stack)


def restart_trace(reason: str) -> NoReturn:
    """Let Dynamo trace the present frame once more, on another path.

    Args:
        reason: for Dynamo's log.

    Raises:
        torch._dynamo.exc.RestartAnalysis: of two kinds at once, one that Dynamo lets backends raise
            and one after which it does not expect to take the same path.
    """
    kinds = [
        lookup("torch._dynamo.exc", f"{kind}RestartAnalysis")
        for kind in ("TensorifyScalar", "Unspecialize")
    ]
    raise type("RestartAnalysis", tuple(kinds), {})(restart_reason=reason)


def keeps_artifacts() -> bool:
    """Check whether Dynamo loads what it compiled in an earlier process, guards included."""
    return bool(lookup("torch._dynamo", "config").caching_precompile)


def is_restart(error: Exception) -> bool:
    """Check whether an exception asks Dynamo to trace the present frame once more."""
    return isinstance(error, lookup("torch._dynamo.exc", "RestartAnalysis"))


def skip_frames_of(code: types.CodeType) -> None:
    """Let Dynamo not compile a function by itself, when eager code calls it.

    It still inlines the function into code that it traces, and compiles what the function calls.
    """
    lookup("torch._dynamo.eval_frame", "skip_code")(code)


def is_in_traced_generator(own: types.CodeType) -> bool:
    """Check whether Dynamo is tracing the code of a generator, other than ``own`` code."""
    generator = lookup("torch._dynamo.symbolic_convert", "InliningGeneratorInstructionTranslator")
    return any(isinstance(t, generator) and t.f_code is not own for t in _translators())


def _translators() -> Iterator[Any]:
    """Yield Dynamo's interpreters of the code that it is tracing, the innermost first.

    Dynamo interprets an inlined call in a nested ``run`` of an interpreter, so that what it is
    tracing stands on the Python stack.
    """
    translator = lookup("torch._dynamo.symbolic_convert", "InstructionTranslatorBase")
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        traced = frame.f_locals.get("self") if frame.f_code.co_name == "run" else None
        if isinstance(traced, translator):
            yield traced
        frame = frame.f_back


def traced_for() -> object:
    """Return the backend for which Dynamo is tracing, without torch's wrappers around it."""
    return backend_behind(tracer_output().compiler_fn)


def dynamo_export(root: Any, args: tuple[Any, ...]) -> Any:
    """Capture one call of ``root`` as a graph module.

    Returns:
        A graph of torch operations with flat inputs and outputs. It reads the tensors of ``root``
        as attributes.
    """
    # Every call traces anew. That is no recompilation to be limited.
    settings = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), sys.maxsize)
    # torch.compile would break the graph at RNN, GRU and LSTM; torch.export traces them.
    settings["allow_rnn"] = True
    with lookup("torch._dynamo", "config").patch(settings):
        return lookup("torch._dynamo", "export")(root)(*args).graph_module


def is_opaque_wrapper(target: object) -> bool:
    """Check whether a node's target runs code that the graph does not show.

    Dynamo wraps functions that it was told not to look into (``allow_in_graph``,
    ``nonstrict_trace``). Such a function may be an ``autograd.Function``.
    """
    return str(getattr(target, "__module__", "")).startswith("torch._dynamo")


def nest_results(gm: Any, flat: list[Any]) -> Any:
    """Nest the results of a graph from :func:`dynamo_export` as the traced code returned them.

    Args:
        gm: the graph module, whose graph returns a flat tuple.
        flat: what stands for each result.
    """
    return tree_unflatten(flat, gm._out_spec)


def is_parameter_or_buffer(meta: dict[str, Any]) -> bool:
    """Check whether Dynamo says of a placeholder that it is a module's parameter or buffer.

    Dynamo marks them for AOTAutograd's static inputs; the mark is there in frames resumed after a
    graph break too, where module names are lost.
    """
    return "_dynamo_static_input_type" in (meta.get("tensor_dict") or {})


def lookup_backend(inner: str | Callable[..., Any]) -> Callable[..., Any]:
    """Return the ``torch.compile`` backend registered under a name; a callable as it is."""
    # Imported when asked: the registry loads Dynamo.
    found: Callable[..., Any] = lookup("torch._dynamo.backends.registry", "lookup_backend")(inner)
    return found
