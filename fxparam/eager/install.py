"""Put a parametrization list in the place of a module's tensor, or a tensor in that of the list.

Every check has passed: nothing here can fail.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module, ModuleDict, Parameter

from fxparam.eager.classes import chains_of, make_class, original_class
from fxparam.eager.originals import register
from fxparam.eager.parametrization_list import ParametrizationList

__all__ = ["class_with", "install", "uninstall"]


def class_with(module: Module, name: str) -> type:
    """Return the class for ``module`` once ``name`` is parametrized too."""
    original = original_class(type(module))
    if original is None:
        # Not parametrized, or a class was put on top since: either way, what is there stays.
        return make_class(type(module), frozenset({name}))
    return make_class(original, frozenset({*(chains_of(module) or ()), name}))


def install(module: Module, name: str, chain: ParametrizationList, cls: type) -> None:
    """Put a list in the place of ``module.<name>`` and give the module its new class."""
    chains = chains_of(module)
    if chains is None:
        chains = ModuleDict()
        module.__dict__.pop("parametrizations", None)
        # Not by setattr: a class may have a __setattr__ of its own.
        module._modules["parametrizations"] = chains
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    module._non_persistent_buffers_set.discard(name)
    chains[name] = chain
    object.__setattr__(module, "__class__", cls)


def uninstall(module: Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the list of ``module.<name>``.

    Where it was the last one, the module gets back the class it had.
    """
    cls = _class_without(module, name)
    chains: Any = chains_of(module)
    del chains[name]
    if len(chains) == 0:
        del module._modules["parametrizations"]
    object.__setattr__(module, "__class__", cls)
    _restore(module, name, tensor)


def _class_without(module: Module, name: str) -> type:
    """Return the class for ``module`` once ``name`` is plain again."""
    original = original_class(type(module))
    if original is None:
        return type(module)
    return make_class(original, frozenset(chains_of(module) or ()) - {name})


def _restore(module: Module, name: str, tensor: Tensor) -> None:
    """Register ``tensor`` on ``module`` as a plain parameter or buffer."""
    if hasattr(type(module), name):
        # The class has an attribute of this name, for which register_parameter refuses.
        store: Any = module._parameters if isinstance(tensor, Parameter) else module._buffers
        store[name] = tensor
    else:
        register(module, name, tensor)
