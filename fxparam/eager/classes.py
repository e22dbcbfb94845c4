"""The class of a parametrized module: one for each (original class, parametrized names).

``Parametrized<Name>`` derives from the original class alone, as torch's does, so that torch's own
functions find the original class in ``__bases__[0]``. Unlike torch's it is shared: twenty equal
layers have one class, and what is traced for one serves all. Hence nothing about an instance may
live in it: its properties look up the instance's own ``ParametrizationList``, and where there is
none they step aside for a plain parameter or attribute of that name.

torch's functions add properties to a module's class, and delete them from it. The metaclass takes
such changes so that no other instance notices them.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Module, ModuleDict

from fxparam.eager import reading
from fxparam.eager.describe import first_names
from fxparam.eager.pickling import KEY, reduce_method, setstate_method
from fxparam.eager.reset import reset_parameters

__all__ = [
    "chain_of",
    "chains_of",
    "is_made_by_torch",
    "make_class",
    "original_class",
    "rebuild",
]

# Reentrant: making a class runs the original's __init_subclass__.
_lock = threading.RLock()
_classes: WeakValueDictionary[tuple[type, frozenset[str]], type] = WeakValueDictionary()


def chains_of(module: Module) -> ModuleDict | None:
    """Return the ``ModuleDict`` of parametrization lists that ``module`` itself holds, or None."""
    chains = module._modules.get("parametrizations")
    return chains if isinstance(chains, ModuleDict) else None


def chain_of(module: Module, name: str) -> Any:
    """Return the parametrization list of ``module.<name>``, or None."""
    chains = chains_of(module)
    return None if chains is None else chains._modules.get(name)


def original_class(cls: type) -> type | None:
    """Return the class that a parametrized module had before.

    None if ``cls`` was made neither by ours nor by torch's functions.
    """
    if KEY in cls.__dict__:
        original: type = cls.__dict__[KEY][0]
        return original
    return cls.__bases__[0] if is_made_by_torch(cls) else None


def is_made_by_torch(cls: type) -> bool:
    """Check whether torch's functions made ``cls`` for a parametrized module.

    They give such a class a ``__getstate__`` of their own. Its ``__module__`` does not tell: a
    metaclass written in Python, as that of ``abc.ABC``, sets it to where it is written itself.
    """
    method = cls.__dict__.get("__getstate__")
    made = getattr(method, "__module__", "") == "torch.nn.utils.parametrize"
    return made and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"


def make_class(original: type, names: frozenset[str]) -> type:
    """Return the one class for modules of class ``original`` with parametrized tensors ``names``.

    ``original`` itself when there are none.
    """
    if not names:
        return original
    with _lock:
        cls = _classes.get((original, names))
        if cls is None:
            namespace: dict[str, Any] = {
                "__module__": __name__,
                "__doc__": original.__doc__,
                "__reduce_ex__": reduce_method(original, names, rebuild),
                "__setstate__": setstate_method(original),
                "__format__": _format_method(original),
                **{name: _property(original, name) for name in sorted(names)},
            }
            if hasattr(original, "reset_parameters"):
                namespace["reset_parameters"] = _reset_method(original)
            namespace[KEY] = (original, names)
            meta = _metaclass(type(original))
            cls = meta(f"Parametrized{original.__name__}", (original,), namespace)
            _classes[original, names] = cls
        return cls


def _format_method(original: Any) -> Callable[[Any, str], str]:
    """Return the ``__format__`` of a shared class.

    ``torch.nn.utils.remove_weight_norm`` and the like say of what they do not know that there is
    nothing to be found in ``f"{module}"``. It therefore says by what parametrizations are removed.
    Printed modules do not.
    """

    def __format__(self: Module, spec: str) -> str:
        shown: str = original.__format__(self, spec)
        names = first_names(chains_of(self) or ())
        return f"{shown}\n(parametrized, until fxparam.remove_parametrizations: {names})"

    return __format__


def _reset_method(original: Any) -> Callable[..., Any]:
    """Return the ``reset_parameters`` of a shared class."""

    def reset(self: Module, *args: Any, **kwargs: Any) -> Any:
        return reset_parameters(self, lambda: original.reset_parameters(self, *args, **kwargs))

    return functools.wraps(original.reset_parameters)(reset)


@lru_cache(maxsize=64)
def _metaclass(base: Any) -> Any:
    """Return a metaclass for shared classes, which lets torch's functions not change them.

    Args:
        base: the metaclass of the original class, from which it is derived.
    """

    def set_attribute(cls: type, name: str, value: object) -> None:
        # torch's register_parametrization sets a property bound to one module.
        getter = value.fget if isinstance(value, property) else None
        if getter is not None and getter.__module__ == "torch.nn.utils.parametrize":
            value = _property(cls.__bases__[0], name)
        base.__setattr__(cls, name, value)

    def delete_attribute(cls: type, name: str) -> None:
        # torch's remove_parametrizations: the instance has lost its list, which is enough. Other
        # instances still need the property.
        if not _is_ours(cls.__dict__.get(name)):
            base.__delattr__(cls, name)

    return type(
        f"Shared{base.__name__}",
        (base,),
        {"__setattr__": set_attribute, "__delattr__": delete_attribute, "__module__": __name__},
    )


def _property(original: type, name: str) -> property:
    """Return the property ``<name>`` of a shared class.

    Reading evaluates, or gives the value of the region around; assigning applies right inverses. A
    module without such a list gets what a plain attribute would give.
    """
    # Decided here, as Dynamo traces what follows and cannot look into classes.
    plain = _Plain(original, name) if hasattr(original, name) else None

    def get_parametrized(self: Module) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            raise RuntimeError("Parametrization is not working with scripting.")
        traced = torch.compiler.is_dynamo_compiling()
        value = None
        if traced and reading.found_in_trace(name):
            return value  # type: ignore[return-value]
        chain = chain_of(self, name)
        if chain is None:
            return _stored(self, name) if plain is None else plain.get(self)  # type: ignore[no-any-return]
        return _read(self, name, chain, traced)

    def set_original(self: Module, value: Tensor) -> None:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            raise RuntimeError("Parametrization is not working with scripting.")
        chain = chain_of(self, name)
        if chain is not None:
            reading.present().forget(chain)
            chain.right_inverse(value)
        elif plain is not None:
            plain.set(self, value)
        else:
            self.__dict__[name] = value

    get_parametrized._fxparam_property = True  # type: ignore[attr-defined]
    return property(get_parametrized, set_original)


def _read(module: Module, name: str, chain: Module, traced: bool) -> Tensor:
    """Return the value of a parametrized tensor, as the present reading gives it.

    Args:
        module: the module that has the tensor.
        name: the name of the tensor.
        chain: its ``ParametrizationList``.
        traced: whether Dynamo is tracing the code.

    Raises:
        RuntimeError: if a parametrization raises an AttributeError, which is its cause: Python
            takes an AttributeError of a property for a missing attribute.
    """
    # Apart from the property: torch.jit.script, which is to be refused there, parses no ``try``.
    try:
        if traced:
            return reading.present().traced_value(chain)
        return reading.present().value(chain, name)
    except AttributeError as error:
        # Dynamo traces the making of no other class of errors.
        raise RuntimeError(
            f"evaluating {type(module).__name__}.{name} raised an AttributeError: {error}"
        ) from error


def _is_ours(attribute: object) -> bool:
    return isinstance(attribute, property) and hasattr(attribute.fget, "_fxparam_property")


def _stored(module: Module, name: str) -> Any:
    """Return ``module.<name>`` as ``nn.Module`` would, for an instance without such a list."""
    for store in (module.__dict__, module._parameters, module._buffers, module._modules):
        if name in store:
            return store[name]
    # Python now asks the class's __getattr__, as it does for any name it has not found.
    raise AttributeError(f"'{type(module).__name__}' object has no attribute '{name}'")


class _Plain:
    """Reads and sets ``module.<name>`` where the original class has an attribute of that name.

    It may be a default or a descriptor, such as a property.
    """

    def __init__(self, original: type, name: str) -> None:
        self.original, self.name = original, name

    def get(self, module: Module) -> Any:
        attribute = inspect.getattr_static(self.original, self.name)
        if not hasattr(type(attribute), "__set__") and self.name in module.__dict__:
            return module.__dict__[self.name]
        get = getattr(type(attribute), "__get__", None)
        return attribute if get is None else get(attribute, module, type(module))

    def set(self, module: Module, value: object) -> None:
        attribute = inspect.getattr_static(self.original, self.name)
        if hasattr(type(attribute), "__set__"):
            attribute.__set__(module, value)
        else:
            module.__dict__[self.name] = value


def rebuild(original: type, names: tuple[str, ...], make: Any, *arguments: Any) -> Any:
    """Make an instance of a shared class, when it is unpickled or copied.

    Pickles hold the name of this function.

    Args:
        original: the original class.
        names: the parametrized tensors of the shared class.
        make: the function that makes an instance of the original class.
        arguments: its arguments.
    """
    instance = make(*arguments)
    if type(instance) is original:
        object.__setattr__(instance, "__class__", make_class(original, frozenset(names)))
    return instance
