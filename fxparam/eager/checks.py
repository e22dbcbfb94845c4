"""Checks before a tensor is parametrized, assigned, or parametrized further.

The message of each names the contract, what was required and what was found. The types of the
errors are torch's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleDict
from torch.nn.parameter import is_lazy

from fxparam._torch.names import is_opaque_reference
from fxparam.eager.classes import chains_of
from fxparam.eager.describe import kind_of, spelled, tensors_of

__all__ = [
    "NotAModuleError",
    "assigned_originals",
    "check_appended",
    "check_modules",
    "check_name",
    "check_not_scripted",
    "check_takes_one_tensor",
    "check_value",
    "registrable",
    "shape_and_dtype",
]

_UNLESS = "of the tensor, unless the `unsafe` flag is enabled."


class NotAModuleError(TypeError, AttributeError):
    """Raised for an argument that should be a ``torch.nn.Module`` and is not.

    torch raises an AttributeError for most such mistakes and a TypeError for some; this is both.
    """


def check_modules(**arguments: object) -> None:
    """Raise NotAModuleError unless each argument is a module."""
    for name, value in arguments.items():
        if not isinstance(value, Module):
            hint = " (make an instance)" if isinstance(value, type) else ""
            raise NotAModuleError(
                f"`{name}` must be a torch.nn.Module.\nrequired: an instance of torch.nn.Module\n"
                f"found: {kind_of(value)}{hint}"
            )


def check_not_scripted(module: Module) -> None:
    """Raise RuntimeError for a module of ``torch.jit``, whose tensors cannot be exchanged."""
    if isinstance(module, torch.jit.ScriptModule):
        raise RuntimeError(
            "Tensors of a module of torch.jit cannot be parametrized.\n"
            f"required: a torch.nn.Module written in Python\nfound: {type(module).__name__}\n"
            "Parametrize the module that was scripted or traced."
        )


def registrable(module: Module, name: str) -> Tensor:
    """Return the parameter or buffer ``module.<name>``, if it can be parametrized."""
    store = module._buffers if name in module._buffers else module._parameters
    if name not in store:
        raise ValueError(
            f"Module '{kind_of(module)}' does not have a parameter, a buffer, or a parametrized "
            f"element with name {spelled(name)}\n"
            f"its parameters and buffers: {tensors_of(module)}\nasked for: {spelled(name)}"
        )
    tensor = store[name]
    if tensor is None:
        raise AttributeError(
            "Only a tensor can be parametrized.\nrequired: a parameter or buffer\n"
            f"found: {type(module).__name__}.{name} is registered as None"
        )
    check_not_scripted(module)
    if is_lazy(tensor):
        raise RuntimeError(
            "A tensor is parametrized by a function of its values, which a lazy module does not "
            "have before its first call.\nrequired: a tensor with a shape\n"
            f"found: {type(module).__name__}.{name} is uninitialized\nCall the module once before."
        )
    check_name(module, name)
    return tensor


def check_name(module: Module, name: str) -> None:
    """Raise if the module cannot keep a parametrization list under ``name``.

    Raises:
        ValueError: if its attribute ``parametrizations`` is something else than a ModuleDict.
        KeyError: if a ModuleDict has an attribute of that name.
    """
    present = getattr(module, "parametrizations", None) if name != "parametrizations" else name
    if present is not None and not isinstance(present, ModuleDict):
        raise ValueError(
            "A parametrized module keeps its parametrizations in an attribute `parametrizations`.\n"
            f"required: no attribute of that name, or a ModuleDict\nfound: {type(present).__name__}"
        )
    if hasattr(ModuleDict, name) or name == "training":
        raise KeyError(
            f"Parametrizations are held in a torch.nn.ModuleDict by the name of the tensor, and "
            f"'{name}' is an attribute of that class: a tensor of this name cannot be parametrized."
        )
    chains = chains_of(module)
    if chains is not None and hasattr(chains, name):
        raise KeyError(f"`parametrizations` already has an attribute '{name}'")


def shape_and_dtype(original: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return the shape and the dtype that a value must have."""
    return original.shape, original.dtype


def _tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    raise ValueError(
        "A parametrization must return a tensor.\nrequired: torch.Tensor\n"
        f"found: {type(value).__name__}"
    )


def check_value(value: object, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raise ValueError unless ``value`` is a tensor of the given shape and dtype.

    Args:
        value: the value of a newly parametrized tensor.
        shape: the shape of the tensor before.
        dtype: its dtype.
    """
    value = _tensor(value)
    if value.dtype != dtype:
        raise ValueError(
            f"Registering a parametrization may not change the dtype {_UNLESS}\n"
            f"unparametrized dtype: {dtype}\nparametrized dtype: {value.dtype}"
        )
    if value.shape != shape:
        raise ValueError(
            f"Registering a parametrization may not change the shape {_UNLESS}\n"
            f"unparametrized shape: {tuple(shape)}\nparametrized shape: {tuple(value.shape)}"
        )


def check_takes_one_tensor(parametrization: Module, name: str) -> None:
    """Raise ValueError if a further parametrization cannot be called with one tensor.

    In a chain it gets the value of the parametrization before it, ``unsafe`` or not.
    """
    try:
        inspect.signature(parametrization.forward).bind(name)
    except TypeError as error:
        raise ValueError(
            "In a chain, a parametrization gets one tensor, the value of the one before it.\n"
            f"required: a forward that takes one argument\nfound: {kind_of(parametrization)}, "
            f"registered on '{name}' after another: {error}"
        ) from error
    except ValueError:  # no signature can be found
        return


def check_appended(value: Tensor, parametrization: Module, name: str) -> None:
    """Raise ValueError unless a further parametrization maps a value to one of its kind.

    Its result, and what its right inverse makes of that, must have the shape and dtype of
    ``value``. The right inverse may be missing.

    Args:
        value: the present value of ``module.<name>``.
        parametrization: the one to be appended.
        name: the name of the tensor.
    """
    result = _tensor(parametrization(value))
    for what in ("dtype", "shape"):
        if getattr(result, what) != getattr(value, what):
            raise ValueError(
                f"Registering a parametrization may not change the {what} {_UNLESS}\n"
                f"module.{name}.{what}: {getattr(value, what)}\n"
                f"parametrization(module.{name}).{what}: {getattr(result, what)}"
            )
    inverse: Any = getattr(parametrization, "right_inverse", None)
    if inverse is None:
        return
    try:
        back = inverse(result)
    except NotImplementedError:
        return
    if not isinstance(back, Tensor):
        raise ValueError(
            "In a chain, parametrization.right_inverse must return a tensor, for the "
            "parametrization before it.\nrequired: torch.Tensor\n"
            f"found: {type(back).__name__}"
        )
    for what in ("dtype", "shape"):
        if getattr(back, what) != getattr(value, what):
            raise ValueError(
                "The tensor returned by parametrization.right_inverse must have the same "
                f"{what} as module.{name}, unless the `unsafe` flag is enabled.\n"
                f"module.{name}.{what}: {getattr(value, what)}\n"
                f"returned {what}: {getattr(back, what)}"
            )


def assigned_originals(chain: Any, new: Any) -> dict[str, Any]:
    """Return the new value of each original, by its name.

    Args:
        chain: a ``ParametrizationList``.
        new: the result of its right inverses for an assigned value.

    Raises:
        ValueError: if ``new`` has not the form it had at registration (one tensor, or so many of
            them), or another dtype than the originals.
    """
    if chain.is_tensor:
        if not isinstance(new, Tensor):
            raise ValueError(
                "`right_inverse` should return a tensor, as it did at registration.\n"
                f"required: torch.Tensor\nfound: {type(new).__name__}"
            )
        _check_dtype(chain, "original", new, "The tensor")
        return {"original": new}
    if not isinstance(new, Sequence):
        raise ValueError(
            "'right_inverse' must return a sequence of tensors, as it did at registration.\n"
            f"required: {chain.ntensors} tensors\nfound: {type(new).__name__}"
        )
    if len(new) != chain.ntensors:
        raise ValueError(
            "'right_inverse' must return a sequence of tensors of the length it had at "
            f"registration.\nrequired: length {chain.ntensors}\nfound: length {len(new)}"
        )
    for i, element in enumerate(new):
        if isinstance(element, Tensor):
            _check_dtype(chain, f"original{i}", element, f"Tensor {i}")
        elif not is_opaque_reference(element):
            raise ValueError(
                "'right_inverse' must return a sequence of tensors.\n"
                f"required: tensors\nfound: element {i} of type {type(element).__name__}"
            )
    return {f"original{i}": element for i, element in enumerate(new)}


def _check_dtype(chain: Any, name: str, new: Tensor, subject: str) -> None:
    original = getattr(chain, name)
    if isinstance(original, Tensor) and new.dtype != original.dtype:
        raise ValueError(
            f"{subject} returned by `right_inverse` has another dtype than the original.\n"
            f"`{name}` has dtype {original.dtype}\nright_inverse returned dtype {new.dtype}"
        )
