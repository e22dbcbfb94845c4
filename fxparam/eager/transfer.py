"""Parametrizations of one module given to another as well."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Module, Parameter

from fxparam.eager import checks
from fxparam.eager.classes import chain_of, chains_of
from fxparam.eager.describe import first_names
from fxparam.eager.parametrization_list import ParametrizationList

__all__ = ["transferred"]

M = TypeVar("M", bound=Module)


def transferred(source: Module, target: Module, name: str) -> ParametrizationList:
    """Return the list that ``target.<name>`` gets.

    It has the parametrizations and originals of ``source.<name>``'s list. ``target`` is not
    changed, nor are its tensors: the checks run on copies of them.

    Raises:
        KeyError: if ``source.<name>`` is not parametrized.
        AttributeError: if neither module has the name at all.
        ValueError: if the parametrizations change the dtype or shape of ``target.<name>``.
    """
    if not hasattr(target, name) and not hasattr(source, name):
        raise AttributeError(
            "transfer_parametrizations_and_params needs a parametrized tensor to transfer.\n"
            f"asked for: '{name}'\nfound: neither module has an attribute of that name"
        )
    given: Any = chain_of(source, name)
    if given is None:
        raise KeyError(
            "transfer_parametrizations_and_params needs a parametrized tensor to transfer; "
            f"asked for: '{name}'; parametrized: {first_names(sorted(chains_of(source) or ()))}"
        )
    chain: ParametrizationList = _extended(source, target, name, list(given))
    if hasattr(given, "original"):
        chain.original = given.original
    else:
        for i in range(given.ntensors):
            setattr(chain, f"original{i}", getattr(given, f"original{i}"))
    return chain


def _extended(source: Module, target: Module, name: str, steps: list[Module]) -> Any:
    """Return a new list of what ``target.<name>`` already has and then ``steps``, all checked."""
    present: Any = chain_of(target, name)
    if present is not None:
        # A copy with containers of its own: the parametrizations and originals are shared.
        chain: Any = object.__new__(type(present))
        chain.__dict__.update(present.__dict__)
        for store in ("_modules", "_parameters", "_buffers"):
            chain.__dict__[store] = dict(present.__dict__[store])
    else:
        chain = ParametrizationList(steps[:1], _copy_of(source, target, name))
        steps = steps[1:]
    for step in steps:
        checks.check_appended(chain(), step, name)
        chain.append(step)
    return chain


def _copy_of(source: Module, target: Module, name: str) -> Tensor:
    """Return a copy of ``target.<name>``, or of the value of ``source.<name>``."""
    if not hasattr(target, name):
        return Parameter(getattr(source, name))
    tensor = checks.registrable(target, name)
    copy = tensor.detach().clone()
    if isinstance(tensor, Parameter):
        return Parameter(copy, requires_grad=tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)
