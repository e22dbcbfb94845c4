"""Right inverses: compute the originals of a value, and write them.

Everything here computes and checks; :class:`Writes` alone changes tensors, and does so last. A
write keeps the identity of the tensor written to, so that optimizers still hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.__future__ import get_swap_module_params_on_conversion
from torch.nn import Module, Parameter

from fxparam._torch.dtensors import is_dtensor, value_like
from fxparam._torch.fsdp import shard_behind
from fxparam._torch.names import is_opaque_reference
from fxparam._torch.tensors import is_wrapper_subclass
from fxparam.eager.describe import first_names, kind_of

__all__ = ["Writes", "initial_originals", "like_parameter", "register", "right_inverses"]


class Writes:
    """Writes to several tensors that all happen, or none."""

    def __init__(self) -> None:
        self._planned: list[tuple[Tensor, Tensor]] = []

    def plan(self, target: Tensor, value: Tensor) -> None:
        """Add a write of ``value`` to ``target``; nothing is written yet."""
        if value is not target:
            self._planned.append((target, value))

    def commit(self) -> None:
        """Do every write; if one fails, undo those before it and raise its error."""
        undo: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            try:
                for target, value in self._planned:
                    before = _kept(target)
                    _write(target, value)
                    undo.append((target, before))
            except BaseException:
                for target, before in reversed(undo):
                    _write(target, before)
                raise


def _write(target: Tensor, value: Tensor) -> None:
    """Give ``target`` the data of ``value``, as ``torch.__future__`` says modules shall do it.

    Hooks on the gradient of ``target`` stay if it keeps its shape, dtype and device, as those of
    ``DistributedDataParallel``. ``Tensor.set_`` drops them without a word.
    """
    if _is_sharded(target):
        # FSDP2 holds the memory: it is written in place, and the shard behind what is gathered.
        if target.shape != value.shape:
            raise RuntimeError(
                "a sharded original keeps its shape.\n"
                f"original: {tuple(target.shape)}\nvalue for it: {tuple(value.shape)}"
            )
        for written in (target, shard_behind(target)):
            if written is not None:
                written.detach().copy_(value_like(value.detach(), written))
        return
    if not (get_swap_module_params_on_conversion() or is_wrapper_subclass(target)):
        if _is_alike(target, value):
            target.data = value.detach()
            torch.autograd.graph.increment_version(target)  # which `data` does not
        else:
            target.set_(value)  # type: ignore[call-overload]
        return
    # An alias: swapping takes away the tensor it is given, and nobody else may hold that.
    value = value.detach()
    if isinstance(target, Parameter):
        value = Parameter(value, requires_grad=target.requires_grad)
    torch.utils.swap_tensors(target, value)  # type: ignore[no-untyped-call]


def _kept(target: Tensor) -> Tensor:
    """Return what ``_write`` can put back."""
    return target.detach().clone() if _is_sharded(target) else target.detach()


def _is_sharded(target: Tensor) -> bool:
    """Check whether ranks hold parts of an original. In code that is traced it is not asked."""
    if torch.compiler.is_compiling():
        return False
    return is_dtensor(target) or shard_behind(target) is not None


def _is_alike(target: Tensor, value: Tensor) -> bool:
    alike = all(
        getattr(target, what) == getattr(value, what)
        for what in ("shape", "dtype", "device", "layout")
    )
    plain = not (is_wrapper_subclass(value) or target.is_inference() or value.is_inference())
    return alike and plain and not torch.compiler.is_compiling()


def register(module: Module, name: str, tensor: Tensor) -> None:
    """Register ``tensor`` on ``module`` as what it is, a parameter or a buffer."""
    if isinstance(tensor, Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)


def like_parameter(value: Tensor, model: Tensor) -> Tensor:
    """Return ``value`` with the ``requires_grad`` of ``model``, as a parameter if that is one."""
    if isinstance(model, Parameter):
        return Parameter(value, requires_grad=model.requires_grad)
    if value.requires_grad != model.requires_grad:
        # An alias: the parametrization may have returned a tensor of its own.
        value = value.detach().requires_grad_(model.requires_grad)
    return value


def right_inverses(steps: Sequence[Module], value: Tensor, *, required: bool) -> Any:
    """Apply the ``right_inverse`` of each step, last registered first.

    Args:
        steps: the parametrizations, in the order of registration.
        value: the value their composition should have.
        required: whether a step without ``right_inverse`` is an error; it is the identity if not.

    Raises:
        RuntimeError: if ``required`` and a step has no ``right_inverse``.
    """
    with torch.no_grad():
        for step in reversed(steps):
            inverse: Any = getattr(step, "right_inverse", None)
            if inverse is None:
                if required:
                    raise RuntimeError(
                        "Assigning to a parametrized tensor needs the right_inverse of each of its "
                        f"parametrizations, and {kind_of(step)} does not implement "
                        f"right_inverse.\nparametrizations: {first_names(map(kind_of, steps))}\n"
                        "Implement it, or write to the original tensors instead."
                    )
                continue
            try:
                value = inverse(value)
            except NotImplementedError:
                if required:
                    raise
    return value


def initial_originals(original: Tensor, new: Any) -> dict[str, Any]:
    """Return the originals of a newly parametrized tensor by their names.

    None of them is ``original`` itself unless ``new`` is, or contains, it.

    Args:
        original: the tensor to be parametrized.
        new: the result of the right inverses for it.

    Raises:
        ValueError: if ``new`` is neither a tensor of the dtype and device of ``original``, nor a
            sequence of tensors.
    """
    if isinstance(new, Tensor):
        for what in ("dtype", "device"):
            if getattr(original, what) != getattr(new, what):
                raise ValueError(
                    f"When `right_inverse` outputs one tensor, it may not change the {what}.\n"
                    f"original.{what}: {getattr(original, what)}\n"
                    f"right_inverse(original).{what}: {getattr(new, what)}"
                )
        return {"original": new if new is original else like_parameter(new, original)}
    if not isinstance(new, Sequence):
        raise ValueError(
            "'right_inverse' must return a Tensor or a Sequence of tensors (list, tuple...).\n"
            f"value given to it: a tensor of shape {tuple(original.shape)}\n"
            f"value it returned: {type(new).__name__}"
        )
    for i, element in enumerate(new):
        if not isinstance(element, Tensor) and not is_opaque_reference(element):
            raise ValueError(
                "'right_inverse' must return a Tensor or a Sequence of tensors (list, tuple...).\n"
                f"length of the sequence: {len(new)}\n"
                f"element {i} of the sequence with type {type(element).__name__}"
            )
    return {
        f"original{i}": like_parameter(x, original) if isinstance(x, Tensor) else x
        for i, x in enumerate(new)
    }
