"""Put a parametrization list in the place of a module's tensor, with every check behind."""

from __future__ import annotations

from torch.nn import Module, ModuleDict

from fxparam.eager.classes import chains_of, make_class, original_class
from fxparam.eager.parametrization_list import ParametrizationList

__all__ = ["class_with", "install"]


def class_with(module: Module, name: str) -> type:
    """Return the class for ``module`` once ``name`` is parametrized too."""
    original = original_class(type(module))
    if original is None:
        # Not parametrized, or a class was put on top since: either way, what is there stays.
        return make_class(type(module), frozenset({name}))
    return make_class(original, frozenset({*(chains_of(module) or ()), name}))


def install(module: Module, name: str, chain: ParametrizationList, cls: type) -> None:
    """Put a list in the place of ``module.<name>`` and give the module its new class.

    Every check has passed: nothing here can fail.
    """
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
