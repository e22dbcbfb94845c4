"""Parametrized tensors of models that an engine of torch's has taken over.

``fully_shard`` (FSDP2) puts the parameters into modules by module and name, and shards them.
``DistributedDataParallel`` knows the parameters that it was given. Neither learns of new ones,
whose gradients would differ between ranks without a word: what would make some is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import Module, Parameter

from fxparam._torch import fsdp
from fxparam._torch.ddp import is_reduced
from fxparam.eager.describe import kind_of, spelled

__all__ = ["Engine", "engine_of"]


class Engine:
    """The engine that has taken over a parameter, if one has.

    Args:
        held: the parameter.
        place: where FSDP2 puts it; None if it does not know it.
        name: of the tensor, for messages.
    """

    def __init__(self, held: object, place: fsdp.Place | None, name: str) -> None:
        self._place, self._tensor_name = place, name
        reduced = place is None and isinstance(held, Tensor) and is_reduced(held)
        self._name = "fully_shard" if place else "DistributedDataParallel" if reduced else ""

    def check_keeps_dtype(self) -> None:
        """Raise if the whole value has another dtype than the parameter that stores it."""
        if self._place is not None and self._place.casts:
            self._refuse("a MixedPrecisionPolicy whose param_dtype is not the parameter's dtype")

    def check_is_not_tied(self) -> None:
        """Raise if other modules hold the parameter too."""
        if self._place is not None and self._place.is_tied:
            self._refuse("a parameter that several modules hold")

    def check_has_no_parameters(self, parametrization: Module) -> None:
        """Raise if a parametrization brings parameters of its own."""
        if self._name and any(p.requires_grad for p in parametrization.parameters()):
            self._refuse(f"parameters of {kind_of(parametrization)} itself")

    def check_stays_one_tensor(self, is_tensor: bool) -> None:
        """Raise if a tensor has several originals, which are new parameters beside the old one."""
        if self._name and not is_tensor:
            self._refuse("several originals in place of one parameter")

    def move(self, module: Module, name: str) -> None:
        """The parameter is held by another module from now on."""
        if self._place is not None:
            self._place.move(module, name)

    def _refuse(self, found: str) -> None:
        raise ValueError(
            f"{spelled(self._tensor_name)} is a parameter of {self._name}, which learns of no new "
            f"parameters: their gradients would not be those of all ranks.\nfound: {found}\n"
            f"Register and remove parametrizations before {self._name} is called."
        )


@contextmanager
def engine_of(module: Module, name: str, chain: Module | None = None) -> Iterator[Engine]:
    """Return the engine of a tensor, with what it shards made whole for the block.

    Args:
        module: the module.
        name: the tensor.
        chain: its ``ParametrizationList``, if it is parametrized.
    """
    found = fsdp.places([module] if chain is None else chain.modules())
    if chain is None:
        found = [place for place in found if place.name == name]
        known = name in module._parameters  # torch.jit's stores have no ``get``
        held: object = module._parameters[name] if known else None
        own = found[0] if found else None
    else:
        originals = [n for n, p in chain._parameters.items() if isinstance(p, Parameter)]
        held = chain._parameters[originals[0]] if originals else None
        own = next((p for p in found if p.module is chain and p.name in originals), None)
    with fsdp.gathered(found):
        yield Engine(held, own, name)
