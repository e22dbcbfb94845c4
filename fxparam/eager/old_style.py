"""Parametrizations in the place of what old-style weight norm and spectral norm do by hooks.

``torch.nn.utils.weight_norm`` and ``torch.nn.utils.spectral_norm`` keep the originals in the module
itself (``weight_g``, ``weight_v``), and assign ``weight`` before each call of the module.

The old hook's place in the module is taken by one that does nothing but be found: models call
``torch.nn.utils.remove_weight_norm`` on their layers, which looks for such a hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm

from fxparam._torch.names import WeightNormParametrization
from fxparam.eager.checks import check_name
from fxparam.eager.classes import chain_of
from fxparam.eager.describe import first_names
from fxparam.eager.hooks import TensorHook
from fxparam.eager.install import class_with, install
from fxparam.eager.parametrization_list import ParametrizationList
from fxparam.eager.pickling import WeightNormKeys
from fxparam.eager.register import remove_parametrizations
from fxparam.eager.spectral import warn_if_averaged

__all__ = ["Conversion", "conversions", "old_style_tensors"]

#: What the name of a tensor is followed by in those of the parameters and buffers of its hook.
_PARTS = {WeightNorm: (("_g", "_v"), ()), SpectralNorm: (("_orig",), ("_u", "_v"))}


class Conversion(NamedTuple):
    """A tensor that an old-style hook computes, and that can be parametrized instead.

    Attributes:
        module: the module that has the hook.
        key: the hook's key among the module's forward pre-hooks.
        hook: the hook.
    """

    module: Module
    key: int
    hook: Any

    def carry_out(self) -> None:
        """Parametrize the tensor. Every check has passed: nothing here can fail."""
        module, name = self.module, self.hook.name
        convert = _convert_weight_norm if type(self.hook) is WeightNorm else _convert_spectral_norm
        chain, found, keys = convert(module, self.hook)
        chain.train(module.training)
        module.__dict__.pop(name, None)
        install(module, name, chain, class_with(module, name))
        module._forward_pre_hooks[self.key] = found
        module._register_load_state_dict_pre_hook(keys)  # type: ignore[no-untyped-call]


def conversions(model: Module) -> list[Conversion]:
    """Return the tensors in ``model`` that old-style hooks compute, all checked.

    Hooks of classes derived from torch's are left alone: what those compute is not known.

    Raises:
        ValueError: if an original is not where the hook looks for it, or not a parameter.
        KeyError: if the tensor has a name that parametrized tensors cannot have.
    """
    found = []
    for module in model.modules():
        for key, hook in _old_style_hooks(module):
            if type(hook) in _PARTS:
                _check(module, hook)
                found.append(Conversion(module, key, hook))
    return found


def old_style_tensors(model: Module) -> list[str]:
    """Return the qualified names of the tensors that old-style hooks compute."""
    return [
        f"{path}.{hook.name}".lstrip(".")
        for path, module in model.named_modules()
        for _, hook in _old_style_hooks(module)
    ]


def _old_style_hooks(module: Module) -> Iterator[tuple[int, Any]]:
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, (WeightNorm, SpectralNorm)) and not isinstance(hook, TensorHook):
            yield key, hook


def _check(module: Module, hook: Any) -> None:
    check_name(module, hook.name)
    parameters, buffers = ([hook.name + p for p in parts] for parts in _PARTS[type(hook)])
    lacking = [name for name in parameters if module._parameters.get(name) is None]
    lacking += [name for name in buffers if module._buffers.get(name) is None]
    if lacking:
        raise ValueError(
            f"adopt makes a parametrization of the old-style {type(hook).__name__} hook on "
            f"'{hook.name}' of {type(module).__name__}, from the module's own tensors.\n"
            f"required: parameters {first_names(parameters)}, buffers {first_names(buffers)}\n"
            f"not found as such: {first_names(lacking)}\n"
            "Adopt before these are replaced, or remove the hook."
        )


def _convert_weight_norm(module: Module, hook: WeightNorm) -> tuple[Any, Any, Any]:
    """Return the list of a tensor, the hook that torch's remover finds, and that of old keys."""
    name = hook.name
    originals: Any = [module._parameters.pop(name + part) for part in ("_g", "_v")]
    step = WeightNormParametrization(hook.dim)
    chain = ParametrizationList.of(step, *originals)
    return chain, _FoundWeightNorm(name, hook.dim), WeightNormKeys(name)


def _convert_spectral_norm(module: Module, hook: SpectralNorm) -> tuple[Any, Any, Any]:
    """Return the list of a tensor, the hook that torch's remover finds, and that of old keys."""
    name = hook.name
    step = SpectralNormOfHook(hook)
    for part in ("_u", "_v"):
        persistent = name + part not in module._non_persistent_buffers_set
        step.register_buffer(part, module._buffers.pop(name + part), persistent=persistent)
        module._non_persistent_buffers_set.discard(name + part)
    original: Any = module._parameters.pop(name + "_orig")
    chain = ParametrizationList.of(step, original)
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, each in list(hooks.items()):
            if _has_to_do_with(getattr(each, "hook", each), name):
                del hooks[key]
    found = _FoundSpectralNorm(name, hook.n_power_iterations, hook.dim, hook.eps)
    return chain, found, SpectralNormKeys(hook)


def _has_to_do_with(hook: object, name: str) -> bool:
    ofs = (SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook)
    return isinstance(hook, ofs) and hook.fn.name == name


class SpectralNormOfHook(Module):
    """Divides a tensor by its spectral norm as ``torch.nn.utils.spectral_norm`` does, to the bit.

    Not torch's parametrization, which updates the two vectors in the other order.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, hook: SpectralNorm) -> None:
        super().__init__()
        self.hook = hook

    def forward(self, original: Tensor) -> Tensor:
        """Return the quotient; in training mode, after a power iteration, which writes buffers."""
        if not self.training and not torch.compiler.is_compiling():
            warn_if_averaged(self, self._u)
        holder: Any = _Holder(self.hook.name, original, self._u, self._v)
        return self.hook.compute_weight(holder, self.training)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the value, whose spectral norm the caller has made one."""
        return value


class _Holder:
    """Holds tensors under the names by which a spectral norm hook looks them up in a module."""

    def __init__(self, name: str, original: Tensor, u: Tensor, v: Tensor) -> None:
        setattr(self, name + "_orig", original)
        setattr(self, name + "_u", u)
        setattr(self, name + "_v", v)


class SpectralNormKeys(TensorHook):
    """Rename the keys of old-style spectral norm in a state dict to those of parametrizations."""

    def __init__(self, hook: SpectralNorm) -> None:
        self.name = hook.name
        self.older = SpectralNormLoadStateDictPreHook(hook)

    def __call__(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        old = prefix + self.name
        if f"{old}_orig" not in state_dict:
            return
        self.older(
            state_dict, prefix, *rest
        )  # of checkpoints from before there was a second vector
        new = f"{prefix}parametrizations.{self.name}"
        for part, key in (("_orig", "original"), ("_u", "0._u"), ("_v", "0._v")):
            if old + part in state_dict:
                state_dict[f"{new}.{key}"] = state_dict.pop(old + part)


class _Found(TensorHook):
    """A hook that does nothing, which torch's remover finds and calls :meth:`remove` of."""

    def __call__(self, module: Module, inputs: object) -> None:
        """Do nothing: the tensor is evaluated at each access."""

    def remove(self, module: Module) -> None:
        """Make the tensor plain, with its present value, as the hook's class does."""
        hooks: dict[int, Callable[..., Any]] = module._forward_pre_hooks
        key = next(key for key, hook in hooks.items() if hook is self)
        chain: Any = chain_of(module, self.name)
        if chain is not None:
            chain.eval()  # torch's hooks do no power iteration here
        remove_parametrizations(module, self.name)
        hooks[key] = self  # torch's remover takes it off itself


class _FoundWeightNorm(_Found, WeightNorm):
    """Found by ``torch.nn.utils.remove_weight_norm``."""


class _FoundSpectralNorm(_Found, SpectralNorm):
    """Found by ``torch.nn.utils.remove_spectral_norm``."""
