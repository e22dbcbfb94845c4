"""The plain tensor that takes the place of a parametrized one, when its parametrizations go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fxparam.eager import reading
from fxparam.eager.classes import chain_of
from fxparam.eager.originals import Writes

__all__ = ["plain_tensor"]


def plain_tensor(module: Module, name: str, chain: Any, leave_parametrized: bool) -> Tensor:
    """Return the tensor that takes the place of a parametrized one, with its value written to it.

    Raises:
        ValueError, RuntimeError: as :func:`remove_parametrizations` says.
    """
    if not leave_parametrized and not chain.is_tensor:
        raise ValueError(
            "Cannot leave unparametrized (`leave_parametrized=False`) a tensor that is "
            "parametrized in terms of a sequence of tensors.\n"
            f"required: one original\nfound: {chain.ntensors} originals"
        )
    target = _deepest_original(chain)
    if target is None:
        return _new_plain_tensor(module, name, chain, leave_parametrized)
    if not leave_parametrized and chain_of(chain, "original") is None:
        return target
    with torch.no_grad():
        value = getattr(module, name) if leave_parametrized else chain.original
        if reading.present().is_shared():
            value = value.clone()
    _store(target, value)
    return target


def _store(target: Tensor, value: Tensor) -> None:
    """Write the value of a parametrized tensor to its original, which stays.

    Raises:
        RuntimeError: if torch cannot; the message says what to do instead.
    """
    writes = Writes()
    writes.plan(target, value)
    try:
        writes.commit()
    except RuntimeError as error:
        raise RuntimeError(
            "remove_parametrizations(leave_parametrized=True) stores the present value in the "
            "original tensor.\n"
            f"original: {type(target).__name__} of dtype {target.dtype}\n"
            f"value: {type(value).__name__} of dtype {value.dtype}\n"
            f"{error}\n"
            "Use leave_parametrized=False. Where Tensor.set_ is what fails, there is also "
            "torch.__future__.set_swap_module_params_on_conversion(True); swapping in turn needs "
            "that no autograd graph holds the original."
        ) from error


def _new_plain_tensor(module: Module, name: str, chain: Any, leave_parametrized: bool) -> Tensor:
    """Return a new tensor with the value of a parametrized one that has several originals."""
    value: Tensor
    with torch.enable_grad():  # whether it requires a gradient does not depend on the caller's mode
        value = getattr(module, name) if leave_parametrized else chain.original
    if reading.present().is_shared():
        value = value.clone()
    if value.requires_grad or any(isinstance(o, Parameter) for o in _stored_originals(chain)):
        return Parameter(value.detach(), requires_grad=value.requires_grad)
    return value


def _stored_originals(chain: Any) -> list[object]:
    return [chain._parameters.get(f"original{i}") for i in range(chain.ntensors)]


def _deepest_original(chain: Any) -> Tensor | None:
    """Return the stored tensor below ``chain`` and nested ones; None if there are several."""
    while chain.is_tensor:
        nested = chain_of(chain, "original")
        if nested is None:
            stored: Tensor = chain.original
            return stored
        chain = nested
    return None
