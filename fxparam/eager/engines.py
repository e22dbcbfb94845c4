"""Parametrized tensors of models that an engine of torch's has taken over.

``fully_shard`` (FSDP2) puts the parameters into modules by module and name, and shards them.
``DistributedDataParallel`` knows the parameters that it was given. Neither learns of new ones,
whose gradients would differ between ranks without a word: what would make some is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Module, Parameter

from fxparam._torch import fsdp
from fxparam._torch.ddp import is_reducing
from fxparam._torch.dtensors import is_dtensor
from fxparam.eager.classes import chain_of
from fxparam.eager.describe import kind_of, spelled

__all__ = ["Engine", "engine_of", "innermost"]


class Engine:
    """The engine that has taken over the module of a tensor, if one has.

    Args:
        module: the module.
        name: the tensor, for messages.
        held: the parameter or buffer that stores it; None if there are several.
        place: where FSDP2 puts the parameter; None if it does not know it.
    """

    def __init__(self, module: Module, name: str, held: object, place: fsdp.Place | None) -> None:
        self._place, self._tensor_name, self._held = place, name, held
        self._name = ""
        if place is not None or fsdp.is_sharding(module):
            self._name = "fully_shard"
        elif is_reducing(module):
            self._name = "DistributedDataParallel"

    def check_may_be_stored(self) -> None:
        """Raise if what is gathered cannot stand for the parameter that is sharded."""
        if self._place is None:
            return
        if self._place.casts:
            self._refuse("a MixedPrecisionPolicy whose param_dtype is not the parameter's dtype")
        if is_dtensor(self._held):
            self._refuse("a parameter that tensor parallelism shards as well")

    def check_is_not_tied(self) -> None:
        """Raise if other modules hold the parameter too."""
        if self._place is not None and self._place.is_tied:
            self._refuse("a parameter that several modules hold")

    def check_has_no_parameters(self, parametrization: Module) -> None:
        """Raise if a parametrization brings parameters of its own."""
        if any(p.requires_grad for p in parametrization.parameters()):
            self._refuse(f"parameters of {kind_of(parametrization)} itself")

    def check_stays_one_tensor(self, chain: Any) -> None:
        """Raise if a list has several originals, which are new parameters beside the old one.

        Without gradients, what is new does no harm where it is not sharded.
        """
        if not innermost(chain).is_tensor:
            trained = any(p.requires_grad for p in chain.parameters())
            if trained or self._name == "fully_shard":
                self._refuse("several originals in place of one parameter")

    def check_is_none(self) -> None:
        """Raise if there is an engine."""
        self._refuse("parameters of another module")

    def move(self, module: Module, name: str) -> None:
        """The parameter is held by another module from now on."""
        if self._place is not None:
            self._place.move(module, name)

    def _refuse(self, found: str) -> None:
        if self._name:
            raise ValueError(
                f"{spelled(self._tensor_name)} is a parameter of {self._name}, which learns of no "
                "new parameters: their gradients would not be those of all ranks.\n"
                f"found: {found}\n"
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
    if chain is None:
        holder, names = module, [name]
        found = [place for place in fsdp.places([module]) if place.is_at(module, names)]
    else:
        holder = innermost(chain)
        names = [n for n, p in holder._parameters.items() if isinstance(p, Parameter)]
        found = fsdp.places(chain.modules())
    own = next((place for place in found if place.is_at(holder, names)), None)
    with fsdp.gathered(found):
        # torch.jit's stores have no ``get``
        held = holder._parameters[names[0]] if names and names[0] in holder._parameters else None
        yield Engine(module, name, held, own)


def innermost(chain: Any) -> Any:
    """Return the list whose original is stored, below nested ones."""
    while chain.is_tensor and chain_of(chain, "original") is not None:
        chain = chain_of(chain, "original")
    return chain
