"""The parametrized tensors of the models that a scope is given."""

from __future__ import annotations

from torch.nn import Module

from fxparam.eager.adopt import adopt_classes
from fxparam.eager.checks import check_modules
from fxparam.eager.classes import chains_of

__all__ = ["adopt_models", "lists_in", "names_of_lists"]


def adopt_models(models: tuple[Module, ...]) -> None:
    """Make the parametrizations of models ours.

    Raises:
        TypeError: if one is not a module; nothing is changed then.
    """
    check_modules(**{f"models[{i}]": model for i, model in enumerate(models)})
    for model in models:
        adopt_classes(model)


def lists_in(models: tuple[Module, ...], wanted_by: str) -> dict[Module, str]:
    """Return the parametrization lists of models, adopted, with the names of their tensors.

    Args:
        models: modules.
        wanted_by: the name of the function that was given them, for the error.

    Raises:
        TypeError: if one is not a module, or there is none.
    """
    if not models:
        raise TypeError(f"{wanted_by} needs the models whose tensors it is about: got none")
    adopt_models(models)
    return names_of_lists(models)


def names_of_lists(models: tuple[Module, ...]) -> dict[Module, str]:
    """Return the parametrization lists of models, with the names of their tensors."""
    names: dict[Module, str] = {}
    for model in models:
        for path, module in model.named_modules():
            for name, chain in (chains_of(module) or {}).items():
                # torch.compile's modules have the name of one more module in them.
                tensor = f"{path}.{name}".replace("_orig_mod.", "")
                names.setdefault(chain, tensor.lstrip("."))
    return names
