"""Every private PyTorch name that fxparam leans on, in one place.

A private name may move or vanish in any PyTorch release. Each is looked up here, once, and a
missing one raises :class:`UnsupportedTorchError`, which says what was looked for and in which
version. Names that exist in only some of the supported versions (2.11 and newer) have a fallback,
with the reason beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "FakeTensorMode",
    "HigherOrderOperator",
    "ShapeEnv",
    "TorchDispatchMode",
    "UnsupportedTorchError",
    "active_modes",
    "allow_scalar_outputs",
    "annotate",
    "assert_tensor_metadata",
    "behind_proxy",
    "clear_trace_marks",
    "buffer_hooks_kept",
    "builtin_name",
    "call_with_hooks",
    "checkpoint_around",
    "compilation",
    "dynamo_export",
    "functorch_level",
    "grad_mode_namespace",
    "held_as",
    "inductor_with",
    "inside_functorch",
    "is_composite",
    "is_in_traced_generator",
    "is_opaque_reference",
    "is_parameter_or_buffer",
    "is_view_of_another",
    "is_wrapper_subclass",
    "keep_saved_tensors",
    "rename",
    "restart_trace",
    "schemas_of",
    "set_grad_enabled",
    "storage_identity",
    "trace_artifact",
    "trace_marks",
    "trace_number",
    "traced_assignments",
    "traced_changes",
    "traced_code",
    "traced_for",
    "traced_module",
    "traces_function_modes",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_map",
    "tree_unflatten",
]


class UnsupportedTorchError(ImportError):
    """This PyTorch lacks a private name that fxparam needs."""


def _lookup(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedTorchError(
            f"fxparam supports PyTorch 2.11 and newer, and needs {module}.{name}.\n"
            f"installed: torch {torch.__version__}, which does not have it\n"
            "Install a supported PyTorch, or report this version to fxparam."
        ) from error


_dispatch_modes = _lookup("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack")
_function_modes = _lookup("torch.overrides", "_get_current_function_mode_stack")
_interpreter = _lookup("torch._C._functorch", "peek_interpreter_stack")
_level = _lookup("torch._C._functorch", "maybe_get_level")
# Run an op on metadata alone, and see each ATen op below it: what graph/effects.py does.
FakeTensorMode: Any = _lookup("torch._subclasses.fake_tensor", "FakeTensorMode")
ShapeEnv: Any = _lookup("torch.fx.experimental.symbolic_shapes", "ShapeEnv")
TorchDispatchMode: Any = _lookup("torch.utils._python_dispatch", "TorchDispatchMode")
HigherOrderOperator: Any = _lookup("torch._ops", "HigherOrderOperator")
tree_flatten: Any = _lookup("torch.utils._pytree", "tree_flatten")
tree_flatten_with_path: Any = _lookup("torch.utils._pytree", "tree_flatten_with_path")
tree_unflatten: Any = _lookup("torch.utils._pytree", "tree_unflatten")
tree_map: Any = _lookup("torch.utils._pytree", "tree_map")
_saved_tensors_hooks: Any = _lookup("torch._C._autograd", "_top_saved_tensors_default_hooks")
# Marks the nodes traced in a block; Dynamo runs it while it traces, in the bodies of higher-order
# ops too.
annotate: Any = _lookup("torch.fx.traceback", "annotate")
# The node by which graphs switch the grad mode, whoever captured them.
set_grad_enabled: Any = _lookup("torch._C", "_set_grad_enabled")
# Where the contexts of the grad mode look that up.
grad_mode_namespace: Any = _lookup("torch", "_C")
# A node that raises where a tensor has another shape or dtype than it names.
assert_tensor_metadata: Any = _lookup("torch", "ops").aten._assert_tensor_metadata.default
_buffer_hooks = _lookup("torch.nn.modules.module", "_global_buffer_registration_hooks")
_inductor_wrapper = _lookup("torch", "_TorchCompileInductorWrapper")
_find_builtin = _lookup("torch.jit._builtins", "_find_builtin")
_operator_schemas = _lookup("torch._C", "_jit_get_schemas_for_operator")
_has_kernel = _lookup("torch._C", "_dispatch_has_kernel_for_dispatch_key")
_is_wrapper_subclass = _lookup("torch.utils._python_dispatch", "is_traceable_wrapper_subclass")


def builtin_name(function: object) -> str | None:
    """The qualified name of the op that a function of torch's is, ``aten::linear``, or None."""
    try:
        name: str | None = _find_builtin(function)
    except TypeError:  # not hashable
        return None
    return name


@functools.cache
def schemas_of(name: str) -> tuple[Any, ...]:
    """The schemas of every overload of an op; empty for one that does not exist."""
    return tuple(_operator_schemas(name))


def is_composite(schema: Any) -> bool:
    """Whether an overload is made of other ops, so that its schema may say less than it does."""
    name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    try:
        return bool(_has_kernel(name, "CompositeImplicitAutograd"))
    except RuntimeError:  # one of TorchScript's, on lists and numbers
        return False


@contextmanager
def buffer_hooks_kept() -> Iterator[None]:
    """Take away, in the end, the global hooks on assigned buffers that the block leaves behind.

    ``torch.export`` of torch 2.11 takes its own away only where it succeeds. One that is left looks
    at buffers assigned anywhere, and Dynamo cannot trace such an assignment any more.
    """
    before = dict(_buffer_hooks)
    try:
        yield
    finally:
        for key in [key for key in _buffer_hooks if key not in before]:
            del _buffer_hooks[key]


def rename(node: torch.fx.Node, name: str) -> None:
    """Give a node a name, with a number behind it if another node has it."""
    node._rename(name)


def active_modes() -> tuple[object, ...]:
    """The dispatch and function mode objects that see the operations run here, outermost first."""
    return (*_dispatch_modes(), *_function_modes())


def checkpoint_around() -> object:
    """What stands for the call of a checkpointed function that this code runs in, or runs again.

    None outside, and in the reentrant kind, which records nothing in forward.
    """
    hooks = _saved_tensors_hooks(True)
    inside = hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
    return hooks[0] if inside else None


def inside_functorch() -> bool:
    """Whether a ``torch.func`` transform (``grad``, ``vmap``, ...) is running around this code."""
    return _interpreter() is not None


def functorch_level(tensor: torch.Tensor) -> int:
    """The nesting level of the transform that wraps ``tensor``; -1 for a tensor that none wraps."""
    return int(_level(tensor))


def is_wrapper_subclass(tensor: object) -> bool:
    """Whether ``tensor`` is of a subclass that holds other tensors (``__tensor_flatten__``)."""
    return bool(_is_wrapper_subclass(tensor))


def is_view_of_another(tensor: torch.Tensor) -> bool:
    """Whether autograd knows ``tensor`` as a view, which ``detach_`` refuses."""
    return tensor._is_view()


def call_with_hooks(module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
    """What a call of a module does, which a tracer that replaces ``__call__`` does not see."""
    return module._call_impl(*args)  # type: ignore[no-untyped-call]


def storage_identity(tensor: Any) -> tuple[object, object]:
    """The storage behind ``tensor``, to be held so that none takes its place, and its number.

    ``(None, None)`` for a tensor without storage: a wrapper subclass, a functorch wrapper, a sparse
    tensor. The number is the storage's address as an object, not that of its data: a fake tensor
    has no data, and warns when asked.
    """
    try:
        storage = tensor.untyped_storage()
        return storage, storage._cdata
    except (RuntimeError, NotImplementedError, AttributeError):
        return None, None


def behind_proxy(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself where a tracer (of non-strict export) shows proxies, new at each access."""
    tracing = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if tracing is None or not isinstance(module, getattr(tracing, "_AttrProxy", ())):
        return module
    base: torch.nn.Module = module.get_base()  # type: ignore[operator]
    return base


def is_opaque_reference(value: object) -> bool:
    """Whether ``value`` is an opaque reference, which may stand where an original tensor does.

    PyTorch 2.12 and older have no such originals, hence ``False`` where the names are missing.
    """
    try:
        from torch._library.opaque_object import is_opaque_reference_type
        from torch._opaque_base import OpaqueBase
    except ImportError:
        return False
    return isinstance(value, OpaqueBase) and bool(is_opaque_reference_type(type(value)))


def clear_trace_marks(keys: Iterable[str]) -> None:
    """Remove marks that a trace has left behind, as one does that was left out of order."""
    for key in keys:
        trace_marks().pop(key, None)


def trace_marks() -> dict[str, Any]:
    """What the nodes that are being traced are marked with."""
    # Looked up each time: torch binds the name to another dictionary.
    marks: dict[str, Any] = _lookup("torch.fx.traceback", "current_meta").get("custom") or {}
    return marks


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Put a text among the structured traces of a compilation, where tlparse shows it."""
    emit = _lookup("torch._logging", "trace_structured")
    emit(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
    )


def trace_number() -> int:
    """A number of its own for each time that Dynamo traces a frame; 0 while it traces none."""
    output = _tracer_output()
    if output is None:
        return 0
    number: int = output.__dict__.setdefault("_fxparam_trace", next(_trace_numbers))
    return number


_trace_numbers = itertools.count(1)


def _tracer_output() -> Any:
    translator = _lookup("torch._dynamo.symbolic_convert", "InstructionTranslator")
    try:
        return translator.current_tx().output
    except AttributeError:  # nothing is being traced
        return None


def traced_code() -> types.CodeType | None:
    """The code of the frame that Dynamo is tracing; None while it traces none."""
    output = _tracer_output()
    return None if output is None else output.root_tx.f_code


def compilation() -> object:
    """What the attempts to compile a frame have in common, while Dynamo makes one."""
    output = _tracer_output()
    return None if output is None else output.dynamo_compile_id


def traced_module(identity: int) -> torch.nn.Module | None:
    """A module that Dynamo has seen in the present trace; None while it traces nothing."""
    output = _tracer_output()
    seen = {} if output is None else output.side_effects.id_to_variable
    module = getattr(seen.get(identity), "value", None)
    return module if isinstance(module, torch.nn.Module) else None


def traces_function_modes() -> bool:
    """Whether the code that is being traced runs under a ``TorchFunctionMode``."""
    translator = _lookup("torch._dynamo.symbolic_convert", "InstructionTranslator")
    return bool(translator.current_tx().symbolic_torch_function_state.mode_stack)


def restart_trace(reason: str) -> None:
    """Let Dynamo trace the present frame once more, on another path.

    Raises:
        torch._dynamo.exc.RestartAnalysis: of two kinds at once, one that Dynamo lets backends raise
            and one after which it does not expect to take the same path.
    """
    kinds = [
        _lookup("torch._dynamo.exc", f"{kind}RestartAnalysis")
        for kind in ("TensorifyScalar", "Unspecialize")
    ]
    raise type("RestartAnalysis", tuple(kinds), {})(restart_reason=reason)


def is_in_traced_generator(own: types.CodeType) -> bool:
    """Whether Dynamo is tracing the code of a generator, other than ``own`` code.

    Dynamo keeps what it is tracing on the Python stack, one interpreter's ``run`` in another's.
    """
    generator = _lookup("torch._dynamo.symbolic_convert", "InliningGeneratorInstructionTranslator")
    frame = sys._getframe()
    while frame is not None:
        traced = frame.f_locals.get("self") if frame.f_code.co_name == "run" else None
        if isinstance(traced, generator) and traced.f_code is not own:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def traced_assignments(module: int) -> list[str]:
    """What traced code has changed of the attributes of a module and those in it, but tensors.

    Dynamo keeps assignments to itself until the graph has run, and only it knows them.

    Args:
        module: its identity.
    """
    tensor = _lookup("torch._dynamo.variables", "TensorVariable")
    effects = _tracer_output().side_effects
    root = effects.id_to_variable.get(module)
    found: list[str] = []
    for owner in root.value.modules() if root is not None else ():
        variable = effects.id_to_variable.get(id(owner))
        for name, value in effects.store_attr_mutations.get(variable, {}).items():
            if not isinstance(value, tensor) and not _is_constant(value, vars(owner).get(name)):
                found.append(f"{id(owner)}.{name}={value!r}")
    return found


def traced_changes() -> Iterator[tuple[object, str, torch.fx.Node | None]]:
    """What traced code has changed of objects that were there before it.

    Dynamo keeps changes to itself until the graph has run.

    Yields:
        An object, or a variable of Dynamo's that stands for one, with an attribute or key of it,
        empty where that is not known, and the node of the tensor that is there now, if it is one.
    """
    output = _tracer_output()
    if output is None:
        return
    effects = output.side_effects
    there = {id(each): each for each in effects.keepalive}
    for identity, variable in list(effects.id_to_variable.items()):
        kind = type(variable.mutation_type).__name__
        own_cell = getattr(variable, "local_name", None) is not None  # of the frame's locals
        if kind == "NoneType" or kind.endswith("New") or own_cell:
            continue
        if not effects.is_modified(variable):
            continue
        owner = there.get(identity, variable)
        values = effects.store_attr_mutations.get(variable) or _items_of(variable)
        if not values:
            yield owner, "", None
        for name, value in values.items():
            if not _stands_for(value, held_as(owner, name)):
                yield owner, name, _tensor_node(value)


def held_as(owner: object, name: str) -> object:
    """What an object has under the name of an attribute of its own, or a dictionary of a key."""
    held = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
    return held.get(name)


def _items_of(variable: Any) -> dict[str, Any]:
    """What a dictionary that was changed holds, by name; nothing where that cannot be told."""
    try:
        return {key.vt.as_python_constant(): value for key, value in variable.items.items()}
    except (AttributeError, NotImplementedError):
        return {}


def _tensor_node(variable: Any) -> torch.fx.Node | None:
    tensor = isinstance(variable, _lookup("torch._dynamo.variables", "TensorVariable"))
    return variable.as_proxy().node if tensor else None


def _stands_for(variable: Any, value: object) -> bool:
    """Whether one of Dynamo's variables is known to stand for an object, or an equal constant."""
    if hasattr(variable, "is_realized") and not variable.is_realized():
        return bool(variable.original_value() is value)
    return getattr(variable, "value", variable) is value or _is_constant(variable, value)


def _is_constant(variable: Any, value: object) -> bool:
    """Whether one of Dynamo's variables stands for a Python value that is equal to another."""
    constant = variable.as_python_constant() if variable.is_python_constant() else variable
    return type(constant) is type(value) and bool(constant == value)


def traced_for() -> object:
    """The backend for which Dynamo is tracing, without the wrappers that torch puts around it."""
    backend = _tracer_output().compiler_fn
    seen: list[object] = []
    while backend is not None and backend not in seen:
        seen.append(backend)
        inner = getattr(backend, "_torchdynamo_orig_backend", None)
        inner = inner or getattr(backend, "compiler_fn", None)
        backend = inner or backend
    return seen[-1] if seen else None


def dynamo_export(root: Any, args: tuple[Any, ...]) -> Any:
    """One call of ``root`` as a graph of torch operations, which reads tensors as attributes."""
    # Every call traces anew. That is no recompilation to be limited.
    limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), sys.maxsize)
    with _lookup("torch._dynamo", "config").patch(limits):
        return _lookup("torch._dynamo", "export")(root)(*args).graph_module


def is_parameter_or_buffer(meta: dict[str, Any]) -> bool:
    """Whether Dynamo says, in a placeholder's ``meta``, that it is a module's parameter or buffer.

    Dynamo marks them for AOTAutograd's static inputs; the mark is there in frames resumed after a
    graph break too, where module names are lost.
    """
    return "_dynamo_static_input_type" in (meta.get("tensor_dict") or {})


def inductor_with(
    mode: str | None, options: dict[str, Any] | None, **passes: Callable[[Any], None]
) -> Any:
    """Inductor, configured as ``torch.compile(mode=, options=)`` configures it.

    ``torch.compile`` hands ``mode`` and ``options`` to any other backend as they are; their
    checking and meaning live in this wrapper and nowhere else.

    ``passes`` are under the names of Inductor's options for passes of the user's own, and run
    after those.
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
    """Inductor's graph pass of a function, made lazily: its base is slow to import."""
    base = _lookup("torch._inductor.custom_graph_pass", "CustomGraphPass")
    hash_files = _lookup("torch._inductor.custom_graph_pass", "get_hash_for_files")
    sources = tuple(map(str, sorted(Path(inspect.getfile(function)).parent.glob("*.py"))))
    # Passes that are told whether the graph is one of inference: newer versions have them.
    told: Any = getattr(sys.modules[base.__module__], "CustomInferenceAwareGraphPass", ())

    def call(self: Any, graph: Any, **modes: Any) -> None:
        for each in before:
            each(graph, **(modes if isinstance(each, told) else {}))
        function(graph)

    def uuid(self: Any) -> Any:
        """The key under which Inductor caches what was compiled with this pass."""
        ids = [each.uuid() if isinstance(each, base) else None for each in before]
        return None if None in ids else (hash_files(sources), function.__qualname__, *ids)

    kind = told if any(isinstance(each, told) for each in before) else base
    return type("GraphPass", (kind,), {"__call__": call, "uuid": uuid})()


def keep_saved_tensors() -> Any:
    """While this context is open, AOTAutograd lets no backward work in the memory of what is saved.

    It tells Inductor the positions, among a backward graph's inputs, of those that may be
    overwritten. Inductor (torch 2.13) takes them for positions among the inputs of each body too,
    and overwrites operands of loops and branches that are read again.
    """
    return _lookup("torch._functorch", "config").patch(donated_buffer=False)


def allow_scalar_outputs(values: Iterable[object]) -> None:
    """Let the tracing of a graph, known by some of its fake tensors, read numbers from tensors.

    Inductor lowers the loops of higher-order ops to code that does; Dynamo allows it only with
    ``fullgraph=True`` or ``capture_scalar_outputs``, and without raises
    ``DataDependentOutputException`` after the graph was captured.
    """
    for value in values:
        shape_env = getattr(getattr(value, "fake_mode", None), "shape_env", None)
        if shape_env is not None and not shape_env.settings.allow_scalar_outputs:
            shape_env.settings = dataclasses.replace(shape_env.settings, allow_scalar_outputs=True)
