"""Take over what was parametrized through torch, by parametrizations or by old-style hooks."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.nn import Module
from torch.nn.utils import parametrize as torch_parametrize

from fxparam._torch.names import SpectralNormParametrization
from fxparam.eager.checks import check_modules
from fxparam.eager.classes import chains_of, is_made_by_torch, make_class, original_class
from fxparam.eager.old_style import conversions
from fxparam.eager.parametrization_list import ParametrizationList
from fxparam.eager.spectral import CheckedSpectralNorm

__all__ = ["adopt", "adopt_classes"]

# Classes of torch's that have one of ours in their place.
_OURS: dict[type, type] = {
    torch_parametrize.ParametrizationList: ParametrizationList,
    SpectralNormParametrization: CheckedSpectralNorm,
}

M = TypeVar("M", bound=Module)


def adopt(model: M) -> M:
    """Turn parametrizations that ``model`` got through torch into ours, in place.

    Afterwards the modules pickle, share a class with equal ones, and are served by
    :func:`fxparam.cached`, as if they had been registered with
    :func:`fxparam.register_parametrization`. Parameters, buffers, parametrization lists and hooks
    keep their identity, and the state dict stays as it is. What is already ours is left alone, so
    that adopting twice changes nothing more.

    What the old-style ``torch.nn.utils.weight_norm`` and ``torch.nn.utils.spectral_norm`` compute
    by hooks is parametrized. It is then evaluated at each access, and no longer once before each
    call of the module. Parameters and buffers keep their identity, and get the names that
    ``torch.nn.utils.parametrizations`` gives them, also in state dicts. State dicts with the old
    names (``weight_g``, ``weight_v``, ``weight_orig``, ``weight_u``) still load.
    ``torch.nn.utils.remove_weight_norm`` and ``remove_spectral_norm`` still remove.

    Args:
        model: any module; its submodules are visited, parametrizations of parametrizations too.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if an old-style hook does not find its parameters and buffers in its module.
        KeyError: if it computes a tensor of a name that parametrized ones cannot have.

    After an error, ``model`` is as before.

    Example:
        >>> import torch
        >>> import fxparam
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))
        >>> isinstance(layer.parametrizations.weight, fxparam.ParametrizationList)
        False
        >>> isinstance(fxparam.adopt(layer).parametrizations.weight, fxparam.ParametrizationList)
        True
    """
    check_modules(model=model)
    found = conversions(model)
    adopt_classes(model)
    for conversion in found:
        conversion.carry_out()
    return model


def adopt_classes(model: Module) -> None:
    """Give the modules that were parametrized through torch our classes; nothing else changes."""
    scripted = torch.jit.ScriptModule  # their tensors cannot be exchanged
    modules = [module for module in model.modules() if not isinstance(module, scripted)]
    changes = [(module, cls) for module in modules if (cls := _class_for(module))]
    for module, cls in changes:
        object.__setattr__(module, "__class__", cls)


def _class_for(module: Module) -> type | None:
    """Return our class for ``module``; None if it has that already or is not parametrized."""
    cls = type(module)
    original = original_class(cls) or cls
    original = _OURS.get(original, original)
    chains = chains_of(module)
    if chains is not None and original_class(cls) is None and not _torch_made(cls):
        return None  # not a parametrized module, or one of ours below another class
    wanted = make_class(original, frozenset(chains or ()))
    return None if wanted is cls else wanted


def _torch_made(cls: type) -> bool:
    """Check whether ``cls`` derives from a class that torch's functions made.

    FSDP puts a class of its own on top of one.
    """
    return any(map(is_made_by_torch, cls.__mro__))
