"""PyTorch's private names, looked up once each, with a clear error where one is missing.

A private name may move or vanish in any PyTorch release. :func:`lookup` raises
:class:`UnsupportedTorchError` for a missing one, which says what was looked for and in which
version. A name that exists in only some of the supported versions has a fallback, with the reason
beside it. The files beside this one hold what is built on private names: Dynamo's (``dynamo``),
Inductor's (``inductor``), FX's (``fx``) and tensors' (``tensors``).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "ShapeEnv",
    "OrthogonalMaps",
    "OrthogonalParametrization",
    "SpectralNormParametrization",
    "TorchDispatchMode",
    "UnsupportedTorchError",
    "WeightNormParametrization",
    "active_modes",
    "any_autocast",
    "assert_tensor_metadata",
    "behind_proxy",
    "builtin_name",
    "call_with_hooks",
    "checkpoint_around",
    "dispatch_depth",
    "function_depth",
    "functorch_config",
    "global_buffer_hooks",
    "grad_mode_namespace",
    "inside_forward_ad",
    "inside_functorch",
    "is_composite",
    "is_opaque_reference",
    "is_plain_eager",
    "lookup",
    "qualified_name",
    "schema_of",
    "schemas_of",
    "set_grad_enabled",
    "torch_region",
    "trace_artifact",
    "tracing_state",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_map",
    "weight_norm_functions",
    "tree_unflatten",
    "unbacked_symbols",
]


class UnsupportedTorchError(ImportError):
    """This PyTorch lacks a private name that fxparam needs."""


def lookup(module: str, name: str) -> Any:
    """Return an attribute of a module of torch's.

    Raises:
        UnsupportedTorchError: if there is no such module or attribute.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedTorchError(
            f"fxparam supports PyTorch 2.11 and newer, and needs {module}.{name}.\n"
            f"installed: torch {torch.__version__}, which does not have it\n"
            "Install a supported PyTorch, or report this version to fxparam."
        ) from error


# Runs ops on metadata alone, without data.
FakeTensorMode: Any = lookup("torch._subclasses.fake_tensor", "FakeTensorMode")
# Holds the symbolic sizes of fake tensors.
ShapeEnv: Any = lookup("torch.fx.experimental.symbolic_shapes", "ShapeEnv")
# Sees each ATen op that runs in a block.
TorchDispatchMode: Any = lookup("torch.utils._python_dispatch", "TorchDispatchMode")
# The kinds of things that nodes call: an op that takes graphs (cond, scan), one overload of an ATen
# op (aten.add.Tensor), all overloads of one (aten.add).
HigherOrderOperator: Any = lookup("torch._ops", "HigherOrderOperator")
OpOverload: Any = lookup("torch._ops", "OpOverload")
OpOverloadPacket: Any = lookup("torch._ops", "OpOverloadPacket")
# Nested containers as lists of leaves, and back.
tree_flatten: Any = lookup("torch.utils._pytree", "tree_flatten")
tree_flatten_with_path: Any = lookup("torch.utils._pytree", "tree_flatten_with_path")
tree_unflatten: Any = lookup("torch.utils._pytree", "tree_unflatten")
tree_map: Any = lookup("torch.utils._pytree", "tree_map")
# The function that graphs call to switch the grad mode, whoever captured them.
set_grad_enabled: Any = lookup("torch._C", "_set_grad_enabled")
# The module in which torch.no_grad() and its like look that function up.
grad_mode_namespace: Any = lookup("torch", "_C")
# An op that raises if a tensor has another shape or dtype than given.
assert_tensor_metadata: Any = lookup("torch", "ops").aten._assert_tensor_metadata.default
# What torch.nn.utils.parametrizations.spectral_norm and weight_norm register.
SpectralNormParametrization: Any = lookup("torch.nn.utils.parametrizations", "_SpectralNorm")
WeightNormParametrization: Any = lookup("torch.nn.utils.parametrizations", "_WeightNorm")
# The functions that weight norm calls.
weight_norm_functions = (
    lookup("torch", "_weight_norm"),
    lookup("torch", "ops").aten._weight_norm.default,
)
# What torch.nn.utils.parametrizations.orthogonal registers, and the names of its maps.
OrthogonalParametrization: Any = lookup("torch.nn.utils.parametrizations", "_Orthogonal")
OrthogonalMaps: Any = lookup("torch.nn.utils.parametrizations", "_OrthMaps")
# torch's own cached(): how many of its blocks are open, and the values of the outermost.
_parametrize = lookup("torch.nn.utils", "parametrize")
for _name in ("_cache_enabled", "_cache"):  # bound anew by each block, hence not kept
    lookup("torch.nn.utils.parametrize", _name)
_unbacked = lookup("torch.fx.experimental.symbolic_shapes", "free_unbacked_symbols")
_dispatch_modes = lookup("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack")
_function_modes = lookup("torch.overrides", "_get_current_function_mode_stack")
dispatch_depth = lookup("torch._C", "_len_torch_dispatch_stack")
function_depth = lookup("torch._C", "_len_torch_function_stack")
any_autocast = lookup("torch._C", "_is_any_autocast_enabled")
tracing_state = lookup("torch._C", "_get_tracing_state")
_interpreter = lookup("torch._C._functorch", "peek_interpreter_stack")
_forward_ad: Any = lookup("torch.autograd", "forward_ad")
lookup("torch.autograd.forward_ad", "_current_level")  # bound anew by each block, hence not kept
_saved_tensors_hooks: Any = lookup("torch._C._autograd", "_top_saved_tensors_default_hooks")
_find_builtin = lookup("torch.jit._builtins", "_find_builtin")
_operator_schemas = lookup("torch._C", "_jit_get_schemas_for_operator")
_has_kernel = lookup("torch._C", "_dispatch_has_kernel_for_dispatch_key")


def builtin_name(function: object) -> str | None:
    """Return the qualified name of the op behind a function of torch's: ``aten::linear``.

    None for any other function.
    """
    try:
        name: str | None = _find_builtin(function)
    except TypeError:  # not hashable
        return None
    return name


def schema_of(overload: Any) -> Any:
    """Return the schema of an ``OpOverload``: its arguments and results, and which it writes."""
    return overload._schema


def qualified_name(op: Any) -> str:
    """Return the name of an ``OpOverload`` or its packet, without the overload: ``aten::add``."""
    return str(op._schema.name if isinstance(op, OpOverload) else op._qualified_op_name)


@functools.cache
def schemas_of(name: str) -> tuple[Any, ...]:
    """Return the schemas of every overload of an op; empty for one that does not exist."""
    return tuple(_operator_schemas(name))


def is_composite(schema: Any) -> bool:
    """Check whether an overload is implemented by other ops.

    Its schema may then not declare everything that those do.
    """
    name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    try:
        return bool(_has_kernel(name, "CompositeImplicitAutograd"))
    except RuntimeError:  # one of TorchScript's, on lists and numbers
        return False


def active_modes() -> tuple[object, ...]:
    """Return the dispatch modes and then the function modes around this code, outermost first."""
    return (*_dispatch_modes(), *_function_modes())


def checkpoint_around() -> object:
    """Return an object that identifies the call of a checkpointed function around this code.

    Another one in each call, and when backward runs the function again. None outside, and in the
    reentrant kind (``use_reentrant=True``), which records nothing in forward.
    """
    hooks = _saved_tensors_hooks(True)
    inside = hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
    return hooks[0] if inside else None


def inside_functorch() -> bool:
    """Check whether a transform of ``torch.func`` (``grad``, ``vmap``, ...) runs this code."""
    return _interpreter() is not None


def inside_forward_ad() -> bool:
    """Check whether a block of ``torch.autograd.forward_ad`` is open."""
    return bool(_forward_ad._current_level >= 0)


def is_plain_eager() -> bool:
    """Check whether code runs as it is: under no mode or transform, and traced by nobody."""
    return not (
        dispatch_depth() or function_depth() or _interpreter() is not None or tracing_state()
    )


def call_with_hooks(module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
    """Call a module with its hooks, past a tracer that has replaced ``Module.__call__``."""
    return module._call_impl(*args)  # type: ignore[no-untyped-call]


def behind_proxy(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module that a proxy stands for; a module that is no proxy as it is.

    Non-strict export shows a proxy in place of each module, a new one at each access.
    """
    tracing = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if tracing is None or not isinstance(module, getattr(tracing, "_AttrProxy", ())):
        return module
    base: torch.nn.Module = module.get_base()  # type: ignore[operator]
    return base


def is_opaque_reference(value: object) -> bool:
    """Check whether ``value`` is an opaque reference, which may be in an original's place.

    PyTorch 2.12 and older have no such originals, hence ``False`` where the names are missing.
    """
    try:
        from torch._library.opaque_object import is_opaque_reference_type
        from torch._opaque_base import OpaqueBase
    except ImportError:
        return False
    return isinstance(value, OpaqueBase) and bool(is_opaque_reference_type(type(value)))


def torch_region() -> dict[Any, Any] | None:
    """Return what torch's own ``cached()`` keeps values in, if such a block is open; else None.

    It is another dictionary in each outermost block, and of all threads. Torch looks values up in
    it by the identity of a module and the name of a tensor.
    """
    kept: dict[Any, Any] | None = _parametrize._cache if _parametrize._cache_enabled else None
    return kept


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to the structured trace of a compilation, which ``tlparse`` displays.

    Args:
        name: the name of the artifact.
        text: returns the text; not called if no structured trace is written.
    """
    emit = lookup("torch._logging", "trace_structured")
    emit(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
    )


def functorch_config() -> Any:
    """Return AOTAutograd's settings, which ``patch`` changes for a while."""
    return lookup("torch._functorch", "config")


def global_buffer_hooks() -> dict[int, Any]:
    """Return the global hooks that see each registration of a buffer, by their numbers."""
    hooks: dict[int, Any] = lookup("torch.nn.modules.module", "_global_buffer_registration_hooks")
    return hooks


def unbacked_symbols(value: object) -> set[Any]:
    """Return the symbols in the sizes and numbers of a value that only data decide."""
    found: set[Any] = set()
    for leaf in tree_flatten(value)[0]:
        sizes = leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,)
        # Most sizes are numbers, of which torch need not be asked.
        if any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes):
            found |= _unbacked(leaf)
    return found
